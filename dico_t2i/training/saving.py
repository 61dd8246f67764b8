"""Saves a run, reports on its saves, and restores it from a checkpoint."""

import time
from dataclasses import asdict, replace

from dico_t2i.config.stages import RunStage
from dico_t2i.encoders.identity import KEY, Identities
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.folder import STAGE
from dico_t2i.runs.lineage import KEY as LINEAGE
from dico_t2i.runs.lineage import Lineage
from dico_t2i.training.checkpoint_writer import CheckpointWriter
from dico_t2i.training.engine import Engine
from dico_t2i.training.guard import Guard
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.prolonging import KEY as DECAY
from dico_t2i.training.ranks.distributed import any_rank, first_message
from dico_t2i.training.retention import Retention
from dico_t2i.training.session import Session
from dico_t2i.training.uploads import Uploads

_PAUSE_S = 0.02  # between two looks at what runs in the background


class Saver:
    """Saves and restores a run: weights, optimizer, averages, and the position in the data."""

    def __init__(
        self,
        stage: RunStage,
        session: Session,
        engine: Engine,
        report: Reporter,
        keep_every: int | None,
        data: dict[str, int],
        encoders: Identities,
    ) -> None:
        """data: the size of the data, saved with checkpoints; data of a different size have a different order.

        encoders: on rank 0, the identities of the frozen encoders, saved with checkpoints.
        """
        self.stage, self.encoders = stage, encoders
        self.lineage: Lineage = []  # where the weights come from; saved with checkpoints, and restored from them
        self.world, self.engine, self.report, self.data = session.world, engine, report, data
        settings = stage.config.checkpoint
        self.retention = Retention(settings.keep_last, keep_every, settings.keep_best)
        folder, rank, ranks, shared = session.run.checkpoints, self.world.rank, self.world.size, session.shared
        self.writer = CheckpointWriter(folder, rank, ranks, self.retention, settings.background, shared)
        self.uploads = Uploads(session.copies, self.world, report, self.writer) if session.copies else None
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.pause_s = 0.0  # how long the last save paused training, in seconds
        self._bytes = 0  # of the current save
        self._failures = 0

    def save(self, step: int, position: int, loss: float, guard: Guard) -> None:
        """Start a save, and return when training may continue; collective."""
        started = time.monotonic()
        self.drain()
        self.saved_step, self.saved_at = step, time.monotonic()
        if self.world.is_main:
            self.writer.prepare(step)
        if any_rank([self.failed], self.world.device)[0]:  # also makes the other ranks wait for the folder
            self._give_up()
            return
        state = {
            "position": position,
            "optimizer_steps": self.engine.optimizer_steps,
            "loss": loss,
            "guard": asdict(guard.state),
            "data": self.data,
            KEY: self.encoders,
            LINEAGE: self.lineage,
            **({STAGE: self.stage.record} if self.stage.record else {}),
            **({} if self.stage.decay_from is None else {DECAY: self.stage.decay_from}),
        }
        borders = frozenset(entry["step"] for entry in self.lineage if entry["what"] == "stage" and entry["step"])
        self.retention = replace(self.retention, steps=borders | {self.stage.decay_from or 0})
        upload = self.uploads.begin(step, self.retention) if self.uploads else None
        uploading = self.uploads.steps if self.uploads else frozenset()  # not deleted meanwhile
        self.writer.retention = replace(self.retention, steps=self.retention.steps | uploading)
        pieces, shapes = self.engine.owned_pieces(), self.engine.shapes
        self._bytes = self.writer.save(step, pieces, shapes, state, upload)
        self.pause_s = time.monotonic() - started

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of the last save."""
        return self.writer.error is not None

    @property
    def ended(self) -> bool:
        """Whether a save, or the upload of one, has ended on this rank and was not reported yet."""
        saved = self._bytes > 0 and not self.writer.busy
        return saved or (self.uploads is not None and self.uploads.ended)

    def settle(self) -> bool:
        """Report how the last save and the last upload ended; False while the save still runs; collective."""
        if self.uploads:
            self.uploads.settle()
        failed, busy = any_rank([self.failed, self.writer.busy], self.world.device)
        if failed:
            self._give_up()
        elif not busy and self._bytes:
            size = f"{self._bytes / 1e6:.1f} MB by rank 0, training paused {self.pause_s:.2f} s"
            message = f"checkpoint of step {self.saved_step}: {size}"
            times = {"pause_s": self.pause_s, "seconds": time.monotonic() - self.saved_at}
            self.report.event(self.saved_step, "saved", message, bytes=self._bytes, **times)
            self._bytes = 0
        return failed or not busy

    def drain(self) -> bool:
        """Wait for the current save. False if the newest state is not on disk; collective."""
        failures = self._failures
        while not self.settle():
            time.sleep(_PAUSE_S)
        return self._failures == failures

    def finish(self, patience_s: float, saved: bool = True) -> None:
        """Wait until the newest checkpoint is uploaded, for up to ``patience_s`` seconds; collective.

        saved: whether it is on disk.
        """
        if self.uploads:
            self.uploads.finish(self.saved_step if saved else None, self.retention, patience_s)

    def load(self, checkpoint: ckpt.Checkpoint, guard: Guard, begins: bool = False) -> None:
        """Load a checkpoint; collective.

        Raises CheckpointError on all ranks if it belongs to a different model, and DamagedError if a file is damaged.
        begins: whether a stage begins with it. Other data are then no surprise, and gradients may have other norms.
        """
        ckpt.check_shapes(checkpoint, self.engine.shapes)
        self.engine.materialize(checkpoint.optimizer_steps)
        self._fill(checkpoint)
        self.engine.publish_weights()
        self.lineage = checkpoint.state.get(LINEAGE, [])
        guard.restore(checkpoint.state.get("guard", {}))
        if begins:
            guard.forget_norms()
        self.saved_step, self.saved_at = checkpoint.step, time.monotonic()
        if self.uploads and checkpoint.url:
            self.uploads.done = checkpoint.step
        before = checkpoint.state.get("data", self.data)
        if before != self.data and not begins:
            message = (
                f"WARNING: the data are {self.data}, but were {before} at this checkpoint: their order is different"
            )
            self.report.event(checkpoint.step, "data", message)

    def _fill(self, checkpoint: ckpt.Checkpoint) -> None:
        """Read what this rank holds. Raises the same error on all ranks; collective."""
        problem, damaged = "", False
        try:
            ckpt.fill(checkpoint, self.engine.pieces())
        except ckpt.CheckpointError as error:
            problem, damaged = str(error), isinstance(error, ckpt.DamagedError)
        problem = first_message(problem, self.world.device)
        damaged = any_rank([damaged], self.world.device)[0]
        if problem:
            raise (ckpt.DamagedError if damaged else ckpt.CheckpointError)(problem)

    def _give_up(self) -> None:
        if self.uploads:
            self.uploads.abandon(self.saved_step)
        why = first_message(str(self.writer.error or ""), self.world.device)
        self.writer.abandon(self.saved_step)
        self.writer.error = None
        self._bytes = 0
        self._failures += 1
        self.report.event(
            self.saved_step,
            "save failed",
            f"WARNING: the checkpoint of step {self.saved_step} could not be written: {why}."
            " Training continues; the checkpoints before it are valid",
        )
