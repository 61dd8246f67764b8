"""The training loop: one for every model, data kind and ZeRO stage."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dico_t2i import randomness
from dico_t2i.command import REQUEUE_EXIT_CODE
from dico_t2i.config import Config, Span
from dico_t2i.data import (
    Batch,
    BucketOrder,
    DataError,
    DatasetIndex,
    MixtureOrder,
    check_data,
    load_data,
    make_loader,
    make_order,
)
from dico_t2i.diffusion import build
from dico_t2i.encoders import check_cached
from dico_t2i.models import build_network
from dico_t2i.sampling import default_weights, load_encoders
from dico_t2i.training import checkpoint as ckpt
from dico_t2i.training.ahead import Ahead
from dico_t2i.training.alignment import Alignment
from dico_t2i.training.averaged import averaged_model
from dico_t2i.training.cost import StepCost, step_cost
from dico_t2i.training.distributed import World, any_rank, join_world, mean_over_ranks
from dico_t2i.training.engine import Engine
from dico_t2i.training.guard import Guard
from dico_t2i.training.metrics import Reporter, memory_report, peak_memory_bytes
from dico_t2i.training.optimizer import learning_rate
from dico_t2i.training.preview import sample_preview
from dico_t2i.training.profiling import Profiler
from dico_t2i.training.run import RunFolder
from dico_t2i.training.saving import Saver
from dico_t2i.training.signals import StopFlag
from dico_t2i.training.snapshot import write_snapshot
from dico_t2i.training.sources import SourceLosses
from dico_t2i.training.tracking import check_tracking
from dico_t2i.training.validation import Validation
from dico_t2i.training.watchdog import Watchdog

_DATA_SHARE = 0.8  # of the hang timeout: the loader, which can name a stalled worker, gives up first
WORKING_DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}


class TrainingError(ValueError):
    """Training that cannot go on; the message says where it stopped and what to look at."""


# Bytes of a rank, by part, that a config on so many ranks is expected to take (plan.expected_memory).
Expectation = Callable[[Config, int], Mapping[str, float]]


def train(config: Config, runs: Path, lock_patience_s: float = 0.0, expect: Expectation | None = None) -> int:
    """Train, or go on with, the run of this config. Returns the exit code: 0 done, 75 stopped by a signal.

    lock_patience_s: how long to wait for another job to leave the run folder. expect: told beside what is measured.
    Raises ConfigError, DataError, MissingModelError or CheckpointError before anything is trained.
    """
    check_tracking(config)
    world = join_world()
    config.batching(world.size)
    if world.is_main:
        load_data(config.data)  # makes the index if there is none
    dist.barrier()
    index = load_data(config.data)
    check_data(config, index)
    run = RunFolder(runs, config.name)
    changes = run.changes(config)
    dist.barrier()  # every rank has compared configs before rank 0 writes its own
    if not world.is_main:
        return Trainer(config, index, run, world).fit()
    with run.locked(lock_patience_s):
        run.write_config(config)
        write_snapshot(run.starts, world)
        return Trainer(config, index, run, world, changes, expect).fit()


class Trainer:
    """One rank's part of a run."""

    def __init__(
        self,
        config: Config,
        index: DatasetIndex,
        run: RunFolder,
        world: World,
        changes: Sequence[str] = (),
        expect: Expectation | None = None,
    ) -> None:
        self.config, self.index, self.run, self.world, self.expect = config, index, run, world, expect
        self.stop = StopFlag()
        self.stop.install()
        self.dtype = WORKING_DTYPE[config.train.precision]
        self.autoencoder, self.conditioner = load_encoders(config, world.device, self.dtype)
        check_cached(config.data, index, self.autoencoder, self.conditioner.text_encoder)
        self.alignment = Alignment(config, world.device, self.dtype) if config.alignment else None
        self.loss_names = ("loss", "mse", "vb", *(["alignment"] if config.alignment else []))
        self.diffusion = build(config.diffusion, config.model.learn_sigma)
        self.micro_batch, self.accumulation = config.batching(world.size)
        self.total_steps = self._steps(config.train.duration)
        self.warmup = self._steps(config.optimizer.warmup) if config.optimizer.warmup else 0
        self.validation = self._validation()
        torch.manual_seed(config.seed)
        batching = (self.micro_batch, self.accumulation)
        network = build_network(config.model)
        if self.alignment:
            self.alignment.attach(network)
        self.engine = Engine(network, config.train, config.optimizer, batching, world)
        self.order = make_order(config.data, index, config.seed, config.train.global_batch)
        self.sources = SourceLosses([source.name for source in config.data.mixture], world.device)
        self.report = Reporter(config, run.path, self.total_steps, world.is_main)
        for line in changes:
            self.report.event(0, "config", f"changed since the last start: {line}")
        self.guard = Guard(config.guard, run.quarantine if world.is_main else None)
        keep_every = self._steps(config.checkpoint.keep_every) if config.checkpoint.keep_every else None
        data = {"samples": len(index), "shards": len(index.names)}
        self.saver = Saver(config, run, world, self.engine, self.report, keep_every, data)
        self.profiler = Profiler(config.train.profile if world.is_main else None, run.profile)
        self.bad_samples = 0
        self.quarantined = 0
        self.step, self.position = self._resume()

    def fit(self) -> int:
        """Train to the end of the duration or to a signal; saves on both. Returns the exit code.

        Raises DataError or TrainingError when going on is no use; what can be saved is saved.
        """
        self._announce()
        train = self.config.train
        with Watchdog(self.world, train.hang_timeout_s, train.first_step_timeout_s, self._hung) as watchdog:
            try:
                return self._loop(watchdog)
            except Exception as error:
                self.report.event(self.step, "failed", f"{type(error).__name__}: {error}")
                raise
            finally:
                self.profiler.close()
                self.report.close()

    def _loop(self, watchdog: Watchdog) -> int:
        batches = self._loader()
        meter = Meter(self, watchdog)
        ahead = Ahead(partial(meter.waiting, batches), self._inputs, self.world.device)
        self.engine.model.train()
        first = self.step
        while self.step < self.total_steps:
            self.profiler.at(self.step)
            self._train_step(ahead, meter)
            if self.step == first + 1:
                meter.excluded(self._tell_memory)
            if self._due(self.config.log.every):
                meter.report()
            if self._due(self.config.preview.every):
                meter.excluded(self._preview)
            if self.validation and self._due(self.validation.settings.every):
                meter.excluded(self._validate)
            if self.guard.lost:
                self._roll_back()
            stop, spoilt, save, settle = self._agree()
            if settle:
                self.saver.settle()
            if stop or spoilt or save:
                meter.excluded(partial(self._save, meter))
            if stop:
                return self._finish(REQUEUE_EXIT_CODE)
            if spoilt:
                raise self._spoilt()
        if self.step > self.saver.saved_step:
            meter.excluded(partial(self._save, meter))
        return self._finish(0)

    def _train_step(self, ahead: "Ahead[Batch, Inputs]", meter: "Meter") -> None:
        """One update, or a step skipped by the guard."""
        batch_size = self.config.train.global_batch
        self.engine.limit = self.guard.limit
        total = torch.zeros(len(self.loss_names), device=self.world.device)
        rate = learning_rate(self.config.optimizer, self.step, self.total_steps, self.warmup)
        for number in range(self.accumulation):
            batch, inputs = ahead.take()
            losses = self._losses(inputs)
            self.sources.add(batch.sources, losses["loss"])
            self.engine.backward(losses["loss"].mean())
            if self.step + 1 < self.total_steps or number + 1 < self.accumulation:
                ahead.start()
            norm = self.engine.step(rate)
            parts = [losses[key].mean() if key in losses else torch.zeros_like(total[0]) for key in self.loss_names]
            total += torch.stack(parts).detach() / self.accumulation
            self._note_bad(batch)
        self.guard.hear(self.step, self.position, batch_size, norm, self.engine.skipped)
        self.step += 1
        self.position += batch_size
        meter.add(total, norm, self.engine.skipped)
        self.report.advance(self.step)

    def _inputs(self, batch: Batch) -> "Inputs":
        """What the network and the loss take. Every draw is a function of the seed and the sample's position."""
        seed, position = self.config.seed, batch.positions.to(self.world.device, non_blocking=True)
        latents = self._latents(batch, position)
        conditioning = self._conditioning(batch, position)
        t = self.diffusion.draw_timesteps(seed, position)
        noise = randomness.normal(seed, "noise", position, latents.shape[1:])
        return Inputs(latents, conditioning, t, noise, self._features(batch))

    def _losses(self, inputs: "Inputs") -> dict[str, Tensor]:
        """Per-sample losses."""

        def network(x: Tensor, t: Tensor) -> Tensor:
            return self.engine.model(x, t, **inputs.conditioning)

        losses = self.diffusion.training_losses(network, inputs.latents, inputs.t, inputs.noise)
        if self.alignment is None:
            return losses
        assert inputs.features is not None
        return self.alignment.added(losses, inputs.features)

    def _features(self, batch: Batch) -> Tensor | None:
        if self.alignment is None:
            return None
        assert batch.images is not None
        return self.alignment.encoder.encode(batch.images)

    def _latents(self, batch: Batch, position: Tensor) -> Tensor:
        return self.autoencoder.of_batch(batch, position, self.config.seed)

    def _conditioning(self, batch: Batch, position: Tensor) -> dict[str, Tensor]:
        dropped = randomness.uniform(self.config.seed, "drop", position) < self.config.model.dropout_prob
        return self.conditioner.drop(self.conditioner.of_batch(batch), dropped)

    def _loader(self) -> Iterator[Batch]:
        encoder = self.conditioner.text_encoder
        return iter(
            make_loader(
                self.config.data,
                self.index,
                self.order,
                seed=self.config.seed,
                condition=self.config.model.condition,
                classes=self.config.model.num_classes,
                global_batch=self.config.train.global_batch,
                micro_batch=self.micro_batch,
                rank=self.world.rank,
                world=self.world.size,
                start_step=self.position // self.config.train.global_batch,
                tokenize=encoder.tokenize if encoder else None,
                retries=self.config.data.retries,
                retry_wait_s=self.config.data.retry_wait_s,
                timeout_s=_DATA_SHARE * self.config.train.hang_timeout_s,
            )
        )

    def _note_bad(self, batch: Batch) -> None:
        """Record samples that were replaced."""
        for bad in batch.bad:
            self.report.event(self.step, "bad sample", f"{bad.shard} {bad.key}: {bad.reason}; another took its place")
        self.bad_samples += len(batch.bad)
        self.quarantined += batch.quarantined

    def _announce(self) -> None:
        config, encoder = self.config, self.conditioner.text_encoder
        parameters = sum(shape.numel() for shape in self.engine.shapes.values())
        text = f"; text: {encoder.description}" if encoder else ""
        if self.alignment:
            text += f"; aligned with: {self.alignment.encoder.description}"
        self.report.event(
            self.step,
            "start",
            f"{config.name}: {parameters / 1e6:.1f}M parameters, {len(self.index)} samples, {self.world.size} ranks x"
            f" {self.micro_batch} x {self.accumulation} = batch {config.train.global_batch},"
            f" ZeRO-{config.train.zero_stage}, {config.train.precision}, steps {self.step} to {self.total_steps}{text}",
            total_steps=self.total_steps,
            parameters=parameters,
            ranks=self.world.size,
        )
        for line in self._data_notes():
            self.report.event(self.step, "data", line)

    @cached_property
    def cost(self) -> StepCost:
        parameters = sum(shape.numel() for shape in self.engine.shapes.values())
        return step_cost(self.config, self.world.size, parameters, self.world.device)

    def _tell_memory(self) -> None:
        """After the first step, when everything has been made."""
        if not self.world.is_main:
            return
        held, peak = self.engine.held_bytes(), peak_memory_bytes(self.world.device)
        expected = self.expect(self.config, self.world.size) if self.expect else None
        self.report.event(self.step, "memory", memory_report(held, peak, expected), bytes={**held, "peak": peak})

    def _data_notes(self) -> Iterator[str]:
        """What of the data is left out, and how they are mixed."""
        order, size = self.order, self.config.train.global_batch
        if self.index.quarantined:
            yield f"{self.index.quarantined} samples are in quarantine: others take their place"
        if isinstance(order, BucketOrder):
            yield (
                f"{len(order.steps)} of {len(self.index.buckets)} buckets, {sum(order.steps.values())} batches of"
                f" {size} an epoch; {order.dropped} samples do not fill a batch, others in each epoch but for"
                f" {order.unused} in buckets too small for one"
            )
        if isinstance(order, MixtureOrder):
            shares = zip(self.config.data.mixture, order.per_block.tolist(), strict=True)
            yield f"of {order.block} samples of a stream: " + ", ".join(f"{n} {source.name}" for source, n in shares)

    def _steps(self, span: Span) -> int:
        steps = span.in_steps(self.config.train.global_batch, len(self.index))
        assert steps is not None  # minutes are refused by the config
        return steps

    def _due(self, every: Span | None) -> bool:
        return every is not None and self.step % self._steps(every) == 0

    def _agree(self) -> list[bool]:
        """Whether any rank wants to stop, has too many bad samples, finds a save due, or one ended; collective."""
        every = self.config.checkpoint.every
        minutes = (time.monotonic() - self.saver.saved_at) / 60
        save = self._due(every) if every.minutes is None else minutes >= every.minutes
        save = save and not self.guard.skipped_in_row  # else a rollback would come back to weights that are lost
        spoilt = self.bad_samples > self.config.data.max_bad_samples
        flags = [self.stop.signal is not None, spoilt, save, self.saver.failed or self.saver.ended]
        return any_rank(flags, self.world.device)

    def _save(self, meter: "Meter") -> None:
        self.guard.settle()
        self.saver.save(self.step, self.position, meter.loss_since_save(), self.guard)

    def _resume(self) -> tuple[int, int]:
        """Step and position to go on from."""
        found = self.saver.restore(self.guard)
        if found is None:
            self.engine.materialize(0)
            return 0, 0
        return found

    def _roll_back(self) -> None:
        """Go back to the last checkpoint; the data goes on from here, past the stretch that did the harm."""
        rollbacks, step = self.guard.state.rollbacks, self.step
        skipped = self.guard.skipped_in_row
        self.guard.settle()
        self.saver.drain()
        found = self.saver.restore(self.guard) if rollbacks < self.config.guard.max_rollbacks else None
        if found is None:
            why = "after a rollback" if rollbacks else "and there is no checkpoint to go back to"
            raise TrainingError(
                f"{skipped} steps in a row up to step {step} had no usable gradient, {why}."
                f" The batches are listed in {self.run.quarantine}; lower optimizer.lr, or look at the data"
            )
        self.step = found[0]
        self.guard.state.rollbacks = rollbacks + 1
        self.guard.skipped_in_row = 0
        message = f"back from step {step} to step {self.step}; the data goes on from sample {self.position}"
        self.report.event(self.step, "rollback", message)

    def _hung(self, step: int, message: str) -> None:
        self.report.event(step, "hang", message)

    def _preview(self) -> None:
        encoders = (self.autoencoder, self.conditioner)
        sample_preview(self.config, self.engine, encoders, self.dtype, self.world, self.run, self.report, self.step)

    def _validation(self) -> Validation | None:
        """Raises ConfigError or DataError, before anything is trained, if the held-out data cannot be used."""
        if self.config.validation is None:
            return None
        encoder = self.conditioner.text_encoder
        tokenize = encoder.tokenize if encoder else None
        made = Validation(self.config, self.world, self.micro_batch, tokenize, self._latents, self.conditioner.of_batch)
        check_cached(self.config.data, made.index, self.autoencoder, encoder)
        return made

    def _validate(self) -> None:
        assert self.validation is not None
        model = averaged_model(self.config, self.engine, self.world, self.dtype)
        found = self.validation.run(model)
        if self.config.optimizer.ema:
            found["ema_distance"] = self.engine.distance(default_weights(self.config))
        self.report.log(self.step, found)

    def _spoilt(self) -> DataError:
        self._finish(1)
        return DataError(
            f"more than data.max_bad_samples: {self.config.data.max_bad_samples} samples could not be used; stopped"
            f" with a checkpoint at step {self.step}. They are listed in {self.run.metrics};"
            " check the shards with data_prep/verify.py"
        )

    def _finish(self, code: int) -> int:
        """Wait for the last save. Raises CheckpointError if it failed; nobody leaves before it is committed."""
        saved = self.saver.drain()
        if code == REQUEUE_EXIT_CODE:
            name = self.stop.signal.name if self.stop.signal else "a signal on another rank"
            self.report.event(self.step, "stop", f"{name}: saved at step {self.step}; start again to go on")
        elif code == 0:
            self.report.event(self.step, "done", f"{self.step} steps; run folder: {self.run.path}")
        if not saved:
            raise ckpt.CheckpointError(
                f"the last checkpoint, of step {self.step}, could not be written to {self.run.checkpoints};"
                " make room and start again: the run goes on from the one before"
            )
        return code


class Inputs(NamedTuple):
    """A micro-batch as the network takes it, on the device. t (N,) int64; latents and noise (N, C, H, W).

    features: of the clean images, to be aligned with, (N, rows, columns, D).
    """

    latents: Tensor
    conditioning: dict[str, Tensor]
    t: Tensor
    noise: Tensor
    features: Tensor | None = None


class Meter:
    """Sums what happens between two reports. What is on the device stays there until a report asks for it."""

    wait: float  # seconds spent waiting for data
    other: float  # seconds of previews and saves
    steps: int
    skipped: Tensor
    norm: Tensor
    losses: Tensor

    def __init__(self, trainer: Trainer, watchdog: Watchdog) -> None:
        self.trainer, self.watchdog = trainer, watchdog
        self._since_save: list[float] = []  # of each report
        self._reset()

    def waiting(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the wait is counted."""
        started = time.monotonic()
        self.watchdog.beat(self.trainer.step, "data")
        batch = next(batches)
        self.wait += time.monotonic() - started
        self.watchdog.beat(self.trainer.step, "step")
        return batch

    def excluded(self, work: Callable[[], None]) -> None:
        """Do work that is not training: its time is reported apart and left out of images/s."""
        started = time.monotonic()
        extra = self.trainer.config.train.first_step_timeout_s
        self.watchdog.beat(self.trainer.step, "saving or sampling", extra)
        work()
        self.watchdog.beat(self.trainer.step, "step", extra)
        self.other += time.monotonic() - started

    def add(self, losses: Tensor, norm: Tensor, skipped: Tensor) -> None:
        self.steps += 1
        self.norm, self.skipped = norm, self.skipped + skipped
        self.losses += losses

    def report(self) -> None:
        """Write the means over the ranks since the last report; collective."""
        trainer, config = self.trainer, self.trainer.config
        skipped = int(self.skipped)  # waits for the device: only then is the time of the steps known
        spent = time.monotonic() - self._began - self.other
        counts = [trainer.quarantined, trainer.bad_samples]
        shares = torch.tensor([self.wait, spent, self.other, *counts], device=trainer.world.device)
        means = mean_over_ranks(torch.cat((self.losses / self.steps, shares))).tolist()
        names = trainer.loss_names
        wait, seconds, other, quarantined, bad = means[len(names) :]
        values = {
            **dict(zip(names, means, strict=False)),
            "grad_norm": float(self.norm),
            "lr": trainer.engine.adam.param_groups[0]["lr"],
            "images": trainer.position,
            "epoch": trainer.position / len(trainer.index),
            "images_per_s": self.steps * config.train.global_batch / seconds,
            "step_s": seconds / self.steps,
            "data_wait": wait / seconds,
            "other_s": other,
            "skipped_steps": skipped,
            "save_pause_s": trainer.saver.pause_s,
            "bad_samples": round(bad * trainer.world.size),  # these two: replaced since the start, by all ranks
            "quarantined_samples": round(quarantined * trainer.world.size),
            **(trainer.cost.rates(seconds / self.steps) if trainer.world.is_main else {}),
            "peak_memory_gb": peak_memory_bytes(trainer.world.device) / 1e9,
            "eta_s": (trainer.total_steps - trainer.step) * seconds / self.steps,
        }
        if isinstance(trainer.order, MixtureOrder):
            values |= trainer.sources.report(trainer.order.counts(trainer.position))
        self._since_save.append(values["loss"])
        trainer.report.log(trainer.step, values)
        self._reset()

    def loss_since_save(self) -> float:
        """The mean of the losses reported since this was last asked; inf if there are none."""
        losses, self._since_save = self._since_save, []
        return sum(losses) / len(losses) if losses else math.inf

    def _reset(self) -> None:
        device = self.trainer.world.device
        self.steps, self.skipped = 0, torch.zeros((), dtype=torch.int64, device=device)
        self.wait, self.other, self._began = 0.0, 0.0, time.monotonic()
        self.norm = torch.tensor(math.nan, device=device)
        self.losses = torch.zeros(len(self.trainer.loss_names), device=device)
