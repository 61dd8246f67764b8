"""Builds the parts of a run on one rank, in the order in which they depend on each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dico_t2i.config import Config, ConfigError, Span
from dico_t2i.config.stages import RunStage
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.order import SampleOrder
from dico_t2i.data.sources import make_order
from dico_t2i.diffusion import build
from dico_t2i.encoders import check_cached
from dico_t2i.encoders.identity import KEY, Identities, check_identities, identities
from dico_t2i.encoders.load import load_encoders
from dico_t2i.runs.checkpoint import Checkpoint
from dico_t2i.sampling.trained import Trained
from dico_t2i.training.adapted import build_adapted, find_base
from dico_t2i.training.alignment import Alignment
from dico_t2i.training.engine import Engine
from dico_t2i.training.guard import Guard
from dico_t2i.training.initial import Initial, find_initial
from dico_t2i.training.inputs import InputMaker
from dico_t2i.training.meter import Meter
from dico_t2i.training.observers.profiling import Profiler
from dico_t2i.training.observers.reporter import Reporter
from dico_t2i.training.observers.source_losses import SourceLosses
from dico_t2i.training.observers.validation import Validation
from dico_t2i.training.ranks.distributed import World, first_message
from dico_t2i.training.saving import Saver
from dico_t2i.training.session import Session

WORKING_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Parts:
    """All parts that a rank trains a stage with."""

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
    base: Trained | None  # the weights that an adapter is added to
    initial: Initial | None  # the weights that the run starts from, if it has no checkpoint of its own


def build_parts(
    stages: Sequence[RunStage], indexes: Sequence[DatasetIndex], session: Session, checkpoint: Checkpoint | None
) -> Parts:
    """Load the encoders, make the network, the optimizer and the data order, then open the session's report.

    stages, indexes: the stages that are left, and their data. The parts are those of the first; the data of the others
    are checked. checkpoint: the one that the run resumes from. Raises ConfigError, DataError or MissingModelError
    before training starts.
    """
    stage, index, run, world = stages[0], indexes[0], session.run, session.world
    config = stage.config
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    inputs = _input_maker(config, world, WORKING_DTYPE[config.train.precision])
    text_encoder = inputs.conditioner.text_encoder
    for later, its_index in zip(stages[1:], indexes[1:], strict=True):
        _checked_validation(later.config, its_index, world, inputs)
    validation = _checked_validation(config, index, world, inputs)
    micro_batch, accumulation = config.batching(world.size)
    base = find_base(config, checkpoint)
    torch.manual_seed(config.seed)
    network = build_adapted(config, base)
    if inputs.alignment:
        inputs.alignment.attach(network)
    engine = Engine(network, config.train, config.optimizer, (micro_batch, accumulation), world, config.cluster)
    order = make_order(config.data, index, config.seed + stage.number, config.train.global_batch)
    initial = None if checkpoint else find_initial(config, run, engine.shapes)
    encoders = identities(inputs.autoencoder, text_encoder) if world.is_main else {}
    note = _check_encoders(checkpoint, base, encoders, world)
    report = session.open(stage.run_steps)  # all checks have passed
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
        saver=Saver(stage, session, engine, report, keep_every_steps, data, encoders),
        report=report,
        meter=Meter(("loss", "mse", "vb", *(["alignment"] if config.alignment else [])), world.device),
        sources=SourceLosses([source.name for source in config.data.mixture], world.device),
        profiler=Profiler(config.train.profile if world.is_main else None, run.profile),
        validation=validation,
        micro_batch=micro_batch,
        accumulation=accumulation,
        base=base,
        initial=initial,
    )


def _checked_validation(config: Config, index: DatasetIndex, world: World, inputs: InputMaker) -> Validation | None:
    """The validation, if there is one; raises ConfigError if stored features or latents are of other encoders."""
    encoders = inputs.autoencoder, inputs.conditioner.text_encoder
    check_cached(config.data, index, *encoders)
    if config.validation is None:
        return None
    validation = Validation(config, world, config.batching(world.size)[0], inputs)
    check_cached(config.data, validation.index, *encoders)
    return validation


def _check_encoders(checkpoint: Checkpoint | None, base: Trained | None, encoders: Identities, world: World) -> str:
    """Raise ConfigError on all ranks if the run, or its base, has been trained with other encoders; collective.

    Returns a note where the checkpoint, or the base, does not tell.
    """
    before = checkpoint or base
    if before is None:
        return ""
    trained = before.state.get(KEY) if isinstance(before, Checkpoint) else before.record.get(KEY)
    if trained is None:
        return f"note: {before.path} does not say which encoders it was trained with; they are not checked"
    problem = ""
    try:
        check_identities(trained, encoders, str(before.path))
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
