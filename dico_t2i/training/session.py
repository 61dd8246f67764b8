"""What all stages of one start of a run share: the run folder, the ranks, the stop flag and the report."""

import json
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dico_t2i.config import Config, ConfigError
from dico_t2i.remote import UrlError
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.copies import fetch, run_url
from dico_t2i.runs.folder import RunFolder
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.observers.snapshot import write_snapshot
from dico_t2i.training.ranks.distributed import World, any_rank, from_main
from dico_t2i.training.ranks.signals import StopFlag
from dico_t2i.training.upload import Target

_VISIBLE_S = 2.0  # for a new file of rank 0 to be seen by the other nodes


class Session:
    """One start of a run on one rank. The report opens when the parts of the first stage are built.

    shared: whether all ranks see the same run folder. copies: where its checkpoints are uploaded to, if anywhere.
    """

    def __init__(self, config: Config, run: RunFolder, world: World, changes: Sequence[str] = ()) -> None:
        """config: of the whole run. changes: those of the config since the last start, to be reported. Collective."""
        self.config, self.run, self.world = config, run, world
        self.shared, self.copies = True, None
        if config.checkpoint.path:
            token = from_main(secrets.token_hex(4), world.device)
            self.copies = Target(run, run_url(config.checkpoint.path, config.name), token, world.rank)
            self.shared = _is_shared(run, token, world)
        self._damaged: dict[Path, str] = {}
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
        """The newest checkpoint not known to be damaged; None if nothing was ever saved. Collective.

        Rank 0 chooses it, by its manifest and the sizes of its files, and reports those that it skips. What the files
        contain is compared when they are read. Raises CheckpointError on all ranks if all are damaged.
        """
        chosen = json.loads(from_main(json.dumps(self._choose()) if self.world.is_main else "", self.world.device))
        if chosen["error"]:
            raise ckpt.CheckpointError(chosen["error"])
        if chosen["name"] is None:
            return None
        return ckpt.parse_checkpoint(self.run.checkpoints / chosen["name"], chosen["manifest"], chosen["url"])

    def skip(self, checkpoint: ckpt.Checkpoint, problem: str) -> None:
        """Report a checkpoint whose content is damaged; ``newest_checkpoint`` chooses another one then."""
        self._skip(checkpoint.path, problem)

    def _skip(self, path: Path, problem: str) -> None:
        self._damaged[path] = f"{path} is skipped: {problem}"
        self.event(0, "bad checkpoint", self._damaged[path])

    def _choose(self) -> dict[str, str | None]:
        """The name, manifest and URL of the newest usable checkpoint, or the error to raise."""
        paths = ckpt.candidates(self.run.checkpoints)
        for path in (path for path in paths if path not in self._damaged):
            try:
                manifest, url = ckpt.read_manifest(path)
                ckpt.check_sizes(ckpt.parse_checkpoint(path, manifest, url))
                return {"error": "", "name": path.name, "manifest": manifest, "url": url}
            except (ckpt.CheckpointError, OSError) as error:
                self._skip(path, str(error))
        problem = ""
        if ckpt.ever_saved(self.run.checkpoints):
            problem = (
                f"{self.run.checkpoints}: all {len(paths)} checkpoints are damaged; restore one, or start a new run"
                " with a different name (name=...)\n" + "\n".join(self._damaged[path] for path in paths)
            )
        return {"error": problem, "name": None}


def fetch_copy(config: Config, run: RunFolder) -> str:
    """Bring what the run's folder lacks from the run's copy, if it has one; rank 0 does this before all else.

    Returns a warning if the copy cannot be reached but there is a checkpoint here. Raises ConfigError if there is none,
    since the run might begin anew otherwise.
    """
    if config.checkpoint.path is None:
        return ""
    url = run_url(config.checkpoint.path, config.name)
    try:
        fetch(run, url)
    except UrlError as error:
        raise ConfigError(f"checkpoint.path: {error}") from None
    except OSError as error:
        if ckpt.ever_saved(run.checkpoints):
            return f"WARNING: {url} cannot be read ({error}); this start continues from what is in {run.checkpoints}"
        raise ConfigError(
            f"checkpoint.path: {url} cannot be read: {error}. There is no checkpoint in {run.checkpoints}, so the run"
            " would begin anew; make the URL accessible, or leave checkpoint.path out"
        ) from None
    return ""


def _is_shared(run: RunFolder, token: str, world: World) -> bool:
    """Whether all ranks see the same run folder; collective."""
    file = run.path / f".shared-{token}"
    if world.is_main:
        file.touch()
    any_rank([False], world.device)  # waits for rank 0
    deadline = time.monotonic() + _VISIBLE_S
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    unseen = any_rank([not file.exists()], world.device)[0]
    if world.is_main:
        file.unlink()
    return not unseen
