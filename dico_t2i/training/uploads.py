"""Starts uploads of checkpoints, one at a time, and reports how they end."""

import json
import math
import shutil
import time
from collections.abc import Sequence

from dico_t2i.runs.checkpoint import CheckpointError, checkpoint_folders, folder_name, step_of
from dico_t2i.runs.folder import MANIFEST
from dico_t2i.training.checkpoint_writer import SHARD, CheckpointWriter
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.ranks.distributed import World, any_rank, first_message
from dico_t2i.training.retention import Retention
from dico_t2i.training.upload import Target, Upload

_PAUSE_S = 0.02  # between two looks at what runs in the background


class Uploads:
    """The uploads of a run's checkpoints. All ranks make the same calls in the same order."""

    def __init__(self, target: Target, world: World, report: Reporter, writer: CheckpointWriter) -> None:
        self.target, self.world, self.report, self.writer = target, world, report, writer
        self.current: Upload | None = None  # until its end was reported
        self.done = 0  # the step of the newest checkpoint whose copy is complete
        self._number = 0

    @property
    def steps(self) -> frozenset[int]:
        """The step of the checkpoint that is being uploaded, if there is one."""
        return frozenset() if self.current is None else frozenset({self.current.step})

    @property
    def ended(self) -> bool:
        """Whether this rank knows how the current upload has ended: rank 0, or one on which it failed."""
        upload = self.current
        return upload is not None and upload.ended.is_set() and (self.world.is_main or bool(upload.problem))

    def begin(self, step: int, retention: Retention) -> Upload | None:
        """The upload of a checkpoint that is saved now, to be started when this rank's part is on disk; collective.

        None if the one before is still uploaded. Ranks that do not see each other's files find them by their uploads,
        and so wait for the one before.
        """
        if not self.writer.shared:
            self._wait()
        if self.current is not None:
            message = f"checkpoint of step {step} is not uploaded, since that of step {self.current.step} still is"
            self.report.event(step, "upload", message)
            return None
        self.current = self._new(step, [SHARD.format(self.world.rank)], retention)
        return self.current

    def settle(self) -> None:
        """Report how the current upload ended, if it has; collective."""
        if self.current is None:
            return
        upload, device = self.current, self.world.device
        flags = [bool(upload.problem), not upload.ended.is_set(), upload.complete]
        failed, uploading, complete = any_rank(flags, device)
        if not failed and uploading:
            return
        why = first_message(upload.problem, device)
        self.abandon(upload.step)
        if complete:
            self.done = upload.step
            self.report.event(upload.step, "uploaded", f"checkpoint of step {upload.step} is complete at {upload.url}")
            self._drop_own_parts(upload.step)
        if why:
            self._failed(upload, why, complete)

    def abandon(self, step: int) -> None:
        """Give up the upload of a checkpoint if it is the current one."""
        if self.current is not None and self.current.step == step:
            self.current.abandoned.set()
            self.current = None

    def finish(self, step: int | None, retention: Retention, patience_s: float) -> None:
        """Wait for the current upload, for up to ``patience_s`` seconds; collective.

        step: of the newest checkpoint, which is uploaded now if it was saved while the one before was uploaded; None if
        it could not be saved.
        """
        deadline = time.monotonic() + patience_s
        tried = step in self.steps
        self._wait(deadline)
        if step and not tried and step != self.done and self.writer.shared:
            self.current = self._new(step, self._files(step), retention)
            self.current.start()
            self._wait(deadline)

    def _wait(self, deadline: float = math.inf) -> None:
        while self.current is not None:
            if not self.current.ended.is_set() and time.monotonic() > deadline:
                self.current.problem = "it was not complete when the job had to end"
            self.settle()
            time.sleep(_PAUSE_S)

    def _new(self, step: int, files: Sequence[str], retention: Retention) -> Upload:
        self._number += 1
        return Upload(self.target, step, files, self._number, retention)

    def _files(self, step: int) -> list[str]:
        """The files of a checkpoint that this rank uploads, whichever ranks wrote them."""
        manifest = json.loads((self.target.run.checkpoints / folder_name(step) / MANIFEST).read_text())
        return sorted(manifest["files"])[self.world.rank :: self.world.size]

    def _failed(self, upload: Upload, why: str, complete: bool) -> None:
        if not complete and not self.writer.shared and self.writer.busy:
            self.writer.error = CheckpointError(why)  # since rank 0 waits for parts that will not come
        what = "old checkpoints could not be deleted there" if complete else "this checkpoint was not uploaded"
        self.report.event(
            upload.step,
            "upload failed",
            f"WARNING: {upload.url}: {what}: {why}. The checkpoint on disk stays, and the next is uploaded as usual",
        )

    def _drop_own_parts(self, step: int) -> None:
        """Delete the parts of earlier checkpoints on a node that does not see rank 0's folder."""
        if self.writer.shared or self.world.is_main:
            return
        for path in checkpoint_folders(self.target.run.checkpoints):
            if step_of(path) < step and not (path / MANIFEST).exists():
                shutil.rmtree(path, ignore_errors=True)
