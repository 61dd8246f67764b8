"""Starts a new run from the weights of a run, a checkpoint, an exported folder or a file (the section ``init``).

Each rank reads only the ranges of the parameters that it holds, at every ZeRO stage. A parameter that the source does
not have keeps the value that the network was built with: text branches and modulations are then zero, so that a new
block, or a new text branch, changes nothing at first.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from dico_t2i.config import Config, ConfigError, DiCoConfig, InitConfig, NetworkConfig, load_config
from dico_t2i.encoders.local import file_hash, read_json
from dico_t2i.models import build_network
from dico_t2i.models.official import infer_config, official_key, read_official
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.folder import RunFolder
from dico_t2i.runs.kinds import MOMENTS, WEIGHT
from dico_t2i.runs.weights import chosen_weights, exported_weights, locate_checkpoint
from dico_t2i.training.ranks.distributed import World, first_message

if TYPE_CHECKING:
    from dico_t2i.training.engine import Engine

KEY = "init"  # the key of the source's record in checkpoints, exports and events
RAW = "raw"  # the config's name of the weights themselves

_RELEASED = "x_embedder.proj.weight"  # a key that only a released DiCo or DiT has
_TABLE, _TIME = "condition_embeddings.{}.weight", "time_embeddings.{}.out.bias"
_IMAGE_CHANNELS = ("stem.weight", "head.out.weight", "head.out.bias")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    record: what the run remembers of them, besides hash(), their SHA-256. read(name, start, target) fills target (numel,) with the elements of a
    parameter from ``start`` on. verify(rank, ranks) raises CheckpointError if a rank's share of the files is damaged.
    close() closes the files.
    """

    record: dict[str, Any]
    shapes: dict[str, Shape]
    model: NetworkConfig | None
    read: Callable[[str, int, Tensor], None]
    hash: Callable[[], str]
    verify: Callable[[int, int], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class Fit:
    """How a source's parameters become those of a network.

    copied: loaded unchanged. widened: loaded as far as the source's image channels go, and 0 in the other channels.
    fresh: not loaded. unconditional: the source's null class is added to the timestep embedding, since the network has
    no classes, and the new projection of the pooled text starts at 0.
    """

    copied: frozenset[str]
    widened: frozenset[str]
    fresh: frozenset[str]
    unconditional: bool


@dataclass(frozen=True)
class Initial:
    """A source and how it fits a network, ready to be loaded."""

    source: Source
    fit: Fit
    model: NetworkConfig

    def load(self, engine: "Engine", world: World) -> dict[str, Any]:
        """Fill the weights and averages of an engine whose state is materialized, and return the record; collective.

        Only rank 0 computes the hash in the record. Raises CheckpointError on all ranks if a file of the source is
        damaged.
        """
        problem = ""
        try:
            self.source.verify(world.rank, world.size)
        except ckpt.CheckpointError as error:
            problem = str(error)
        problem = first_message(problem, world.device)
        if problem:
            raise ckpt.CheckpointError(problem)
        for piece in engine.pieces():
            self._fill(piece)
        self.source.close()
        engine.publish_weights()
        return {**self.source.record, **({"sha256": self.source.hash()} if world.is_main else {})}

    def _fill(self, piece: ckpt.Piece) -> None:
        weight, start = piece.tensors[WEIGHT], piece.start
        if piece.name in self.fit.copied:
            self.source.read(piece.name, start, weight)
        elif piece.name in self.fit.widened:
            weight.copy_(self._widened(piece.name).view(-1)[start : start + piece.numel])
        if self.fit.unconditional:
            self._without_classes(piece)
        for kind, tensor in piece.tensors.items():
            if kind not in (WEIGHT, *MOMENTS):
                tensor.copy_(weight)

    def _without_classes(self, piece: ckpt.Piece) -> None:
        """Add the null class to a bias of the timestep embedding, and let a projection of the pooled text start at 0."""
        kind, _, rest = piece.name.partition(".")
        level = rest.partition(".")[0]
        if kind == "condition_embeddings":
            piece.tensors[WEIGHT].zero_()
        elif piece.name == _TIME.format(level):
            classes, width = self.source.shapes[_TABLE.format(level)]
            null = torch.empty(piece.numel)
            self.source.read(_TABLE.format(level), (classes - 1) * width + piece.start, null)
            piece.tensors[WEIGHT].add_(null.to(piece.tensors[WEIGHT].device))

    def _widened(self, name: str) -> Tensor:
        """The source's parameter with zeros for the new image channels; head.out has the noise, then the variance."""
        shape = self.source.shapes[name]
        theirs = torch.empty(shape)
        self.source.read(name, 0, theirs.view(-1))
        old, new = self.source.shapes["stem.weight"][1], self.model.in_channels
        if name == "stem.weight":
            return torch.cat((theirs, theirs.new_zeros(shape[0], new - old, *shape[2:])), dim=1)
        parts = theirs.view(-1, old, *shape[1:])
        return torch.cat((parts, parts.new_zeros(len(parts), new - old, *shape[1:])), dim=1).flatten(0, 1)


def find_initial(config: Config, run: RunFolder, shapes: Mapping[str, Sequence[int]]) -> Initial | None:
    """The weights that a run starts from; None without ``init``, or if the run has a checkpoint of its own.

    shapes: those of the network. Raises ConfigError, with the keys, if the weights do not fit the network, and
    ValueError (CheckpointError) if they cannot be read.
    """
    if config.init is None or ckpt.ever_saved(run.checkpoints):
        return None
    source = open_source(config.init)
    own = {name: tuple(shape) for name, shape in shapes.items() if not name.startswith(f"{ckpt.PROJECTOR}.")}
    return Initial(source, fit(source, own, config.model, config.init), config.model)


def check_initial(config: Config, run: RunFolder) -> None:
    """Raise ValueError if the weights of ``init`` are missing or do not fit the network."""
    if config.init is not None:
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in build_network(config.model).named_parameters()}
        find_initial(config, run, shapes)


def open_source(init: InitConfig) -> Source:
    """Open the weights that ``init`` names, without reading them. Raises ValueError (CheckpointError, ConfigError)."""
    path = Path(init.from_).expanduser()
    if path.is_file() and path.parent.name != "checkpoints":
        return _file(path, init, {}, None)
    try:
        file = exported_weights(path)
        if file is None:
            return _checkpoint(path, init)
    except ValueError as error:
        raise ConfigError(f"init.from: {error}") from None
    origin = read_json(path / "export.json") if (path / "export.json").exists() else {}
    known = {key: origin[key] for key in ("run", "step", "weights", KEY) if key in origin}
    return _file(file, init, known, load_config(path / "config.yaml").model)


def fit(source: Source, shapes: Mapping[str, Shape], model: NetworkConfig, init: InitConfig) -> Fit:
    """How the source becomes a network with these shapes. Raises ConfigError that lists all keys that do not fit."""
    theirs = source.shapes
    missing, left = shapes.keys() - theirs.keys(), theirs.keys() - shapes.keys()
    other = {name for name in shapes.keys() & theirs.keys() if shapes[name] != theirs[name]}
    shown = {
        "missing there": [name for name in missing if not _ignored(name, init)],
        "left over": [name for name in left if not _ignored(name, init)],
        "of another shape": [name for name in other if not _ignored(name, init)],
    }
    if any(shown.values()):
        lines = [f"\n  {what}: {_grouped(names)}" for what, names in shown.items() if names]
        raise ConfigError(
            f"init.from: {source.record['from']} does not fit this network. These keys differ:{''.join(lines)}\n"
            "Change the model, or name the keys that may differ in init.ignore: what is missing then keeps its initial"
            " values, and what is left over is dropped"
        )
    widened = {name for name in other if _is_widened(name, shapes[name], source, model)}
    return Fit(
        copied=frozenset(shapes.keys() - missing - other),
        widened=frozenset(widened),
        fresh=frozenset((missing | other) - widened),
        unconditional=_has_null_class(source) and model.condition == "text",
    )


def _checkpoint(path: Path, init: InitConfig) -> Source:
    run, checkpoint = locate_checkpoint(path)
    config = load_config(run / "config.yaml")
    kind = chosen_weights(WEIGHT if init.weights == RAW else init.weights, config, checkpoint)
    before = {KEY: checkpoint.state[KEY]} if checkpoint.state.get(KEY) else {}
    shards = ckpt.Shards(checkpoint)
    return Source(
        record={
            "from": str(checkpoint.path),
            "run": config.name,
            "step": checkpoint.step,
            "weights": kind,
            **before,
        },
        shapes=checkpoint.network_shapes,
        model=config.model,
        read=lambda name, start, target: shards.read(kind, name, start, target),
        hash=lambda: checkpoint.sha256,
        verify=lambda rank, ranks: ckpt.verify(checkpoint, sorted(checkpoint.files)[rank::ranks]),
        close=shards.close,
    )


def _file(path: Path, init: InitConfig, known: Mapping[str, Any], model: NetworkConfig | None) -> Source:
    """Weights in one file, with the names of this package or of the released DiCo."""
    if init.weights not in (None, known.get("weights")):
        held = f"only {known['weights']}" if "weights" in known else "one set of weights"
        raise ConfigError(f"init.weights: {init.weights}, but {init.from_} holds {held}; leave init.weights out")
    tensors = _Tensors(path)
    shapes, key_of = tensors.shapes, dict(zip(tensors.shapes, tensors.shapes, strict=True))
    if _RELEASED in shapes:
        model, shapes, key_of = _released(tensors, path)
    return Source(
        record={"from": init.from_, **known},
        shapes=shapes,
        model=model,
        read=lambda name, start, target: tensors.read(key_of[name], start, target),
        hash=lambda: file_hash(path),
        verify=lambda rank, ranks: None,
        close=tensors.close,
    )


def _released(tensors: "_Tensors", path: Path) -> tuple[NetworkConfig, dict[str, Shape], dict[str, str]]:
    """The network of a released DiCo, its shapes, and the file's key of each of its parameters."""
    try:
        model = infer_config({key: torch.empty(shape, device="meta") for key, shape in tensors.shapes.items()})
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in build_network(model).named_parameters()}
        keys = {name: official_key(name) for name in shapes}
        absent = set(keys.values()) - tensors.shapes.keys()
    except ValueError:
        absent = {"the parameters of DiCo"}
    if absent:
        raise ConfigError(
            f"init.from: {path} is not a released DiCo (it lacks {', '.join(sorted(absent)[:3])}); convert the weights"
            " of a peer with dico import-official, and give the folder that it writes"
        )
    return model, shapes, keys


class _Tensors:
    """The tensors of a file of weights, of which ranges are read. No code in the file is executed."""

    def __init__(self, path: Path) -> None:
        self._file: Any = None
        self._whole: dict[str, Tensor] = {}
        if path.suffix == ".safetensors":
            try:
                self._file = safe_open(path, framework="pt")
            except Exception as error:
                raise ConfigError(f"init.from: {path}: not a safetensors file: {error}") from None
            self.shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in self._file.keys()}  # noqa: SIM118
        else:
            self._whole = read_official(path)  # memory-mapped
            self.shapes = {key: tuple(tensor.shape) for key, tensor in self._whole.items()}

    def read(self, key: str, start: int, target: Tensor) -> None:
        """Fill target (numel,) with the tensor's elements from ``start`` on."""
        stop = start + target.numel()
        if key in self._whole:
            target.copy_(self._whole[key].reshape(-1)[start:stop])
            return
        if not self.shapes[key]:
            target.copy_(self._file.get_tensor(key).view(1))
            return
        row = torch.Size(self.shapes[key][1:]).numel()  # elements of each row
        first, last = start // row, -(-stop // row)
        part = self._file.get_slice(key)[first:last].reshape(-1)
        target.copy_(part[start - first * row : stop - first * row])

    def close(self) -> None:
        self._file, self._whole = None, {}


def _ignored(name: str, init: InitConfig) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in init.ignore)


def _grouped(names: Iterable[str]) -> str:
    """The names as patterns, with a star for each number, and how many names each stands for."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in sorted(names))
    return ", ".join(pattern if count == 1 else f"{pattern} ({count})" for pattern, count in counts.items())


def _is_widened(name: str, shape: Shape, source: Source, model: NetworkConfig) -> bool:
    """Whether a parameter differs from the source's only by more image channels; for DiCo's U-shape."""
    old = source.model
    if not isinstance(model, DiCoConfig) or model.layout != "u" or not isinstance(old, DiCoConfig):
        return False
    grown = model.in_channels > old.in_channels and model.learn_sigma == old.learn_sigma
    axis = 1 if name == "stem.weight" else 0
    same = (
        tuple(source.shapes[name][:axis]) + tuple(source.shapes[name][axis + 1 :]) == shape[:axis] + shape[axis + 1 :]
    )
    return name in _IMAGE_CHANNELS and grown and same


def _has_null_class(source: Source) -> bool:
    model = source.model
    return isinstance(model, DiCoConfig) and model.condition == "class" and model.dropout_prob > 0
