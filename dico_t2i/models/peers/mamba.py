"""The Mamba mixer (Gu and Dao 2023) that DiS and DiM are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dico_t2i.ops import causal_conv, selective_scan

STATES = 16  # numbers in the state of a channel
STEP_RANGE = (1e-3, 1e-1)  # of the initial steps
SMALLEST_STEP = 1e-4


class CausalConv(nn.Module):
    """Depthwise convolution along the tokens of (N, L, C), in which a token sees itself and those before it."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        plain = nn.Conv1d(channels, channels, kernel, groups=channels)
        self.weight, self.bias = plain.weight, plain.bias

    def forward(self, x: Tensor, backwards: bool) -> Tensor:
        assert self.bias is not None
        return causal_conv(x, self.weight, self.bias, backwards)


class MambaMixer(nn.Module):
    """Mamba on tokens (N, L, C); both_ways adds the scan of the reversed tokens, with parameters of its own.

    depth: the number of blocks of the network, by which the last layer's initial weights are scaled.
    """

    def __init__(self, width: int, kernel: int, depth: int, both_ways: bool = False) -> None:
        super().__init__()
        inner, self.rank = 2 * width, math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = CausalConv(inner, kernel)
        self.x_proj = nn.Linear(inner, self.rank + 2 * STATES, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log, self.D = nn.Parameter(torch.empty(inner, STATES)), nn.Parameter(torch.empty(inner))
        self.both_ways = both_ways
        if both_ways:
            self.conv1d_b = CausalConv(inner, kernel)
            self.x_proj_b = nn.Linear(inner, self.rank + 2 * STATES, bias=False)
            self.dt_proj_b = nn.Linear(self.rank, inner)
            self.A_b_log, self.D_b = nn.Parameter(torch.empty(inner, STATES)), nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.reset_parameters(depth)

    @torch.no_grad()
    def reset_parameters(self, depth: int) -> None:
        """The second direction's steps have no special start: they begin near softplus(0)."""
        for A_log, D in ((self.A_log, self.D), *(((self.A_b_log, self.D_b),) if self.both_ways else ())):
            A_log.copy_(torch.arange(1, STATES + 1, dtype=A_log.dtype, device=A_log.device).log().expand_as(A_log))
            nn.init.ones_(D)
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = map(math.log, STEP_RANGE)
        steps = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp().clamp_min(SMALLEST_STEP)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus
        if self.both_ways:
            nn.init.zeros_(self.dt_proj_b.bias)
        self.out_proj.weight.div_(math.sqrt(depth))

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.in_proj(x).chunk(2, dim=-1)
        mixed = self._scan(inner, gate, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D, False)
        if self.both_ways:
            second = (self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
            mixed = mixed + self._scan(inner, gate, *second, True)
        return self.out_proj(mixed)

    def _scan(
        self,
        inner: Tensor,
        gate: Tensor,
        conv: CausalConv,
        project: nn.Linear,
        steps: nn.Linear,
        A_log: Tensor,
        D: Tensor,
        backwards: bool,
    ) -> Tensor:
        u = F.silu(conv(inner, backwards))
        low, B, C = project(u).split((self.rank, STATES, STATES), dim=-1)
        A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))
        return selective_scan(u, F.linear(low, steps.weight), A, B, C, D, gate, steps.bias, backwards)


def without_biases(network: nn.Module) -> None:
    """Set the biases of all linear layers to 0, but for the initial steps of the mixers, which are biases too."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None and not name.endswith("dt_proj"):
            nn.init.zeros_(module.bias)
