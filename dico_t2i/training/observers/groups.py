"""Sums by group whose order of additions is fixed, unlike that of index_add_ on a GPU."""

import torch
from torch import Tensor


def group_sums(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum values (n, k) of equal ``groups`` (n,), integers below ``count`` -> (count, k), in the dtype of values."""
    member = groups[:, None] == torch.arange(count, device=groups.device)
    return torch.where(member[..., None], values[:, None], 0).sum(0)
