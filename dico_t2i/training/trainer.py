"""The training loop, which is the same for all models, kinds of data and ZeRO stages."""

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dico_t2i.command import REQUEUE_EXIT_CODE
from dico_t2i.config import Config, Span, dump_config
from dico_t2i.config.stages import RunStage, next_stage, plan_stages
from dico_t2i.data.batches import Batch
from dico_t2i.data.checks import check_data
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import BucketOrder, MixtureOrder
from dico_t2i.data.sources import load_data
from dico_t2i.encoders import with_measured
from dico_t2i.memory import in_fork, keep_freed_memory
from dico_t2i.models import Network
from dico_t2i.plan.cost import StepCost, peak_rate, product_rate
from dico_t2i.plan.plan import expected_step
from dico_t2i.runs.checkpoint import Checkpoint, CheckpointError, DamagedError
from dico_t2i.runs.decisions import save_is_due
from dico_t2i.runs.folder import STAGE, RunFolder
from dico_t2i.runs.lineage import ancestor, with_stage
from dico_t2i.runs.weights import default_weights
from dico_t2i.training.ahead import Ahead
from dico_t2i.training.inputs import Inputs
from dico_t2i.training.observers.averaged import averaged_model
from dico_t2i.training.observers.memory_report import memory_report, peak_memory_bytes
from dico_t2i.training.observers.preview import sample_preview
from dico_t2i.training.observers.snapshot import process_age_s
from dico_t2i.training.observers.tracking import check_tracking
from dico_t2i.training.optimizer import learning_rate
from dico_t2i.training.parts import WORKING_DTYPE, Parts, build_parts, span_in_steps
from dico_t2i.training.prolonging import prolong
from dico_t2i.training.ranks.distributed import any_rank, join_world, main_first
from dico_t2i.training.ranks.watchdog import Watchdog
from dico_t2i.training.session import Session, fetch_copy

_SLOWER = 1.2  # bf16 is reported as slow when it takes this many times as long as fp32
_DATA_SHARE = 0.8  # of the hang timeout, so that the loader, which can name a stalled worker, gives up first


class TrainingError(ValueError):
    """Raised if training cannot continue; the message says where it stopped and what to check."""


def train(config: Config, runs: Path, lock_patience_s: float = 0.0, begin: str | None = None) -> int:
    """Train or resume the run of this config. Returns the exit code: 0 if it is done, 75 if a signal stopped it.

    lock_patience_s: how long to wait until a different job leaves the run folder. begin: the first stage to train, if
    the run has not reached it yet. Raises ConfigError, DataError, MissingModelError or CheckpointError before training
    starts.
    """
    check_tracking(config)
    world = join_world()
    configs = config.stage_configs
    for own in configs:
        own.batching(world.size)
    # Builds an index if there is none. One rank compares all sizes: thousands of ranks would stop the file system.
    indexes = main_first(lambda: [load_data(own.data, check=world.is_main) for own in configs], world)
    for own, index in zip(configs, indexes, strict=True):
        check_data(own, index)
    config = with_measured(config, indexes[0])
    run = RunFolder(runs, config.name)
    warning = main_first(lambda: fetch_copy(config, run) if world.is_main else "", world)
    changes = run.changes(config)
    dist.barrier()  # all ranks compare configs before rank 0 writes the new one
    if not world.is_main:
        return _train_stages(Session(config, run, world), indexes, begin)
    with run.locked(lock_patience_s):
        session = Session(config, run, world, changes)
        if warning:
            session.event(0, "copy", warning)
        return _train_stages(session, indexes, begin)


def _train_stages(session: Session, indexes: Sequence[DatasetIndex], begin: str | None) -> int:
    """Train the stages that are left. Each one continues from the checkpoint that the one before it ends with."""
    stages = plan_stages(session.config, [len(index) for index in indexes])
    dist.barrier()  # until rank 0 has the lock
    with session:
        prolonged = prolong(session.run.checkpoints, stages[-1], session.world)
        if prolonged:
            session.event(0, "prolong", prolonged)
        trainer, checkpoint = _begin(session, stages, indexes, begin)
        if checkpoint:
            session.note_resume(checkpoint)
        while True:
            code = trainer.fit()
            if code or trainer.stage.number + 1 == len(stages):
                return code
            trainer.engine.close()
            del trainer
            _collect()
            trainer, _ = _begin(session, stages, indexes, begin)


def _begin(
    session: Session, stages: Sequence[RunStage], indexes: Sequence[DatasetIndex], begin: str | None
) -> tuple["Trainer", Checkpoint | None]:
    """The trainer of the next stage, and the newest undamaged checkpoint, which it has loaded, if there is one."""
    while True:
        checkpoint = session.newest_checkpoint()
        stage = _stage_after(stages, checkpoint, begin)
        left = [stage, *stages[stage.number + 1 :]]
        try:
            return Trainer(session, left, indexes[stage.number :], checkpoint), checkpoint
        except DamagedError as error:
            assert checkpoint is not None
            session.skip(checkpoint, str(error))
        _collect()


def _collect() -> None:
    """Free the memory of a trainer that is no longer used."""
    gc.collect()
    torch.cuda.empty_cache()


def _stage_after(stages: Sequence[RunStage], checkpoint: Checkpoint | None, begin: str | None) -> RunStage:
    """The stage to train after a checkpoint."""
    if checkpoint is None:
        return next_stage(stages, 0, 0, {}, begin)
    return next_stage(stages, checkpoint.step, checkpoint.position, checkpoint.state.get(STAGE, {}), begin)


class Trainer:
    """Trains one rank of a run, for one stage."""

    def __init__(
        self,
        session: Session,
        stages: Sequence[RunStage],
        indexes: Sequence[DatasetIndex],
        checkpoint: Checkpoint | None,
    ) -> None:
        """stages, indexes: those that are left, of which the first is trained. checkpoint: None if the run begins."""
        self.session, self.stage, self.index = session, stages[0], indexes[0]
        self.config, self.run, self.world, self.stop = self.stage.config, session.run, session.world, session.stop
        self.parts: Parts = build_parts(stages, indexes, session, checkpoint)
        self.engine, self.report, self.meter = self.parts.engine, self.parts.report, self.parts.meter
        self.guard, self.saver = self.parts.guard, self.parts.saver
        warmup = self.config.optimizer.warmup
        self.warmup = self._steps(warmup) if warmup else 0
        try:
            self.step, self.position = self._resume(checkpoint)
        except CheckpointError:
            self.engine.close()
            self.parts.profiler.close()
            raise

    def fit(self) -> int:
        """Train until the end of the duration or until a signal, then save. Returns the exit code.

        Raises DataError or TrainingError if training cannot continue, after saving what it can.
        """
        if self.step >= self.stage.last_step:
            return self._nothing_to_do()
        self._announce()
        train = self.config.train
        with Watchdog(self.world, train.hang_timeout_s, train.first_step_timeout_s, self._hung) as self.watchdog:
            try:
                return self._loop()
            except Exception as error:
                self.report.event(self.step, "failed", f"{type(error).__name__}: {error}")
                self.session.close()
                raise
            finally:
                self.parts.profiler.close()

    def _nothing_to_do(self) -> int:
        """End at once, because the run has reached or passed its duration."""
        self.saver.finish(self.config.train.first_step_timeout_s)
        total = self.stage.run_steps
        message = f"already at {self.step} of {total} steps, nothing to do; run folder: {self.run.path}"
        self.report.event(self.step, "done", message, total_steps=total)
        self.parts.profiler.close()
        return 0

    def _loop(self) -> int:
        if self.world.device.type == "cpu":
            keep_freed_memory()  # from here on, since building the parts allocates what training does not need
        ahead = Ahead(self._fetcher(), self.parts.inputs, self.world.device)
        self.engine.model.train()
        first = self.step
        while self.step < self.stage.last_step:
            self.parts.profiler.at(self.step)
            self._train_step(ahead)
            if self.step == first + 1:
                self._aside(self._report_memory)
            if self._due(self.config.log.every):
                self._report()
            if self._due(self.config.preview.every):
                self._aside(self._preview)
            if self.config.validation and self._due(self.config.validation.every):
                self._aside(self._validate)
            if self.guard.lost:
                self._roll_back()
            stop, spoilt, save, settle = self._agree()
            if settle:
                self.saver.settle()
            if stop or spoilt or save:
                self._aside(self._save)
            if stop:
                return self._finish(REQUEUE_EXIT_CODE)
            if spoilt:
                raise self._spoilt()
        if self.step > self.saver.saved_step:
            self._aside(self._save)
        return self._finish(0)

    def _train_step(self, ahead: Ahead[Batch, Inputs]) -> None:
        """Make one update, or skip the step if the guard refuses it."""
        batch_size = self.config.train.global_batch
        self.engine.limit = self.guard.limit
        names, accumulation = self.meter.loss_names, self.parts.accumulation
        total = torch.zeros(len(names), device=self.world.device)
        stage = self.stage
        own_step = self.step - stage.first_step
        rate = learning_rate(self.config.optimizer, own_step, stage.steps, self.warmup, stage.decay)
        for number in range(accumulation):
            batch, inputs = ahead.take()
            losses = self._losses(inputs)
            self.parts.sources.add(batch.sources, losses["loss"])
            more = self.step + 1 < stage.last_step or number + 1 < accumulation
            if more and self.engine.overlaps:  # since the backward pass then waits for the device
                ahead.start()
            self.engine.backward(losses["loss"].mean())
            if more:
                ahead.start()
            norm = self.engine.step(rate)
            parts = [losses[key].mean() if key in losses else torch.zeros_like(total[0]) for key in names]
            total += torch.stack(parts).detach() / accumulation
            self._note_bad(batch)
        self.guard.hear(self.step, self.position, batch_size, norm, self.engine.skipped)
        self.step += 1
        self.position += batch_size
        self.meter.add(total, norm, self.engine.skipped)
        self.report.advance(self.step)

    def _losses(self, inputs: Inputs) -> dict[str, Tensor]:
        """The losses of each sample, (N,)."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.engine.model(x, t, **inputs.conditioning)

        losses = self.parts.inputs.diffusion.training_losses(network, inputs.latents, inputs.t, inputs.noise)
        alignment = self.parts.inputs.alignment
        if alignment is None:
            return losses
        assert inputs.features is not None
        return alignment.added(losses, inputs.features)

    def _fetcher(self) -> Callable[[], Batch]:
        """A function that returns the next micro-batch at each call, and measures the time spent waiting for it."""
        batches = iter(
            make_loader(
                self.config.data,
                self.index,
                self.parts.order,
                Share(self.config.train.global_batch, self.parts.micro_batch, self.world.rank, self.world.size),
                self.parts.inputs.conditioner.wanted,
                seed=self.config.seed,
                first_position=self.stage.first_position,
                start_step=self._own_position // self.config.train.global_batch,
                timeout_s=_DATA_SHARE * self.config.train.hang_timeout_s,
            )
        )

        def fetch() -> Batch:
            with self.meter.waiting():
                self.watchdog.beat(self.step, "data")
                batch = next(batches)
            self.watchdog.beat(self.step, "step")
            return batch

        return fetch

    def _aside(self, work: Callable[[], None]) -> None:
        """Do work that is not training, and measure its time separately."""
        extra = self.config.train.first_step_timeout_s
        with self.meter.aside():
            self.watchdog.beat(self.step, "saving or sampling", extra)
            work()
            self.watchdog.beat(self.step, "step", extra)

    def _report(self) -> None:
        """Report the numbers since the last report; collective."""
        measured = self.meter.report(self.config.train.global_batch)
        step_s = measured["step_s"]
        values: dict[str, Any] = {
            **measured,
            "lr": self.engine.adam.param_groups[0]["lr"],
            "images": self.position,
            "epoch": self._own_position / len(self.index),
            "save_pause_s": self.saver.pause_s,
            **(self.expected[1].rates(step_s, self.peak) if self.world.is_main else {}),
            "peak_memory_gb": peak_memory_bytes(self.world.device) / 1e9,
            "eta_s": (self.stage.last_step - self.step) * step_s,
        }
        counts = self.parts.order.counts(self._own_position)
        if counts is not None:
            values |= self.parts.sources.report(counts)
        self.report.log(self.step, values)

    def _note_bad(self, batch: Batch) -> None:
        """Report the samples that were replaced."""
        for bad in batch.bad:
            self.report.event(self.step, "bad sample", f"{bad.shard} {bad.key}: {bad.reason}; another took its place")
        self.meter.note_replaced(batch)

    def _announce(self) -> None:
        config, inputs = self.config, self.parts.inputs
        encoder = inputs.conditioner.text_encoder
        parameters = sum(shape.numel() for shape in self.engine.shapes.values())
        text = f"; text: {encoder.description}" if encoder else ""
        if self.parts.base:
            text += f"; an adapter of {self.parts.base.name}"
        if inputs.alignment:
            text += f"; aligned with: {inputs.alignment.encoder.description}"
        name = f"{config.name}, stage {self.stage.name}" if self.stage.name else config.name
        self.report.event(
            self.step,
            "stage" if self.session.announced else "start",
            f"{name}: {parameters / 1e6:.1f}M parameters, {len(self.index)} samples, {self.world.size} ranks x"
            f" {self.parts.micro_batch} x {self.parts.accumulation} = batch {config.train.global_batch},"
            f" ZeRO-{config.train.zero_stage}, {config.train.precision}, steps {self.step} to"
            f" {self.stage.last_step}{text}",
            total_steps=self.stage.run_steps,
            parameters=parameters,
            ranks=self.world.size,
            **({"stage": self.stage.name} if self.stage.name else {}),
        )
        self.session.announced = True
        self._warn_of_slow_bf16()
        for line in self._data_notes():
            self.report.event(self.step, "data", line)

    def _warn_of_slow_bf16(self) -> None:
        """On a CPU without instructions for it bf16 takes several times as long as fp32."""
        if not self.world.is_main or self.world.device.type != "cpu" or self.config.train.precision != "bf16":
            return
        times = product_rate(self.world.device, torch.float32) / product_rate(self.world.device, torch.bfloat16)
        if times > _SLOWER:
            message = f"a matrix product in bf16 takes {times:.1f} times as long as in fp32 on this CPU"
            self.report.event(self.step, "precision", f"WARNING: {message}; set train.precision=fp32")

    @cached_property
    def peak(self) -> float:
        """The operations per second that the device can do."""
        return peak_rate(self.config, self.world.device)

    @cached_property
    def expected(self) -> tuple[Mapping[str, float], StepCost]:
        """Memory by part and cost of a step, as ``dico plan`` counts them.

        Counting imports torch's compiler: about 100 MB, which ranks on CPUs, often many in little memory, leave in a
        fork. In the fork of a process that has used a GPU autograd refuses to work.
        """
        parameters = sum(shape.numel() for shape in self.engine.shapes.values())
        arguments = self.config, self.world.size, parameters
        return in_fork(expected_step, *arguments) if self.world.device.type == "cpu" else expected_step(*arguments)

    def _report_memory(self) -> None:
        """Report memory after the first step, when everything is allocated."""
        if not self.world.is_main:
            return
        start_s = process_age_s()
        held, peak = self.engine.held_bytes(), peak_memory_bytes(self.world.device)
        message, sizes = memory_report(held, peak, self.expected[0]), {**held, "peak": peak}
        self.report.event(self.step, "memory", message, bytes=sizes, start_s=start_s)

    def _data_notes(self) -> Iterator[str]:
        """Notes on which data are left out, and how data sets are mixed."""
        order, size = self.parts.order, self.config.train.global_batch
        if self.index.quarantined:
            yield f"{self.index.quarantined} samples are in quarantine: others replace them"
        if isinstance(order, BucketOrder):
            batches = sum(order.steps.values())
            buckets = f"{len(order.steps)} of {len(self.index.buckets)} buckets, {batches} batches of {size} per epoch"
            rest = (
                f"each epoch leaves out {order.dropped} samples that do not fill a batch: different ones each time,"
                f" except for {order.unused} in buckets with less than one batch"
            )
            yield f"{buckets}; {rest if order.shares is None else self._shares(order.shares)}"
        if isinstance(order, MixtureOrder):
            shares = zip(self.config.data.mixture, order.per_block.tolist(), strict=True)
            yield f"of each {order.block} samples of a stream: " + ", ".join(
                f"{n} {source.name}" for source, n in shares
            )

    def _shares(self, shares: np.ndarray) -> str:
        """The share of each data set of a mixture in the samples."""
        named = zip(self.config.data.mixture, shares.tolist(), strict=True)
        return "of the samples: " + ", ".join(f"{100 * share:.2f} % {source.name}" for source, share in named)

    @property
    def _own_position(self) -> int:
        """The number of samples that the stage has seen."""
        return self.position - self.stage.first_position

    def _steps(self, span: Span) -> int:
        return span_in_steps(self.config, self.index, span)

    def _due(self, every: Span | None) -> bool:
        return every is not None and self.step % self._steps(every) == 0

    def _agree(self) -> list[bool]:
        """Whether any rank has to stop, has too many bad samples, has to save, or has ended a save; collective."""
        every = self.config.checkpoint.every
        every_s, every_steps = (60 * every.minutes, None) if every.minutes else (None, self._steps(every))
        save = save_is_due(every_s, every_steps, self.step, time.monotonic() - self.saver.saved_at)
        save = save or self.step == self.stage.decay_from  # from where the run can be prolonged
        save = save and not self.guard.skipped_in_row  # else a rollback could return to damaged weights
        spoilt = self.meter.bad_samples > self.config.data.max_bad_samples
        flags = [self.stop.signal is not None, spoilt, save, self.saver.failed or self.saver.ended]
        return any_rank(flags, self.world.device)

    def _save(self) -> None:
        self.guard.settle()
        self.saver.save(self.step, self.position, self.meter.loss_since_save(), self.guard)

    def _resume(self, checkpoint: Checkpoint | None) -> tuple[int, int]:
        """The step and position to continue from."""
        if checkpoint is not None:
            self._load(checkpoint)
            return checkpoint.step, checkpoint.position
        self.engine.materialize(0)
        self._start_from_weights()
        self._note_stage()
        return 0, 0

    def _load(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint of this stage, or the one with which the stage before it ended."""
        begins = checkpoint.state.get(STAGE, {}) != self.stage.record
        self.saver.load(checkpoint, self.guard, begins)
        if begins:
            self._note_stage()

    def _note_stage(self) -> None:
        """Add the stage to the lineage of the weights."""
        if self.stage.name:
            digest = hashlib.sha256(dump_config(self.config).encode()).hexdigest()
            stage = ancestor("stage", self.stage.name, digest, self.stage.first_step)
            self.saver.lineage = with_stage(self.saver.lineage, stage)

    def _start_from_weights(self) -> None:
        """Load the weights of ``init``, if the config has it; collective."""
        initial, base = self.parts.initial, self.parts.base
        if base:
            self.saver.lineage = base.lineage()
            self.report.event(0, "init", f"weights of {base.name}, to which an adapter is added")
        if initial is None:
            return
        self.saver.lineage = initial.load(self.engine, self.world)
        self.report.event(0, "init", f"weights of {initial.source.name}: {initial.fit}")

    def _roll_back(self) -> None:
        """Return to the last checkpoint, but continue in the data from here, after the samples that did the damage."""
        rollbacks, step = self.guard.state.rollbacks, self.step
        skipped = self.guard.skipped_in_row
        self.guard.settle()
        self.saver.drain()
        found = self._load_newest() if rollbacks < self.config.guard.max_rollbacks else None
        if found is None:
            why = "after a rollback" if rollbacks else "and there is no checkpoint to return to"
            raise TrainingError(
                f"{skipped} steps in a row up to step {step} had no usable gradient, {why}."
                f" The batches are listed in {self.run.quarantine}; lower optimizer.lr, or check the data"
            )
        self.session.note_resume(found)
        self.step = found.step
        self.guard.state.rollbacks = rollbacks + 1
        self.guard.skipped_in_row = 0
        message = f"back from step {step} to step {self.step}; the data continues from sample {self.position}"
        self.report.event(self.step, "rollback", message)

    def _load_newest(self) -> Checkpoint | None:
        """Load the newest undamaged checkpoint of this stage; None if there is none."""
        while True:
            found = self.session.newest_checkpoint()
            if found is None or found.step < self.stage.first_step:
                return None
            try:
                self._load(found)
                return found
            except DamagedError as error:
                self.session.skip(found, str(error))

    def _hung(self, step: int, message: str) -> None:
        self.session.event(step, "hang", message)  # the report of a rank that failed itself is closed

    def _preview(self) -> None:
        encoders = (self.parts.inputs.autoencoder, self.parts.inputs.conditioner)
        model = self._averaged_model()
        sample_preview(self.config, model, encoders, self.world, self.run, self.report, self.step)

    def _validate(self) -> None:
        assert self.parts.validation is not None
        found = self.parts.validation.run(self._averaged_model())
        if self.config.optimizer.ema:
            found["ema_distance"] = self.engine.distance(default_weights(self.config))
        self.report.log(self.step, found)

    def _averaged_model(self) -> Network:
        return averaged_model(self.config, self.engine, self.world, WORKING_DTYPE[self.config.train.precision])

    def _spoilt(self) -> DataError:
        self._finish(1)
        return DataError(
            f"more than data.max_bad_samples: {self.config.data.max_bad_samples} samples could not be used; stopped"
            f" with a checkpoint at step {self.step}. They are listed in {self.run.metrics};"
            " check the shards with data_prep/verify.py"
        )

    def _finish(self, code: int) -> int:
        """Wait for the last save. Raises CheckpointError if it failed; no rank leaves before it is committed."""
        saved = self.saver.drain()
        self._aside(lambda: self.saver.finish(self.config.train.first_step_timeout_s, saved))
        if code == REQUEUE_EXIT_CODE:
            name = self.stop.signal.name if self.stop.signal else "a signal on another rank"
            self.report.event(self.step, "stop", f"{name}: saved at step {self.step}; start again to resume")
        elif code == 0 and self.stage.later_steps == 0:
            self.report.event(self.step, "done", f"{self.step} steps; run folder: {self.run.path}")
        if not saved:
            raise CheckpointError(
                f"the last checkpoint, of step {self.step}, could not be written to {self.run.checkpoints};"
                " make room and start again: the run resumes from the checkpoint before it"
            )
        return code
