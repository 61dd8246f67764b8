"""Estimates what a run will need before it starts: memory, time, communication, data, checkpoints. No GPU is needed.

The network is traced on the meta device (``plan.trace``); to this come the tensors that DeepSpeed keeps and sends with
the settings of ``training.engine``. Time is a roofline: each operation takes as long as its arithmetic at the peak rate
of the device or its bytes at the rate of the memory, whichever is longer; to this comes the communication that is not
hidden behind computing (``plan.communication``). The time is a lower bound, since real kernels are slower, and loading
data and Python are assumed to cost no time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dico_t2i.config import Config, HardwareConfig, read_yaml
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.sources import load_data
from dico_t2i.encoders import MissingModelError, find_autoencoder
from dico_t2i.encoders.text import TowerSize, text_sizes
from dico_t2i.models import count_macs, count_parameters, count_scan_macs, count_trained, trained_sizes
from dico_t2i.plan.buffers import UNDIVIDED, bucket_size, gradient_bytes, overlaps
from dico_t2i.plan.communication import GATHERED, KEPT, Communication, buckets, communication, divided
from dico_t2i.plan.cost import StepCost, optimizer_traffic, rates, seconds, step_cost, traced_pass
from dico_t2i.plan.trace import Pass

CONTEXT_BYTES = 2e9  # assumed for CUDA, NCCL and the libraries' workspaces
USABLE = 0.95  # assumed share of memory that fragmentation leaves usable
_KNOWN_BYTES = {"stabilityai/sd-vae-ft-ema": 335e6}  # fp32
_CAPTION_BYTES = 500.0  # assumed captions and tar headers of a sample, if the data do not exist yet


@dataclass(frozen=True)
class Memory:
    """Bytes of one device at the moment of its highest use, in the backward pass or in the optimizer's step."""

    weights: float
    gradients: float
    master_weights: float
    moments: float
    averages: float
    communication: float
    encoders: float
    activations: float
    temporary: float
    context: float = CONTEXT_BYTES

    @property
    def tensors(self) -> float:
        """Everything except the context, as torch.cuda.max_memory_allocated reports it."""
        return self.total - self.context

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Estimate:
    """The memory and time of a config; times are seconds of a step.

    communication_s: the time that is not hidden behind computing.
    """

    memory: Memory
    fits: bool
    network_s: float
    text_encoder_s: float
    optimizer_s: float
    communication_s: float
    images_per_s: float

    @property
    def step_s(self) -> float:
        return self.network_s + self.text_encoder_s + self.optimizer_s + self.communication_s


@dataclass(frozen=True)
class Plan:
    """All estimates, in bytes, seconds and counts. Unknown values are None, for reasons given in ``notes``."""

    name: str
    hardware: HardwareConfig
    nodes: int
    ranks: int
    micro_batch: int
    accumulation: int
    zero_stage: int
    parameters: int
    macs_per_image: float  # forward
    scan_macs_per_image: float  # the part of them that belongs to recurrences along tokens
    flops_per_image: float  # forward and backward
    estimate: Estimate
    recomputing: Mapping[str, Estimate]  # the estimate with no stages or all stages recomputed
    communication: Mapping[int, Communication]  # by ZeRO stage
    sample_bytes: float | None
    checkpoint_bytes: float
    checkpoint_s: float
    steps: int | None
    remedies: Mapping[str, Estimate]  # overrides that make it fit -> their estimates
    notes: tuple[str, ...]

    @property
    def days(self) -> float | None:
        return self.steps * self.estimate.step_s / 86400 if self.steps else None

    @property
    def gpu_hours(self) -> float | None:
        return 24 * self.days * self.ranks if self.days else None


def make_plans(config: Config) -> list[Plan]:
    """Plan each stage of a run on its cluster; a run without stages has one plan. Raises as ``make_plan`` does."""
    stages = zip(config.stages, config.stage_configs, strict=False)
    plans = [replace(make_plan(own), name=f"{config.name}, stage {stage.name}") for stage, own in stages]
    return plans or [make_plan(config)]


def make_plan(config: Config) -> Plan:
    """Plan a run on its cluster. Raises ConfigError if the number of ranks does not divide the streams."""
    ranks = config.cluster.ranks
    micro, accumulation = config.batching(ranks)
    parameters = count_parameters(config.model)
    notes: list[str] = []
    index = _index(config, notes)
    traced = traced_pass(config, micro)
    found = estimate(config)
    if _encoder_bytes(config) is None:
        notes.append("the size of the frozen encoders is not known, so they are left out")
    if config.alignment:
        notes.append("alignment: its image encoder and its projector are left out")
    latents = (1, config.model.in_channels, config.latent_size, config.latent_size)
    if config.adapter:
        notes.append(f"adapter: {_trained(config):,} parameters are trained; the others stay as they are")
    checkpoint_bytes = 4.0 * (_trained(config) * (3 + len(config.optimizer.ema)) - _matrices(config))
    every = (("no stage", ()), ("all stages", config.model.stages))
    stages = {word: estimate(_with(config, {"model.checkpoint_stages": list(names)})) for word, names in every}
    return Plan(
        name=config.name,
        hardware=config.cluster.hardware,
        nodes=config.cluster.nodes,
        ranks=ranks,
        micro_batch=micro,
        accumulation=accumulation,
        zero_stage=config.train.zero_stage,
        parameters=parameters,
        macs_per_image=float(count_macs(config.model, latents)),
        scan_macs_per_image=float(count_scan_macs(config.model, latents)),
        flops_per_image=float((traced.products + traced.others).sum() / micro),
        estimate=found,
        recomputing=stages,
        communication={stage: communication(_at_stage(config, stage)) for stage in range(4)},
        sample_bytes=_sample_bytes(config, index),
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_s=checkpoint_bytes / config.cluster.nodes / (1e9 * config.cluster.hardware.disk_gb_s),
        steps=_steps(config, index, notes),
        remedies={} if found.fits else _remedies(config),
        notes=tuple(notes),
    )


def expected_step(config: Config, ranks: int, parameters: int) -> tuple[Mapping[str, float], StepCost]:
    """The bytes of a rank by part, which training reports beside the measured ones, and the cost of its step."""
    return _expected_memory(config, ranks), step_cost(config, ranks, parameters)


def _expected_memory(config: Config, ranks: int) -> Mapping[str, float]:
    tasks = {} if config.cluster.ranks == ranks else {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": ranks}
    here = config.model_copy(update={"cluster": config.cluster.model_copy(update=tasks)})
    memory = asdict(estimate(here).memory)
    kept = ("weights", "master_weights", "moments", "averages")
    rest = sum(size for part, size in memory.items() if part not in (*kept, "context"))
    return {**{part: memory[part] for part in kept}, "the rest": rest}


def estimate(config: Config) -> Estimate:
    """The memory and time of a config on its cluster."""
    ranks, hardware = config.cluster.ranks, config.cluster.hardware
    micro, accumulation = config.batching(ranks)
    traced = traced_pass(config, micro)
    memory = _memory(config, traced)
    network_s = accumulation * float(seconds(config, traced).sum())
    text_s = accumulation * micro * _text_flops(config) / rates(config)[0]
    optimizer_s = _optimizer_traffic(config) / (1e9 * hardware.memory_gb_s)
    communication_s = communication(config).exposed
    return Estimate(
        memory=memory,
        fits=memory.total <= USABLE * 1e9 * hardware.memory_gb,
        network_s=network_s,
        text_encoder_s=text_s,
        optimizer_s=optimizer_s,
        communication_s=communication_s,
        images_per_s=config.train.global_batch / (network_s + text_s + optimizer_s + communication_s),
    )


class _Moment(NamedTuple):
    """The bytes that are needed only at a moment within a step."""

    gradients: float
    communication: float
    activations: float
    temporary: float


class _Sharding(NamedTuple):
    """What decides which gradients a rank holds, and in what buffers it sends them. Numbers are of elements."""

    stage: int
    ranks: int
    parameters: int
    trained: int
    bucket: int  # of gradients that are sent together
    buffers: int  # of the size of a bucket: two where one is filled while the other is sent
    element_bytes: int
    again: bool  # gradients of earlier passes of the step are kept
    copied_weights: float  # at stage 3, a rank's part of the copy that train.zero_group keeps

    @property
    def part(self) -> float:
        """A rank's own gradients after their reduction."""
        return self.trained / self.ranks

    @property
    def copied(self) -> int:
        """The copy of a bucket that is sent; with one rank none is made."""
        return self.bucket if self.ranks > 1 else 0


def _sharding(config: Config) -> _Sharding:
    stage, ranks = config.train.zero_stage, config.cluster.ranks
    sizes = trained_sizes(config.model, config.adapter)
    element_bytes = gradient_bytes(config.train)
    return _Sharding(
        stage=stage,
        ranks=ranks,
        parameters=count_parameters(config.model) + (sum(sizes) if config.adapter else 0),
        trained=sum(sizes),
        bucket=bucket_size(sizes, element_bytes, config.cluster) if stage > 0 else min(UNDIVIDED, sum(sizes)),
        buffers=2 if overlaps(stage, ranks) and stage < 3 else 1,
        element_bytes=element_bytes,
        again=config.batching(ranks)[1] > 1,
        copied_weights=divided(config)[0] / config.train.zero_group if config.train.zero_group else 0.0,
    )


def _memory(config: Config, traced: Pass) -> Memory:
    """The memory of one device; tests/test_plan.py compares it with measurements of DeepSpeed."""
    sharding = _sharding(config)
    stage, trained, share = sharding.stage, sharding.trained, _share(config)
    return Memory(
        weights=sharding.element_bytes * sharding.parameters * (share if stage == 3 else 1),
        master_weights=4 * trained * share if stage > 0 else 0,
        moments=_moment_bytes(config) * share,
        averages=4 * trained * share * len(config.optimizer.ema),
        encoders=_encoder_bytes(config) or 0.0,
        **max(_last_pass(traced, sharding), _sending(sharding), _updating(sharding), key=sum)._asdict(),
    )


def _share(config: Config) -> float:
    """The share of the optimizer's state that a rank holds."""
    return 1 / config.cluster.ranks if config.train.zero_stage > 0 else 1.0


def _at_stage(config: Config, stage: int) -> Config:
    """The config with another ZeRO stage, although it may not train with it."""
    return config.model_copy(update={"train": config.train.model_copy(update={"zero_stage": stage})})


def _trained(config: Config) -> int:
    """The number of parameters that are trained."""
    return count_trained(config.model, config.adapter)


def _moment_bytes(config: Config) -> float:
    """Bytes of the moments of all weights that are trained; 8-bit ones have a scale for each block of 256."""
    if config.optimizer.kind == "adamw_8bit":
        return 2 * (1 + 4 / 256) * _trained(config)
    return 8 * _trained(config) - 4 * _matrices(config)


def _matrices(config: Config) -> int:
    """The number of parameters that Muon updates, which have one moment instead of two."""
    return count_trained(config.model, config.adapter, matrices=True) if config.optimizer.kind == "muon" else 0


def _last_pass(traced: Pass, sharding: _Sharding) -> _Moment:
    """The moment of highest use in the last pass of a step."""
    stage, ranks, again, bucket, part = (
        getattr(sharding, key) for key in ("stage", "ranks", "again", "bucket", "part")
    )
    none, begun = np.zeros_like(traced.live), traced.gradients > 0
    sent = np.zeros_like(begun)
    sent[[at for at, _ in buckets(traced, sharding.trained, bucket)[:-1]]] = True
    reduced = part * np.maximum.accumulate(sent)
    kept = sharding.trained if again else traced.gradients
    # With several ranks stage 1 takes each gradient over into a bucket, and frees it.
    taken = (sharding.trained - traced.gradients) * again + reduced if ranks > 1 else none + kept
    gradients = sharding.element_bytes * (none + kept, taken, part * again + reduced, none + part)[stage]
    filled, copied = sharding.buffers * bucket, sharding.copied * sent
    gathered = min(sharding.parameters, KEPT) + min(sharding.parameters, GATHERED) if ranks > 1 else 0
    kept_weights = gathered + sharding.copied_weights
    buffers = (none, filled * (begun | again) + copied, filled * begun + copied, filled + copied + kept_weights)[stage]
    buffers = sharding.element_bytes * buffers
    at = int((traced.live + gradients + buffers).argmax())
    activations = min(float(traced.live[at]), traced.activations)
    return _Moment(float(gradients[at]), float(buffers[at]), activations, float(traced.live[at]) - activations)


def _sending(sharding: _Sharding) -> _Moment:
    """The moment after the last pass, when the remaining gradients are sent."""
    whole, part, bucket = sharding.trained, sharding.part, sharding.bucket
    # One rank fills its buckets only now at stage 1, and frees the gradients that it has copied there.
    first = part if sharding.ranks > 1 else whole + part - bucket
    gradients = (whole, first, part * (1 + sharding.again), part)[sharding.stage]
    buffers = sharding.copied if sharding.stage == 0 else sharding.buffers * bucket + sharding.copied
    return _Moment(sharding.element_bytes * gradients, sharding.element_bytes * buffers, 0.0, 0.0)


def _updating(sharding: _Sharding) -> _Moment:
    """The optimizer's step, in which ZeRO copies a rank's gradients into one tensor and converts it to fp32."""
    size = sharding.element_bytes
    part = size * (sharding.part if sharding.stage > 0 else sharding.trained)
    copies = part + (4 * sharding.part if size < 4 else 0) if sharding.stage > 0 else 0.0
    return _Moment(part, size * sharding.bucket if sharding.stage == 3 else 0.0, 0.0, copies)


def _optimizer_traffic(config: Config) -> float:
    return _share(config) * optimizer_traffic(_trained(config), len(config.optimizer.ema))


def _remedies(config: Config) -> dict[str, Estimate]:
    """The smallest change of each kind that makes the run fit, with its estimate."""
    everything = _smaller(config, _recomputing(config.model.stages))
    kinds = (_recompute(config), _smaller(config), _sharded(config), _spread(config), everything)
    found = {}
    for changes in kinds:
        for change in changes:
            changed = estimate(_with(config, dict(line.split("=", 1) for line in change)))
            if changed.fits:
                found[" ".join(change)] = changed
                break
    return found


def _recomputing(stages: tuple[str, ...]) -> list[str]:
    return [f"model.checkpoint_stages=[{', '.join(stages)}]"]


def _recompute(config: Config) -> Iterator[list[str]]:
    for count in range(1, len(config.model.stages) + 1):
        yield _recomputing(config.model.stages[:count])


def _smaller(config: Config, more: list[str] | None = None) -> Iterator[list[str]]:
    micro, _ = config.batching(config.cluster.ranks)
    while micro > 1:
        micro = math.ceil(micro / 2)
        yield [f"train.micro_batch={micro}", *(more or [])]


def _sharded(config: Config) -> Iterator[list[str]]:
    for stage in range(config.train.zero_stage + 1, 4):
        yield [f"train.zero_stage={stage}"]


def _spread(config: Config) -> Iterator[list[str]]:
    """More nodes, as long as the number of ranks divides the streams."""
    nodes, ranks = 2 * config.cluster.nodes, config.cluster.ranks_per_node
    while config.data.streams % (nodes * ranks) == 0:
        yield [f"cluster.nodes={nodes}"]
        nodes *= 2


def _with(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with some keys changed, validated as a whole."""
    tree = config.model_dump(mode="json", exclude_none=True)
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = read_yaml(value) if isinstance(value, str) else value
    return Config.model_validate(tree)


def _encoder_bytes(config: Config) -> float | None:
    """Bytes of the frozen encoders in the dtype of training; None if an encoder is neither found nor known by name."""
    share = 0.5 if config.train.precision == "bf16" else 1.0
    try:
        autoencoder = sum(
            float(path.stat().st_size) for path in find_autoencoder(config.autoencoder) if path.suffix != ".json"
        )
    except MissingModelError:
        if config.autoencoder.path not in _KNOWN_BYTES:
            return None
        autoencoder = _KNOWN_BYTES[config.autoencoder.path]
    towers = _text_towers(config)
    if towers is None:
        return None
    return share * (autoencoder + 4 * sum(tower.layers + tower.table for tower in towers))


def _text_towers(config: Config) -> list[TowerSize] | None:
    """The sizes of the text encoders; None if one is neither found nor known by name."""
    try:
        return text_sizes(config.text_encoder) if config.model.condition == "text" else []
    except MissingModelError:
        return None


def _text_flops(config: Config) -> float:
    """FLOPs of the frozen text encoders for one caption: two for each weight of a layer and each token."""
    return sum(2.0 * tower.features.tokens * tower.layers for tower in _text_towers(config) or ())


def _index(config: Config, notes: list[str]) -> DatasetIndex | None:
    folders = [path for path in config.data.paths if "://" not in path]
    absent = [path for path in folders if not (Path(path) / "index.json").exists()]
    if absent:
        notes.append(f"{absent[0]}: there are no data yet; latents are assumed, and their size is estimated")
        return None
    index = load_data(config.data)
    if index.kind != "latents" and config.autoencoder.kind != "pixels":
        notes.append("raw images: the time of the autoencoder is not included; data_prep/latents.py avoids it")
    return index


def _sample_bytes(config: Config, index: DatasetIndex | None) -> float | None:
    if index:
        return float(index.bytes.sum()) / len(index)
    if config.autoencoder.kind == "pixels":
        return None
    return 2 * 2 * 2 * config.model.in_channels * config.latent_size**2 + _CAPTION_BYTES  # two mirror images, fp16


def _steps(config: Config, index: DatasetIndex | None, notes: list[str]) -> int | None:
    if config.train.duration.epochs is not None and index is None:
        notes.append("the duration is in epochs and there are no data yet: days and GPU-hours are unknown")
        return None
    return config.train.duration.in_steps(config.train.global_batch, len(index) if index else 0)
