"""When a run saves, what is told about it, and how it finds its way back."""

import time
from dataclasses import asdict
from pathlib import Path

from dico_t2i.config import Config
from dico_t2i.encoders.identity import KEY, Identities
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.folder import RunFolder
from dico_t2i.training.checkpoint_writer import CheckpointWriter, Retention
from dico_t2i.training.engine import Engine
from dico_t2i.training.guard import Guard
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.ranks.distributed import World, any_rank, first_message


class Saver:
    """Saves and restores a run: weights, optimizer, averages, and where it is."""

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
        """data: how much there is of what, kept with each checkpoint: other data come in another order.

        encoders: of rank 0, the identities of the frozen ones, kept with each checkpoint.
        """
        self.encoders = encoders
        self.run, self.world, self.engine, self.report, self.data = run, world, engine, report, data
        retention = Retention(config.checkpoint.keep_last, keep_every, config.checkpoint.keep_best)
        self.writer = CheckpointWriter(run.checkpoints, world.rank, world.size, retention, config.checkpoint.background)
        self.saved_step, self.saved_at = 0, time.monotonic()
        self.pause_s = 0.0  # seconds for which the last save held up training
        self._bytes = 0  # of the save under way
        self._failures = 0

    def save(self, step: int, position: int, loss: float, guard: Guard) -> None:
        """Start saving; returns when training may go on. Collective."""
        started = time.monotonic()
        self.drain()
        self.saved_step, self.saved_at = step, time.monotonic()
        if self.world.is_main:
            self.writer.prepare(step)
        if any_rank([self.failed], self.world.device)[0]:  # also keeps the others until the folder is there
            self._give_up()
            return
        state = {
            "position": position,
            "optimizer_steps": self.engine.optimizer_steps,
            "loss": loss,
            "guard": asdict(guard.state),
            "data": self.data,
            KEY: self.encoders,
        }
        self._bytes = self.writer.save(step, self.engine.owned_pieces(), self.engine.shapes, state)
        self.pause_s = time.monotonic() - started

    @property
    def failed(self) -> bool:
        """Whether this rank could not write its part of the last save."""
        return self.writer.error is not None

    @property
    def ended(self) -> bool:
        """Whether a save of this rank is done and has not been reported."""
        return self._bytes > 0 and not self.writer.busy

    def settle(self) -> bool:
        """Tell how the last save ended; False while it goes on. Collective."""
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
        """Wait for the save under way. False if the newest state is not on disk. Collective."""
        failures = self._failures
        while not self.settle():
            time.sleep(0.02)
        return self._failures == failures

    def restore(self, guard: Guard) -> tuple[int, int] | None:
        """Load the newest checkpoint that is whole; say which, and which were not. Collective.

        Returns its step and position, None if nothing was ever saved. Raises CheckpointError if none of
        them is whole, or if they are of another model.
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
            self.report.event(checkpoint.step, "resume", f"resumed from {path}", ranks=self.world.size)
            before = checkpoint.state.get("data", self.data)
            if before != self.data:
                message = f"WARNING: {self.data}, but {before} when this checkpoint was made: their order is another"
                self.report.event(checkpoint.step, "data", message)
            self.saved_step, self.saved_at = checkpoint.step, time.monotonic()
            return checkpoint.step, checkpoint.position
        if ckpt.ever_saved(self.run.checkpoints):
            raise ckpt.CheckpointError(
                f"{self.run.checkpoints}: none of {len(found)} checkpoints is whole;"
                " restore one, or start a new run under another name (name=...)"
            )
        return None

    def _verified(self, path: Path) -> ckpt.Checkpoint | None:
        """The checkpoint, after each rank has hashed its share of the files; None if any of it is damaged."""
        problem, checkpoint = "", None
        try:
            checkpoint = ckpt.open_checkpoint(path)
            ckpt.verify(checkpoint, sorted(checkpoint.files)[self.world.rank :: self.world.size])
        except ckpt.CheckpointError as error:
            problem = str(error)
        problem = first_message(problem, self.world.device)
        if problem:
            self.report.event(0, "bad checkpoint", f"{path} is passed over: {problem}")
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
            " Training goes on; the checkpoints before it are valid",
        )
