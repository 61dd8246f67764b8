"""Sends the numbers of a run to trackers: Weights & Biases and TensorBoard. See docs/tracking.md.

A tracker that fails is turned off with a message, and never stops training.
"""

import importlib.util
import json
import os
import sys
import uuid
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from dico_t2i.command import REQUEUE_EXIT_CODE
from dico_t2i.config import Config, ConfigError, dump_config
from dico_t2i.runs.checkpoint import CheckpointError, newest_checkpoint
from dico_t2i.runs.evaluations import read_evaluations
from dico_t2i.runs.folder import MANIFEST

_ALERTS = ("rollback", "failed", "hang", "save failed", "bad checkpoint")
_ROUTINE = ("saved", "samples")
_EXIT_CODES = {"done": 0, "stop": REQUEUE_EXIT_CODE, "failed": 1}


class Tracker(Protocol):
    """A destination of numbers, images and events. Its methods may raise any exception."""

    name: str

    def log(self, step: int, values: dict[str, Any]) -> None: ...

    def image(self, step: int, path: Path) -> None: ...

    def event(self, step: int, kind: str, message: str, details: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


def check_tracking(config: Config) -> None:
    """Raise ConfigError if a package that the config needs is missing."""
    if config.log.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "log.tensorboard: the package tensorboard is not installed; pip install 'dico_t2i[tensorboard]',"
            " or set it to false"
        )


class Tracking:
    """All trackers that a config selects; a failure of one does not affect the others."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._trackers: list[Tracker] = []
        if config.log.wandb != "disabled":
            self._guard("wandb", lambda: self._trackers.append(WandbRun(config, folder)))
        if config.log.tensorboard:
            self._guard("tensorboard", lambda: self._trackers.append(TensorBoardRun(config, folder)))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log numbers."""
        self._each(lambda tracker: tracker.log(step, values))

    def image(self, step: int, path: Path) -> None:
        """Log an image that was saved in the run folder."""
        self._each(lambda tracker: tracker.image(step, path))

    def event(self, step: int, kind: str, message: str, details: dict[str, Any]) -> None:
        """Log an event of metrics.jsonl."""
        self._each(lambda tracker: tracker.event(step, kind, message, details))

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, work: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            if not self._guard(tracker.name, partial(work, tracker)):
                self._trackers.remove(tracker)

    @staticmethod
    def _guard(name: str, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:
            print(f"{name} failed and is turned off: {error}", file=sys.stderr)
            return False
        return True


class WandbRun:
    """A run of Weights & Biases, which is resumed under the same id and grouped with its evaluations."""

    name = "wandb"

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder, self._exit_code = config, folder, 1
        self._run = _open_wandb(config, folder)
        started = _newest_start(folder)
        content = config.model_dump(mode="json", exclude_none=True)
        self._run.config.update({**content, "start": started}, allow_val_change=True)
        for file in (folder / "starts").glob("*"):
            self._run.save(str(file), base_path=str(folder), policy="now")

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._run.log(values, step=step)

    def image(self, step: int, path: Path) -> None:
        import wandb

        self._run.log({"samples": wandb.Image(str(path), caption=f"step {step}")}, step=step)

    def event(self, step: int, kind: str, message: str, details: dict[str, Any]) -> None:

        self._exit_code = _EXIT_CODES.get(kind, self._exit_code)
        if kind == "start":
            self._run.config.update(details, allow_val_change=True)
        if kind == "stop":
            self._run.mark_preempting()  # with the exit code, wandb shows the run as preempted and not as crashed
        if kind in _ALERTS:
            self._run.alert(f"{kind} at step {step}", f"{self._config.name}: {message}", "ERROR")

    def finish(self) -> None:
        if self._config.log.wandb_artifacts:
            self._log_manifest()
        self._run.finish(exit_code=self._exit_code)

    def _log_manifest(self) -> None:
        """Upload the manifest of the newest checkpoint and its path, but not the weights."""
        import wandb

        try:
            checkpoint = newest_checkpoint(self._folder / "checkpoints")
        except CheckpointError:
            return
        where = {"step": checkpoint.step, "folder": str(checkpoint.path.absolute())}
        artifact = wandb.Artifact(f"{self._config.name}-checkpoint", type="checkpoint", metadata=where)
        artifact.add_file(str(checkpoint.path / MANIFEST))
        artifact.add_file(str(self._folder / "config.yaml"))
        self._run.log_artifact(artifact, aliases=["latest", f"step-{checkpoint.step}"])


class TensorBoardRun:
    """Event files in runs/<name>/tensorboard/."""

    name = "tensorboard"

    def __init__(self, config: Config, folder: Path) -> None:
        self._folder = folder / "tensorboard"
        self._writer = self._open(None)
        self._writer.add_text("config", f"```yaml\n{dump_config(config)}```")

    def log(self, step: int, values: dict[str, Any]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def image(self, step: int, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def event(self, step: int, kind: str, message: str, details: dict[str, Any]) -> None:
        if kind in ("start", "rollback"):
            self._writer.close()
            self._writer = self._open(step + 1)
        if kind not in _ROUTINE:
            self._writer.add_text(f"event/{kind}", message, step)

    def finish(self) -> None:
        self._writer.close()

    def _open(self, void_from: int | None) -> Any:
        """void_from: values logged from this step on are hidden, because the run has returned to an earlier step."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._folder), purge_step=void_from)


def log_evaluation(config: Config, folder: Path, result: dict[str, Any], picture: Path | None) -> None:
    """Send a result of ``evals/`` to wandb, if the training run is logged there.

    It goes to a separate run, "<id>-evals", since two writers of one run lose each other's steps. Numbers and examples
    are curves over checkpoint_step, and one table holds all results of the run folder so far.
    """
    if config.log.wandb == "disabled" or not (folder / "wandb_id").exists():
        return
    try:
        import wandb

        run = _open_wandb(config, folder, "-evals")
        run.define_metric("checkpoint_step")
        run.define_metric("*", step_metric="checkpoint_step")
        prefix = result["protocol"]["name"]
        values = {f"{prefix}/{name}": value for name, value in result["numbers"].items()}
        if picture is not None:
            values[f"{prefix}/examples"] = wandb.Image(str(picture))
        run.log({"checkpoint_step": result["step"], **values, "evaluations": _evaluation_table(folder)})
        run.summary[f"{prefix}/hash"] = result["protocol_hash"]
        run.finish()
    except Exception as error:  # a failure of wandb must not lose the evaluation
        print(f"wandb: the evaluation was not logged: {error}", file=sys.stderr)


def _evaluation_table(folder: Path) -> Any:
    import wandb

    results = read_evaluations(folder)
    metrics = list(dict.fromkeys(name for result in results for name in result["numbers"]))
    rows = [
        [r["step"], r["protocol"]["name"], r["protocol_hash"], r["comparable"], *map(r["numbers"].get, metrics)]
        for r in results
    ]
    return wandb.Table(columns=["step", "protocol", "hash", "comparable", *metrics], data=rows)


def _open_wandb(config: Config, folder: Path, suffix: str = "") -> Any:
    """The wandb run of a run folder, new or resumed; a suffix selects a separate run beside it."""
    os.environ.setdefault("WANDB_SILENT", "true")  # its messages about its own files would only confuse
    import wandb

    identity = folder / "wandb_id"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:8])
    online = config.log.wandb == "online" or (config.log.wandb == "auto" and "WANDB_API_KEY" in os.environ)
    mode: Literal["online", "offline"] = "online" if online else "offline"
    return wandb.init(
        project=config.log.wandb_project,
        name=config.name + suffix,
        group=config.name,
        id=identity.read_text().strip() + suffix,
        resume="allow",
        dir=str(folder),
        mode=mode,
        settings=wandb.Settings(silent=True),
    )


def _newest_start(folder: Path) -> dict[str, Any]:
    """The record of the newest start, without the list of packages, which wandb collects itself."""
    found = sorted((folder / "starts").glob("*.json"))
    content: dict[str, Any] = json.loads(found[-1].read_text()) if found else {}
    return {key: value for key, value in content.items() if key != "packages"}
