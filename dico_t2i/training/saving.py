"""Saves a run, reports on its saves, and restores it from a checkpoint."""

import time
from dataclasses import asdict, replace
from pathlib import Path

from dico_t2i.config import Config
from dico_t2i.encoders.identity import KEY, Identities
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.folder import RunFolder
from dico_t2i.runs.lineage import KEY as LINEAGE
from dico_t2i.runs.lineage import Lineage
from dico_t2i.training.checkpoint_writer import CheckpointWriter, Retention
from dico_t2i.training.engine import Engine
from dico_t2i.training.guard import Guard
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.prolonging import KEY as DECAY
from dico_t2i.training.ranks.distributed import World, any_rank, first_message


class Saver:
    """Saves and restores a run: weights, optimizer, averages, and the position in the data."""

    def __init__(
        self,
        config: Config,
        run: RunFolder,
        world: World,
        engine: Engine,
        report: Reporter,
        keep_every: int | None,
        data: dict[str, int],
        encoders: Identities,
    ) -> None:
        """data: the size of the data, saved with checkpoints; data of a different size have a different order.

        encoders: on rank 0, the identities of the frozen encoders, saved with checkpoints.
        """
        self.encoders = encoders
        self.lineage: Lineage = []  # where the weights come from; saved with checkpoints, and restored from them
        self.decay_from: int | None = None  # the step at which the learning rate begins to fall, with schedule: wsd
        self.run, self.world, self.engine, self.report, self.data = run, world, engine, report, data
        retention = Retention(config.checkpoint.keep_last, keep_every, config.checkpoint.keep_best)
        self.writer = CheckpointWriter(run.checkpoints, world.rank, world.size, retention, config.checkpoint.background)
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
            **({} if self.decay_from is None else {DECAY: self.decay_from}),
        }
        self.writer.retention = replace(self.writer.retention, pinned=self.decay_from)
        self._bytes = self.writer.save(step, self.engine.owned_pieces(), self.engine.shapes, state)
        self.pause_s = time.monotonic() - started

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of the last save."""
        return self.writer.error is not None

    @property
    def ended(self) -> bool:
        """Whether a save of this rank has ended and was not reported yet."""
        return self._bytes > 0 and not self.writer.busy

    def settle(self) -> bool:
        """Report how the last save ended; False while it still runs; collective."""
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
            time.sleep(0.02)
        return self._failures == failures

    def restore(self, guard: Guard) -> tuple[int, int] | None:
        """Load the newest undamaged checkpoint, and report which one and which were damaged; collective.

        Returns its step and position, or None if nothing was ever saved. Raises CheckpointError if all are damaged, or
        if they belong to a different model.
        """
        found = ckpt.candidates(self.run.checkpoints)
        for path in found:
            checkpoint = self._verified(path)
            if checkpoint is None:
                continue
            ckpt.check_shapes(checkpoint, self.engine.shapes)
            self.engine.materialize(checkpoint.optimizer_steps)
            ckpt.fill(checkpoint, self.engine.pieces())
            self.engine.publish_weights()
            guard.restore(checkpoint.state.get("guard", {}))
            self.lineage = checkpoint.state.get(LINEAGE, [])
            self.report.event(checkpoint.step, "resume", f"resumed from {path}", ranks=self.world.size)
            before = checkpoint.state.get("data", self.data)
            if before != self.data:
                message = (
                    f"WARNING: the data are {self.data}, but were {before} at this checkpoint: their order is different"
                )
                self.report.event(checkpoint.step, "data", message)
            self.saved_step, self.saved_at = checkpoint.step, time.monotonic()
            return checkpoint.step, checkpoint.position
        if ckpt.ever_saved(self.run.checkpoints):
            raise ckpt.CheckpointError(
                f"{self.run.checkpoints}: all {len(found)} checkpoints are damaged;"
                " restore one, or start a new run with a different name (name=...)"
            )
        return None

    def _verified(self, path: Path) -> ckpt.Checkpoint | None:
        """The checkpoint, after each rank has verified its share of the files; None if any of them is damaged."""
        problem, checkpoint = "", None
        try:
            checkpoint = ckpt.open_checkpoint(path)
            ckpt.verify(checkpoint, sorted(checkpoint.files)[self.world.rank :: self.world.size])
        except ckpt.CheckpointError as error:
            problem = str(error)
        problem = first_message(problem, self.world.device)
        if problem:
            self.report.event(0, "bad checkpoint", f"{path} is skipped: {problem}")
            return None
        return checkpoint

    def _give_up(self) -> None:
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
