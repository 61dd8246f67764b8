"""An evaluation protocol: everything that a number depends on except the checkpoint, and its hash.

The files are in evals/quality/protocols/. A value may be changed on the command line; the result is then named
``<protocol>+changes``, has a different hash, and is marked as not comparable.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import Field, model_validator

from dico_t2i.config import ConfigError, NonNegative, Positive, SamplerConfig, Section, Text, load_section
from evals.quality.features import Models
from evals.quality.metrics import METRICS

FOLDER = Path(__file__).resolve().parent / "protocols"

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[tuple(METRICS)]
Resize = Literal["clean", "legacy_tensorflow", "legacy_pytorch"]

STATE_DICT: Final = "pt_inception-2015-12-05-6726825d.pth"
TORCHSCRIPT: Final = "inception-2015-12-05.pt"


class Prompts(Section):
    """What is sampled. ``evals.quality.captions`` and ``evals.imagenet_fid`` describe the rules."""

    # drawn: images and captions by keyed hashes of their ids; in_order: images by id, captions as drawn;
    # uniform: classes at random.
    rule: Literal["drawn", "in_order", "uniform"]
    count: Positive  # number of samples
    seed: NonNegative = 0
    annotated_images: Positive | None = None  # in the annotation file; a different number means a different split
    classes: Positive | None = None  # for rule: uniform

    @model_validator(mode="after")
    def _uniform_over_classes(self) -> "Prompts":
        if (self.rule == "uniform") != (self.classes is not None):
            raise ValueError("classes: required with rule: uniform, and not allowed with any other")
        return self


class ReferenceSet(Section):
    """The images to compare with."""

    images: Literal["all", "drawn", "given"]  # all annotated images, those of the prompts, a folder or npz
    # for image files: centre square by Lanczos, or ADM's (halved by box filter, then bicubic), or as they are
    crop: Literal["center", "adm", "none"]
    manifold: Positive | None = None  # number of these images for precision, recall and KID; none: all


class Extractor(Section):
    """The network whose features are compared. Each file holds the same FID Inception of 2015-12-05."""

    file: Literal["pt_inception-2015-12-05-6726825d.pth", "inception-2015-12-05.pt"] = STATE_DICT
    sha256: Text | None = None  # its first digits; none: unknown to this project, but recorded with each result
    resize: Resize  # to 299 x 299, and with it the scale of pixel values; names are clean-fid's

    @model_validator(mode="after")
    def _scripted_has_clean_fids_scale(self) -> "Extractor":
        if self.file == TORCHSCRIPT and self.resize == "legacy_pytorch":
            raise ValueError(f"resize: legacy_pytorch requires {STATE_DICT}, as in clean-fid")
        return self


class Scoring(Models):
    """The metrics and their settings."""

    metrics: tuple[MetricName, ...]
    neighbours: Positive = 3  # of precision and recall
    splits: Positive = 10  # of the Inception Score
    kid_subsets: Positive = 100
    kid_subset_size: Positive = 1000


class Protocol(Section):
    """A protocol; evals/quality/protocols/ contains the known ones."""

    name: Text
    about: Text = Field(description="for people; not part of the hash")
    image_size: Positive
    prompts: Prompts
    reference: ReferenceSet
    extractor: Extractor
    sampler: SamplerConfig
    weights: Literal["ema", "weight"] = "ema"  # ema: the first average of the run's config
    precision: Literal["tf32", "fp32", "bf16"] = "tf32"  # of network and decoder; tf32 is fp32 on a CPU
    # 127.5 x + 128, clamped to 0..255 and truncated, which is 127.5 (x + 1) rounded; PNG files hold the same bytes.
    quantisation: Literal["round"] = "round"
    seed: NonNegative = 0  # image i is sampled with seed + i
    chunk: Positive = 32  # images that are computed together, which affects the last bits, see docs/evaluation.md
    scoring: Scoring

    def content(self) -> dict[str, Any]:
        """All values except the description."""
        return self.model_dump(mode="json", exclude={"about"})

    def hash(self) -> str:
        """sha256 of the content; 16 hex digits."""
        return digest(self.content())


def digest(content: Any) -> str:
    """sha256 of canonical JSON, 16 hex digits."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str, changes: Sequence[str] = ()) -> Protocol:
    """Load a protocol by its name; ``key.path=value`` changes make it ``<name>+changes`` if they change anything.

    Raises ConfigError for an unknown name, key or value.
    """
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        raise ConfigError(f"--protocol {name}: unknown; known protocols: {', '.join(names())}")
    original = load_section(path, Protocol)
    changed = load_section(path, Protocol, changes)
    if changed.name != original.name or original.name != name:
        raise ConfigError(f"{path}: the name must be that of the file and cannot be changed")
    if changed.content() == original.content():
        return original
    return changed.model_copy(update={"name": f"{name}+changes"})


def changes_of(protocol: Protocol) -> list[str]:
    """The differences from the protocol that it is named after, one line for each key."""
    original = _flat(load_protocol(protocol.name.removesuffix("+changes")).content())
    mine = _flat(protocol.content())
    return [
        f"{key}: {original[key]!r} -> {mine[key]!r}" for key in mine if key != "name" and mine[key] != original[key]
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
