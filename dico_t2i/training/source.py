"""Opens weights to start from: a run, a checkpoint, an exported folder, or a file of weights.

The last two may be on the hub or at a URL. Only the ranges that are asked for are read. No code in a file is executed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dico_t2i.config import ConfigError, InitConfig, NetworkConfig, load_config
from dico_t2i.encoders.local import file_hash
from dico_t2i.models import build_network
from dico_t2i.models.official import infer_config, official_key, read_official
from dico_t2i.runs import checkpoint as ckpt
from dico_t2i.runs.kinds import WEIGHT
from dico_t2i.runs.weights import chosen_weights, exported_weights, locate_checkpoint, trained_config
from dico_t2i.sampling.trained import RAW, export_record, init_kind, init_place, is_weights_file

_RELEASED = "x_embedder.proj.weight"  # a key that only a released DiCo or DiT has

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Weights to start from.

    name: their place and kind, for messages and the lineage. step: how many steps they were trained for, if that is
    known. before: the state of the checkpoint, or the content of export.json, which has their own lineage.
    read(name, start, target) fills target (numel,) with the elements of a parameter from ``start`` on. hash() is their
    SHA-256. verify(rank, ranks) raises CheckpointError if a rank's share of the files is damaged. close() closes the
    files.
    """

    name: str
    step: int | None
    before: Mapping[str, Any]
    shapes: dict[str, Shape]
    model: NetworkConfig | None
    read: Callable[[str, int, Tensor], None]
    hash: Callable[[], str]
    verify: Callable[[int, int], None]
    close: Callable[[], None]


def open_source(init: InitConfig) -> Source:
    """Open the weights that ``init`` names, without reading them. Raises ValueError (CheckpointError, ConfigError)."""
    path = init_place(init)
    if is_weights_file(path):
        return _file(path, init, {}, None)
    try:
        file = exported_weights(path)
        if file is None:
            return _checkpoint(path, init)
    except ValueError as error:
        raise ConfigError(f"init.from: {error}") from None
    return _file(file, init, export_record(path), load_config(path / "config.yaml").model)


def _checkpoint(path: Path, init: InitConfig) -> Source:
    run, checkpoint = locate_checkpoint(path)
    config = trained_config(run, checkpoint)
    kind = chosen_weights(init_kind(init), config, checkpoint)
    shards = ckpt.Shards(checkpoint)
    return Source(
        name=f"{init.from_} ({kind})",
        step=checkpoint.step,
        before=checkpoint.state,
        shapes=checkpoint.network_shapes,
        model=config.model,
        read=lambda name, start, target: shards.read(kind, name, start, target),
        hash=lambda: checkpoint.sha256,
        verify=lambda rank, ranks: ckpt.verify(checkpoint, sorted(checkpoint.files)[rank::ranks]),
        close=shards.close,
    )


def _file(path: Path, init: InitConfig, origin: Mapping[str, Any], model: NetworkConfig | None) -> Source:
    """Weights in one file, with the names of this package or of the released DiCo. origin: of an exported folder."""
    held = origin.get("weights")
    if init.weights not in (None, RAW if held == WEIGHT else held):
        holds = f"only {held}" if held else "one set of weights"
        raise ConfigError(f"init.weights: {init.weights}, but {init.from_} holds {holds}; leave init.weights out")
    tensors = _Tensors(path)
    shapes, key_of = tensors.shapes, dict(zip(tensors.shapes, tensors.shapes, strict=True))
    if _RELEASED in shapes:
        model, shapes, key_of = _released(tensors, path)
    return Source(
        name=f"{init.from_} ({held})" if held else init.from_,
        step=origin.get("step"),
        before=origin,
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
    """The tensors of a file of weights, of which ranges are read."""

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
