"""The next micro-batch, made ready while the device works on the one before."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """Fetches a batch and makes the network's inputs of it, one ahead of their use.

    On a GPU the copies, the frozen encoders and the random draws run on a stream of their own, beside the network's.
    What is made must be a function of the batch alone: then it does not matter when.
    """

    def __init__(self, fetch: Callable[[], T], make: Callable[[T], R], device: torch.device) -> None:
        self._fetch, self._make, self._device = fetch, make, device
        self._next: tuple[T, R] | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))  # the encoders' weights are there

    def start(self) -> None:
        """Begin with the next batch, unless it is under way already; waits for its data, not for the device."""
        if self._next is None:
            batch = self._fetch()
            with self._beside():
                self._next = batch, self._make(batch)

    def take(self) -> tuple[T, R]:
        """The next batch and what was made of it, for use on the current stream."""
        self.start()
        assert self._next is not None
        (batch, made), self._next = self._next, None
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in _tensors(made):
                tensor.record_stream(current)  # its memory is not free for the other stream before this one is done
        return batch, made

    def _beside(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()


def _tensors(made: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.is_cuda]
