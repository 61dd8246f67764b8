"""Measures training between two reports: time, losses, skipped steps and replaced samples."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dico_t2i.data.batches import Batch
from dico_t2i.training.ranks.distributed import mean_over_ranks


class Meter:
    """Sums measurements between two reports. Values on the device stay there until a report needs them."""

    steps: int
    wait_s: float  # spent waiting for data
    aside_s: float  # spent on previews, validation and saves
    skipped: Tensor
    norm: Tensor
    losses: Tensor

    def __init__(self, loss_names: Sequence[str], device: torch.device) -> None:
        self.loss_names, self.device = loss_names, device
        self.bad_samples = 0  # samples that this rank has replaced since the start; so is quarantined
        self.quarantined = 0
        self._since_save: list[float] = []  # mean losses of the reports
        self._reset()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this context as waiting for data."""
        started = time.monotonic()
        yield
        self.wait_s += time.monotonic() - started

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Count the time of this context as work that is not training: it is left out of images/s."""
        started = time.monotonic()
        yield
        self.aside_s += time.monotonic() - started

    def note_replaced(self, batch: Batch) -> None:
        """Count the samples of a micro-batch that were replaced by others."""
        self.bad_samples += len(batch.bad)
        self.quarantined += batch.quarantined

    def add(self, losses: Tensor, norm: Tensor, skipped: Tensor) -> None:
        """Add a step: its losses in the order of ``loss_names``, its gradient norm, and whether it was skipped."""
        self.steps += 1
        self.norm, self.skipped = norm, self.skipped + skipped
        self.losses += losses

    def report(self, global_batch: int) -> dict[str, float]:
        """The means over steps and ranks since the last report; collective."""
        skipped = int(self.skipped)  # waits for the device, so that the measured time is right
        spent_s = time.monotonic() - self._began - self.aside_s
        own = torch.tensor([self.wait_s, spent_s, self.aside_s, self.bad_samples, self.quarantined], device=self.device)
        means = mean_over_ranks(torch.cat((self.losses / self.steps, own))).tolist()
        losses = dict(zip(self.loss_names, means, strict=False))
        wait_s, seconds, aside_s, bad, quarantined = means[len(losses) :]
        ranks = torch.distributed.get_world_size()
        values = {
            **losses,
            "grad_norm": float(self.norm),
            "images_per_s": self.steps * global_batch / seconds,
            "step_s": seconds / self.steps,
            "data_wait": wait_s / seconds,
            "other_s": aside_s,
            "skipped_steps": skipped,
            "bad_samples": round(bad * ranks),  # this and the next: samples replaced since the start, on all ranks
            "quarantined_samples": round(quarantined * ranks),
        }
        self._since_save.append(values["loss"])
        self._reset()
        return values

    def loss_since_save(self) -> float:
        """The mean of the losses reported since the last call; inf if there are none."""
        losses, self._since_save = self._since_save, []
        return sum(losses) / len(losses) if losses else math.inf

    def _reset(self) -> None:
        self.steps, self.skipped = 0, torch.zeros((), dtype=torch.int64, device=self.device)
        self.wait_s, self.aside_s, self._began = 0.0, 0.0, time.monotonic()
        self.norm = torch.tensor(math.nan, device=self.device)
        self.losses = torch.zeros(len(self.loss_names), device=self.device)
