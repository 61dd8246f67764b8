"""Reads everything that a report shows of a run folder."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from dico_t2i.config import flatten, read_yaml
from dico_t2i.report.history import History, read_history
from dico_t2i.runs.evaluations import read_evaluations
from dico_t2i.runs.lineage import Lineage, read_lineage
from dico_t2i.text_lines import read_text

PICTURES = 40  # most sample grids of a run
_WIDTH = 1024  # largest width of a grid in pixels


@dataclass(frozen=True)
class Picture:
    """A grid of samples, ready to be put into a page."""

    step: int
    width: int
    height: int
    source: str  # a data: URL


@dataclass(frozen=True)
class Record:
    """The content of a run folder."""

    name: str
    path: Path
    config: dict[str, Any]  # "key.path" -> value
    history: History
    starts: list[dict[str, Any]]
    pictures: list[Picture]
    evaluations: list[dict[str, Any]]
    lineage: Lineage

    @property
    def batch(self) -> int:
        """Images per step; 1 if the config does not say."""
        batch = self.config.get("train.global_batch", 1)
        return batch if isinstance(batch, int) else 1


def read_record(path: Path) -> Record:
    """Read a run folder. Raises ValueError if it is not one."""
    config = _read_config(path)
    return Record(
        name=str(config.get("name", path.name)),
        path=path,
        config=config,
        history=read_history(path),
        starts=_read_starts(path / "starts"),
        pictures=_read_pictures(path / "samples"),
        evaluations=read_evaluations(path),
        lineage=read_lineage(path),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """The config as written, without validation, so that runs of other versions of the code can be shown."""
    file = path / "config.yaml"
    try:
        tree = read_yaml(read_text(file))
    except FileNotFoundError:
        raise ValueError(f"{path}: not a run folder (no config.yaml); give runs/NAME") from None
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read: {error}") from None
    if not isinstance(tree, Mapping):
        raise ValueError(f"{file}: a config must be a mapping, found {type(tree).__name__}")
    return flatten(tree)


def _read_starts(folder: Path) -> list[dict[str, Any]]:
    """The records of starts, oldest first; files that cannot be read are skipped."""
    starts = []
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            starts.append(content)
    return starts


def _read_pictures(folder: Path) -> list[Picture]:
    """The sample grids, oldest first; an even selection if there are many. Files that cannot be read are skipped."""
    files = sorted(file for file in folder.glob("step-*.png") if file.stem.removeprefix("step-").isdecimal())
    if len(files) > PICTURES:
        files = [files[round(i * (len(files) - 1) / (PICTURES - 1))] for i in range(PICTURES)]
    return [picture for file in files if (picture := _read_picture(file)) is not None]


def _read_picture(file: Path) -> Picture | None:
    buffer = io.BytesIO()
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    image.thumbnail((_WIDTH, 4 * _WIDTH), Image.Resampling.LANCZOS)
    image.save(buffer, "WEBP", quality=88)
    source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Picture(int(file.stem.removeprefix("step-")), *image.size, source)
