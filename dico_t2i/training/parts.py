"""Builds the parts of a run on one rank, in the order in which they depend on each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dico_t2i.config import Config, ConfigError, Span
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.order import SampleOrder
from dico_t2i.data.sources import make_order
from dico_t2i.diffusion import build
from dico_t2i.encoders import check_cached
from dico_t2i.encoders.identity import KEY, Identities, check_identities, identities
from dico_t2i.encoders.load import load_encoders
from dico_t2i.models import build_network
from dico_t2i.runs.checkpoint import CheckpointError, newest_checkpoint
from dico_t2i.runs.folder import RunFolder
from dico_t2i.training.alignment import Alignment
from dico_t2i.training.engine import Engine
from dico_t2i.training.guard import Guard
from dico_t2i.training.inputs import InputMaker
from dico_t2i.training.meter import Meter
from dico_t2i.training.observers.profiling import Profiler
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.observers.snapshot import write_snapshot
from dico_t2i.training.observers.source_losses import SourceLosses
from dico_t2i.training.observers.validation import Validation
from dico_t2i.training.ranks.distributed import World, first_message
from dico_t2i.training.saving import Saver

WORKING_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Parts:
    """All parts that a rank trains with."""

    inputs: InputMaker
    engine: Engine
    order: SampleOrder
    guard: Guard
    saver: Saver
    report: Reporter
    meter: Meter
    sources: SourceLosses
    profiler: Profiler
    validation: Validation | None
    micro_batch: int
    accumulation: int


def build_parts(
    config: Config, index: DatasetIndex, run: RunFolder, world: World, changes: Sequence[str] = ()
) -> Parts:
    """Load the encoders, make the network, the optimizer and the data order, then record how the run was started.

    changes: the changes of the config since the last start, to be reported.
    Raises ConfigError, DataError or MissingModelError before training starts.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    dtype = WORKING_DTYPE[config.train.precision]
    inputs = _input_maker(config, world, dtype)
    text_encoder = inputs.conditioner.text_encoder
    check_cached(config.data, index, inputs.autoencoder, text_encoder)
    micro_batch, accumulation = config.batching(world.size)
    validation = Validation(config, world, micro_batch, inputs) if config.validation else None
    if validation:
        check_cached(config.data, validation.index, inputs.autoencoder, text_encoder)
    torch.manual_seed(config.seed)
    network = build_network(config.model)
    if inputs.alignment:
        inputs.alignment.attach(network)
    engine = Engine(network, config.train, config.optimizer, (micro_batch, accumulation), world)
    order = make_order(config.data, index, config.seed, config.train.global_batch)
    encoders = identities(inputs.autoencoder, text_encoder) if world.is_main else {}
    note = _check_encoders(run, encoders, world)
    if world.is_main:  # all checks have passed
        run.write_config(config)
        write_snapshot(run.starts, world)
    report = Reporter(config, run.path, span_in_steps(config, index, config.train.duration), world.is_main)
    for line in changes:
        report.event(0, "config", f"changed since the last start: {line}")
    if note:
        report.event(0, "config", note)
    keep_every = config.checkpoint.keep_every
    keep_every_steps = span_in_steps(config, index, keep_every) if keep_every else None
    data = {"samples": len(index), "shards": len(index.names)}
    return Parts(
        inputs=inputs,
        engine=engine,
        order=order,
        guard=Guard(config.guard, run.quarantine if world.is_main else None),
        saver=Saver(config, run, world, engine, report, keep_every_steps, data, encoders),
        report=report,
        meter=Meter(("loss", "mse", "vb", *(["alignment"] if config.alignment else [])), world.device),
        sources=SourceLosses([source.name for source in config.data.mixture], world.device),
        profiler=Profiler(config.train.profile if world.is_main else None, run.profile),
        validation=validation,
        micro_batch=micro_batch,
        accumulation=accumulation,
    )


def _check_encoders(run: RunFolder, encoders: Identities, world: World) -> str:
    """Raise ConfigError on all ranks if the run has been trained with other encoders; collective.

    Returns a note where the newest checkpoint does not tell.
    """
    try:
        checkpoint = newest_checkpoint(run.checkpoints)
    except CheckpointError:  # none, or a damaged one, of which the restoring tells
        return ""
    trained, problem = checkpoint.state.get(KEY), ""
    if trained is None:
        return f"note: {checkpoint.path} does not say which encoders it was trained with; they are not checked"
    try:
        check_identities(trained, encoders, str(checkpoint.path))
    except ConfigError as error:
        problem = str(error)
    problem = first_message(problem, world.device)
    if problem:
        raise ConfigError(problem)
    return ""


def span_in_steps(config: Config, index: DatasetIndex, span: Span) -> int:
    """A span that is not given in minutes, in optimizer steps."""
    steps = span.in_steps(config.train.global_batch, len(index))
    assert steps is not None  # the config refuses minutes
    return steps


def _input_maker(config: Config, world: World, dtype: torch.dtype) -> InputMaker:
    autoencoder, conditioner = load_encoders(config, world.device, dtype)
    diffusion = build(config.diffusion, config.model.learn_sigma)
    alignment = Alignment(config, world.device, dtype) if config.alignment else None
    return InputMaker(config, world.device, autoencoder, conditioner, diffusion, alignment)
