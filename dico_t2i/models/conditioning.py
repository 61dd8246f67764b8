"""What enters the network through adaLN: the timestep, and a class or a pooled text."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SINUSOID_DIM = 256


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Timestep features: cosines, then sines, of t * 10000^(-k / (dim // 2)); a zero column if dim is odd.

    t (N,), possibly fractional -> (N, dim), in float64 if t is float64, else in float32.
    """
    half = dim // 2
    t = t.to(torch.promote_types(torch.float32, t.dtype))
    k = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[:, None] * torch.exp(-math.log(10000) * k / half)
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """Sinusoid and a two-layer MLP: (N,) -> (N, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(SINUSOID_DIM, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.hidden.weight.dtype
        # A float64 network takes float64 features; all others take float32 ones, rounded at the end.
        features = sinusoid(t.to(torch.promote_types(torch.float32, dtype)), SINUSOID_DIM)
        return self.out(F.silu(self.hidden(features.to(dtype))))
