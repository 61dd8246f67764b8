"""Measures how local attention between image tokens is, by average maps around the query and numbers from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOWS = (3, 5)  # tokens a side


class RelativeMap:
    """Attention as a function of where the key lies relative to the query, averaged over queries, heads and samples.

    grid: rows and columns of image tokens, h and w. ``shares`` (2h-1, 2w-1), float64: at [h-1+dy, w-1+dx] the attention
    that an average query gives to the token dy rows below and dx columns to the right of it; they sum to 1.
    """

    def __init__(self, grid: tuple[int, int]) -> None:
        self.grid = grid
        self.queries = 0
        self.outside_sum = 0.0  # attention to tokens that are not part of the image
        self._sums = torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, dtype=torch.float64)

    def add(self, heads: Iterable[Tensor]) -> None:
        """Add the attention (h w, T) of some heads, from image tokens to T keys, the last of which are the image's.

        Rows must sum to 1.
        """
        tokens = self.grid[0] * self.grid[1]
        total: Tensor | float = 0.0
        for rows in heads:
            image = rows[:, -tokens:].double()
            mass = image.sum(-1, keepdim=True)
            self.outside_sum += float(rows[:, :-tokens].sum())
            self.queries += tokens
            total = total + image / mass.clamp(min=1e-30)
        assert isinstance(total, Tensor), "no heads"
        sums = torch.zeros(self._sums.numel(), dtype=torch.float64, device=total.device)
        sums.index_add_(0, _offsets(self.grid).to(total.device).flatten(), total.flatten())
        self._sums += sums.view(self._sums.shape).cpu()

    @property
    def shares(self) -> Tensor:
        return self._sums / self.queries

    def picture(self) -> Tensor:
        """The mean attention to a token at each offset, over the queries with such a token, (2h-1, 2w-1)."""
        return self.shares / (uniform_shares(self.grid) * self.grid[0] * self.grid[1])

    def locality(self) -> Locality:
        return locality(self.shares, self.outside_sum / self.queries)


@dataclass(frozen=True)
class Locality:
    """The numbers of a relative map.

    distance: mean Euclidean distance from query to key, in tokens. window: by its side in tokens, the share of
    attention in a square window around the query. outside: share of attention to tokens that are not part of the image,
    which the other numbers ignore.
    """

    distance: float
    window: dict[int, float]
    outside: float


def locality(shares: Tensor, outside: float = 0.0) -> Locality:
    """The numbers of a relative map, (2h-1, 2w-1) with sum 1 and offset 0 in the middle."""
    rows, columns = (torch.arange(n, dtype=torch.float64) - n // 2 for n in shares.shape)
    distance = (rows[:, None].square() + columns[None].square()).sqrt()
    chebyshev = torch.maximum(rows[:, None].abs(), columns[None].abs())
    return Locality(
        distance=float((shares * distance).sum()),
        window={side: float(shares[chebyshev <= side // 2].sum()) for side in WINDOWS},
        outside=outside,
    )


def uniform_shares(grid: tuple[int, int]) -> Tensor:
    """The relative map of attention that is the same for every token: (h-|dy|)(w-|dx|) / (h w)^2."""
    rows, columns = ((n - (torch.arange(2 * n - 1, dtype=torch.float64) - (n - 1)).abs()) / n**2 for n in grid)
    return torch.outer(rows, columns)


def _offsets(grid: tuple[int, int]) -> Tensor:
    """For each query and key, the position of their offset in a flattened relative map, (h w, h w)."""
    h, w = grid
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    down, right = (key[None] - key[:, None] for key in (row, column))
    return (down + h - 1) * (2 * w - 1) + right + w - 1
