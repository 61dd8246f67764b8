"""Starts a new run from weights of another one (the section ``init``).

Each rank reads only the ranges of the parameters that it holds, at every ZeRO stage. A parameter that the source does
not have keeps the value that the network was built with: text branches and modulations are then zero, so that a new
block, or a new text branch, changes nothing at first.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dico_t2i.config import Config, ConfigError, DiCoConfig, InitConfig, NetworkConfig
from dico_t2i.models import build_network
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.folder import RunFolder
from dico_t2i.runs.kinds import MOMENTS, WEIGHT
from dico_t2i.runs.lineage import Lineage, ancestor, descended
from dico_t2i.training.adapted import find_base
from dico_t2i.training.ranks.distributed import World, first_message
from dico_t2i.training.source import Shape, Source, open_source

if TYPE_CHECKING:
    from dico_t2i.training.engine import Engine

_TABLE, _TIME = "condition_embeddings.{}.weight", "time_embeddings.{}.out.bias"
_IMAGE_CHANNELS = ("stem.weight", "head.out.weight", "head.out.bias")


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

    def __str__(self) -> str:
        counts = f"{len(self.copied)} parameters loaded, {len(self.widened)} widened, {len(self.fresh)} not loaded"
        return counts + ("; it starts as the unconditional class model" if self.unconditional else "")


@dataclass(frozen=True)
class Initial:
    """A source and how it fits a network, ready to be loaded."""

    source: Source
    fit: Fit
    model: NetworkConfig

    def load(self, engine: "Engine", world: World) -> Lineage:
        """Fill an engine whose state is materialized, and return the lineage of its weights; collective.

        Only rank 0 computes the hash in the lineage. Raises CheckpointError on all ranks if a file of the source is
        damaged.
        """
        problem = ""
        try:
            self.source.verify(world.rank, world.size)
            self.fill(engine.pieces())
        except ckpt.CheckpointError as error:
            problem = str(error)
        problem = first_message(problem, world.device)
        if problem:
            raise ckpt.CheckpointError(problem)
        self.source.close()
        engine.publish_weights()
        digest = self.source.hash() if world.is_main else ""
        return descended(self.source.before, ancestor("init", self.source.name, digest, self.source.step))

    def fill(self, pieces: Iterable[ckpt.Piece]) -> None:
        """Fill the weights and the averages of pieces; what is not loaded is left as it is."""
        for piece in pieces:
            self._fill(piece)

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
        """Add the null class to a bias of the timestep embedding; a projection of the pooled text starts at 0."""
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

    None for a run that trains an adapter, too, since its base is no part of its checkpoints (see ``adapted``). shapes:
    those of the network. Raises ConfigError, with the keys, if the weights do not fit the network, and ValueError
    (CheckpointError) if they cannot be read.
    """
    if config.init is None or config.adapter or ckpt.ever_saved(run.checkpoints):
        return None
    source = open_source(config.init)
    own = {name: tuple(shape) for name, shape in shapes.items() if not name.startswith(f"{ckpt.PROJECTOR}.")}
    return Initial(source, fit(source, own, config.model, config.init), config.model)


def check_initial(config: Config, run: RunFolder) -> None:
    """Raise ValueError if the weights of ``init`` are missing or do not fit the network."""
    if config.adapter:
        find_base(config, _newest(run))
    elif config.init is not None:
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in build_network(config.model).named_parameters()}
        find_initial(config, run, shapes)


def _newest(run: RunFolder) -> ckpt.Checkpoint | None:
    try:
        return ckpt.newest_checkpoint(run.checkpoints)
    except ckpt.CheckpointError:  # none, or a damaged one, which resuming reports
        return None


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
            f"init.from: {source.name} does not fit this network. These keys differ:{''.join(lines)}\n"
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
