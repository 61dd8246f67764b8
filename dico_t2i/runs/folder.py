"""The run folder: its contents, its lock, and the changes of the config that it allows.

runs/<name>/
  config.yaml        the resolved config; earlier ones are kept as config.1.yaml, ...
  checkpoints/       see runs.checkpoint
  metrics.jsonl      one line for each report and event
  samples/           grids of samples made during training
  profile/           traces of some steps, with train.profile
  starts/            the command, commit, uncommitted changes, packages and machine of each start
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from dico_t2i.config import Config, ConfigError, dump_config, flatten, load_config

# Keys that must not change within a run, since the weights, the order of the data or the noise depend on them.
FIXED = (
    "seed",
    "model",
    "init",
    "diffusion",
    "autoencoder",
    "text_encoder",
    "alignment",
    "adapter",
    "data.image_size",
    "data.crop",
    "data.flip",
    "data.streams",
    "data.shuffle_block",
    "data.mixture",
    "data.buckets",
    "data.captions",
    "data.caption_weights",
    "optimizer.kind",
    "train.global_batch",
)
FREE_WITHIN_FIXED = (
    "model.checkpoint_stages",
    "text_encoder.remember",
    "init.from",
    "alignment.weight",
    "data.mixture.*.path",
)


LOCK = ".lock"
MANIFEST = "manifest.json"  # of a checkpoint, which is complete if it has this file
STAGE = "stage"  # the key in a manifest of the stage in which it was saved


class RunFolder:
    """The folder of one run."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.config = self.path / "config.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.quarantine = self.path / "quarantine.jsonl"
        self.samples = self.path / "samples"
        self.profile = self.path / "profile"
        self.starts = self.path / "starts"

    def changes(self, config: Config) -> list[str]:
        """The differences from the config of the run's last start, with one line for each key.

        A run without a checkpoint may change every key, and the name may always change, since a folder may be copied or
        renamed. Stages that have not begun may change, too. Raises ConfigError if a key must not change.
        """
        if not self.config.exists():
            return []
        old = load_config(self.config)
        begun = self._stages_begun(old)
        pairs = zip(old.stage_configs[:begun], config.stage_configs, strict=False)
        forbidden = [line for before, now in pairs for line in _differences(before, now, fixed=True)]
        forbidden += [f"stages: {begun} have begun"] if len(config.stage_configs) < begun else []
        if forbidden:
            shown = "\n  ".join(dict.fromkeys(forbidden))
            raise ConfigError(
                f"{self.path} holds a run with a different config; these keys cannot change within a run:\n  {shown}\n"
                "Give the new run a different name (name=...), or restore these keys to resume the old run"
            )
        return _differences(old, config)

    def _stages_begun(self, config: Config) -> int:
        """The number of stages in which the run has saved a checkpoint."""
        manifests = sorted(self.checkpoints.glob(f"step-*/{MANIFEST}"))
        names = [stage.name for stage in config.stages]
        try:
            name = json.loads(manifests[-1].read_text(encoding="utf-8"))[STAGE]["name"]
            return names.index(name) + 1
        except IndexError:
            return 0
        except (OSError, ValueError, KeyError, TypeError):  # a run without stages, or a damaged manifest
            return 1

    def write_config(self, config: Config) -> None:
        """Save the resolved config; an earlier, different one is kept under a number."""
        self.path.mkdir(parents=True, exist_ok=True)
        text = dump_config(config)
        if self.config.exists():
            if self.config.read_text() == text:
                return
            if load_config(self.config).name != config.name and (self.path / "wandb_id").exists():
                # The folder was copied or renamed: tracking must not continue the run of the old name.
                (self.path / "wandb_id").rename(self.path / "wandb_id.before")
            number = 1 + len(list(self.path.glob("config.*.yaml")))
            self.config.rename(self.path / f"config.{number}.yaml")
        temporary = self.path / ".config.yaml"
        temporary.write_text(text)
        temporary.replace(self.config)

    @contextmanager
    def locked(self, patience_s: float = 0.0) -> Iterator[None]:
        """Lock the folder for one job. Raises ConfigError, with the holder, if a different job holds it for longer.

        A folder that contains only the lock at the end is removed.
        """
        file = self._acquire(time.monotonic() + patience_s)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
        finally:
            if self.path.is_dir() and [path.name for path in self.path.iterdir()] == [LOCK]:
                (self.path / LOCK).unlink()
                self.path.rmdir()
            file.close()

    def _acquire(self, deadline: float) -> IO[str]:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("a+")
            if _lock(file) and _is_at(file, self.path / LOCK):
                return file
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{self.path}: in use by another job ({holder}); stop it, or give this run a different name"
                )
            time.sleep(0.5)


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one at this path, since its previous holder may have removed it."""
    return path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by data workers
    except OSError:
        return False
    return True


def _differences(old: Config, new: Config, fixed: bool = False) -> list[str]:
    """One line for each key that differs. fixed: only the keys that must not change within a run."""
    before, now = _flat(old), _flat(new)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if fixed:
        changed = [key for key in changed if _within(key, FIXED) and not _within(key, FREE_WITHIN_FIXED)]
    return [f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]


def _flat(config: Config) -> dict[str, Any]:
    return flatten(config.model_dump(mode="json", exclude_none=True))


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, section) or key.startswith(section + ".") for section in sections)
