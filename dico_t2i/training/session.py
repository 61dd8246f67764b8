"""What all stages of one start of a run share: the run folder, the ranks, the stop flag and the report."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dico_t2i.config import Config
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.folder import RunFolder
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.observers.snapshot import write_snapshot
from dico_t2i.training.ranks.distributed import World, first_message
from dico_t2i.training.ranks.signals import StopFlag


class Session:
    """One start of a run on one rank. The report opens when the parts of the first stage are built."""

    def __init__(self, config: Config, run: RunFolder, world: World, changes: Sequence[str] = ()) -> None:
        """config: of the whole run. changes: those of the config since the last start, to be reported."""
        self.config, self.run, self.world = config, run, world
        self.stop = StopFlag()
        self.stop.install()
        self.announced = False  # whether the start was reported
        self._report: Reporter | None = None
        self._waiting: list[tuple[int, str, str, dict[str, Any]]] = []
        for line in changes:
            self.event(0, "config", f"changed since the last start: {line}")

    def __enter__(self) -> "Session":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the report."""
        if self._report is not None:
            self._report.close()
            self._report = None

    def open(self, total_steps: int) -> Reporter:
        """The report. The first call, after all checks, also records how the run was started."""
        if self._report is None:
            if self.world.is_main:
                self.run.write_config(self.config)
                write_snapshot(self.run.starts, self.world)
            self._report = Reporter(self.config, self.run.path, total_steps, self.world.is_main)
            for step, kind, message, details in self._waiting:
                self._report.event(step, kind, message, **details)
        return self._report

    def event(self, step: int, kind: str, message: str, **details: Any) -> None:
        """Report an event, or keep it until the report opens."""
        if self._report is None:
            self._waiting.append((step, kind, message, details))
        else:
            self._report.event(step, kind, message, **details)

    def note_resume(self, checkpoint: ckpt.Checkpoint) -> None:
        """Report that the run continues from a checkpoint."""
        self.event(checkpoint.step, "resume", f"resumed from {checkpoint.path}", ranks=self.world.size)

    def newest_checkpoint(self) -> ckpt.Checkpoint | None:
        """The newest undamaged checkpoint; None if nothing was ever saved. Reports damaged ones; collective.

        Raises CheckpointError if all are damaged.
        """
        skipped = []
        for path in ckpt.candidates(self.run.checkpoints):
            checkpoint, problem = self._verified(path)
            if checkpoint is not None:
                return checkpoint
            skipped.append(f"{path} is skipped: {problem}")
            self.event(0, "bad checkpoint", skipped[-1])
        if ckpt.ever_saved(self.run.checkpoints):
            raise ckpt.CheckpointError(
                f"{self.run.checkpoints}: all {len(skipped)} checkpoints are damaged; restore one, or start a new run"
                " with a different name (name=...)\n" + "\n".join(skipped)
            )
        return None

    def _verified(self, path: Path) -> tuple[ckpt.Checkpoint | None, str]:
        """The checkpoint, after each rank has verified its share of the files; None, and why, if any is damaged."""
        problem, checkpoint = "", None
        try:
            checkpoint = ckpt.open_checkpoint(path)
            ckpt.verify(checkpoint, sorted(checkpoint.files)[self.world.rank :: self.world.size])
        except ckpt.CheckpointError as error:
            problem = str(error)
        problem = first_message(problem, self.world.device)
        return (None if problem else checkpoint), problem
