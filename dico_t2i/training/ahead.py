"""Prepares the next micro-batch while the device works on the current one."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """Fetches a batch and makes the network's inputs from it, one batch ahead of their use.

    On a GPU the copies, the frozen encoders and the random draws run on their own stream, in parallel with the network.
    The inputs must be a function of the batch alone, so that the time at which they are made does not matter.
    """

    def __init__(self, fetch: Callable[[], T], make: Callable[[T], R], device: torch.device) -> None:
        self._fetch, self._make, self._device = fetch, make, device
        self._next: tuple[T, R] | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # so that the encoders' weights are complete

    def start(self) -> None:
        """Start on the next batch, unless that has been done; waits for its data, but not for the device."""
        if self._next is None:
            batch = self._fetch()
            with self._beside():
                self._next = batch, self._make(batch)

    def take(self) -> tuple[T, R]:
        """The next batch and the inputs made from it, for use on the current stream."""
        self.start()
        assert self._next is not None
        (batch, made), self._next = self._next, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in _tensors(made):
                tensor.record_stream(current)  # so that its memory is not reused before this stream is done with it
        return batch, made

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


def _tensors(made: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.is_cuda]
