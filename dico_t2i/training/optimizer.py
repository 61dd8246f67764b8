"""AdamW, or Muon with AdamW, with exponential moving averages of the weights in the optimizer's state.

With ZeRO the averages are partitioned like the parameters, so that updates and saves need no gathering. They are in
fp32, and are updated exactly when the weights are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import unwrap
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dico_t2i.config import OptimizerConfig
from dico_t2i.runs.kinds import MOMENTS, ema_name

GATHERED = 16  # matrices that all ranks gather at a time


class AdamWEMA(torch.optim.AdamW):
    """AdamW that updates ema <- ema + (1 - decay) (weight - ema) after each step, for each of several decays.

    The averages start at the initial weights. Methods of torch that hide themselves from its compiler, and import all
    of it for that, are called unwrapped: nothing compiles an optimizer.
    """

    def __init__(self, params: Iterable[Any], config: OptimizerConfig) -> None:
        super().__init__(
            params,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.decays = config.ema
        self.veto: Callable[[], Tensor] | None = None  # called before each step: whether to skip it
        self.deferred = False  # keep the answer of veto on the device instead of waiting for it

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        unwrap(torch.optim.AdamW.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        unwrap(torch.optim.AdamW.zero_grad)(self, set_to_none)

    def state_names(self, weight: Tensor) -> tuple[str, ...]:
        """The names of the tensors in a weight's state: moments and averages."""
        return (*self.moments(weight), *map(ema_name, self.decays))

    def moments(self, weight: Tensor) -> tuple[str, ...]:
        """The names of a weight's moments."""
        return MOMENTS

    def materialize(self, weights: Iterable[Tensor], step: int) -> None:
        """Create the state of each weight for step ``step``: moments of 0, and averages equal to the weight."""
        for weight in weights:
            self.state[weight] = {
                "step": torch.tensor(float(step), device=weight.device),
                **{name: torch.zeros_like(weight) for name in self.moments(weight)},
                **{ema_name(decay): weight.detach().clone() for decay in self.decays},
            }

    def part(self, weight: Tensor, name: str, start: int, stop: int) -> Tensor:
        """A range of a tensor in a weight's state, flattened: a view, or a copy if it is not kept in fp32."""
        part: Tensor = self.state[weight][name].view(-1)[start:stop]
        return part

    def settle(self) -> None:
        """Take over the state that was written to the views after ``materialize``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.materialize((w for w in weights if not self.state[w]), step=0)
        skip = self.veto() if self.veto is not None and weights else None
        if not weights or (skip is not None and not self.deferred and skip):
            return
        # torch's kernels skip the step if this is 1.
        self.found_inf = skip.float() if skip is not None and self.deferred else None
        self._update(weights)
        for decay in self.decays:
            averages = [self.state[w][ema_name(decay)] for w in weights]
            if self.found_inf is None:
                torch._foreach_lerp_(averages, weights, 1 - decay)
                continue
            share = (1 - decay) * (1 - self.found_inf)
            for average, weight in zip(averages, weights, strict=True):
                average.lerp_(weight, share)

    def _update(self, weights: Sequence[Tensor]) -> None:
        """Update the weights, all of which have gradients."""
        unwrap(torch.optim.AdamW.step)(self)


class Matrix(NamedTuple):
    """The part of a matrix that this rank keeps: [start, start + numel) of it, from ``offset`` on in a flat tensor."""

    shape: torch.Size
    offset: int
    start: int
    numel: int


class MuonEMA(AdamWEMA):
    """Muon (Jordan et al. 2024) for the matrices of linear layers, AdamW for all other weights, and averages of both.

    The momentum is kept, in shards, where AdamW keeps its first moment; there is no second. A step gathers each matrix
    of momenta on one rank, which orthogonalizes it with torch's own Muon and sends it to the others. The update has the
    root mean square of AdamW's (Liu et al., arXiv 2502.16982), so that learning rate and weight decay mean the same.
    """

    def __init__(self, network: nn.Module, config: OptimizerConfig) -> None:
        self.names = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, nn.Linear)}
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for name, p in trained if name not in self.names]},
            {"params": [p for name, p in trained if name in self.names], "matrices": True},
        ]
        super().__init__([group for group in groups if group["params"]], config)
        self.momentum = config.momentum
        self.matrices: dict[Tensor, list[Matrix]] = {}  # of each flat tensor, in the same order on all ranks
        self.divided = False  # whether ranks keep different parts of a flat tensor's matrices

    def moments(self, weight: Tensor) -> tuple[str, ...]:
        return MOMENTS[:1] if weight in self.matrices else MOMENTS

    def _update(self, weights: Sequence[Tensor]) -> None:
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("matrices")]
        super()._update(weights)
        self.param_groups = groups
        for group in groups:
            for weight in group["params"] if group.get("matrices") else ():
                if weight.grad is not None:
                    self._update_matrices(weight, group)

    def _update_matrices(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Update a flat tensor of matrices, unless ``found_inf`` is 1; collective if other ranks keep parts of them."""
        state, gradient = self.state[weight], weight.grad
        assert gradient is not None
        momentum = state[MOMENTS[0]]
        done: Tensor | float = 1.0
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, momentum, gradient)  # which leaves the momentum unchanged
            done = 1 - self.found_inf
        momentum.lerp_(gradient, 1 - self.momentum)
        direction = gradient.lerp(momentum, self.momentum)
        weight.mul_(1 - group["lr"] * group["weight_decay"] * done)
        flat = weight.view(-1)
        for matrix, part in (_gathered if self.divided else _local)(direction.view(-1), self.matrices[weight]):
            flat[matrix.offset : matrix.offset + matrix.numel].add_(part * done, alpha=group["lr"])
        state["step"] += done


def _local(flat: Tensor, matrices: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield each matrix, all of which are whole here, and Muon's change of it at learning rate 1."""
    changes = _changes([_whole(flat, matrix) for matrix in matrices])
    return zip(matrices, (change.view(-1) for change in changes), strict=True)


def _gathered(flat: Tensor, matrices: Sequence[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
    """Yield each matrix, and this rank's part of Muon's change of it at learning rate 1; collective."""
    rank, owners = dist.get_rank(), min(dist.get_world_size(), GATHERED)
    for first in range(0, len(matrices), owners):
        batch = matrices[first : first + owners]
        wholes = [_whole(flat, matrix) for matrix in batch]
        for owner, whole in enumerate(wholes):
            dist.reduce(whole, owner)
        if rank < len(batch):
            wholes[rank] = _changes([wholes[rank]])[0]
        for owner, (matrix, whole) in enumerate(zip(batch, wholes, strict=True)):
            dist.broadcast(whole, owner)
            yield matrix, whole.view(-1)[matrix.start : matrix.start + matrix.numel]


def _whole(flat: Tensor, matrix: Matrix) -> Tensor:
    """A matrix with zeros where other ranks keep it."""
    whole = torch.zeros(matrix.shape, device=flat.device)
    part = flat[matrix.offset : matrix.offset + matrix.numel]
    whole.view(-1)[matrix.start : matrix.start + matrix.numel] = part
    return whole


def _changes(directions: Sequence[Tensor]) -> list[Tensor]:
    """What torch's Muon adds to weights for these gradients, without momentum, at learning rate 1."""
    changes = [torch.zeros_like(direction) for direction in directions]
    for change, direction in zip(changes, directions, strict=True):
        change.grad = direction
    torch.optim.Muon(
        changes, lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    ).step()
    return [change.detach() for change in changes]


def learning_rate(config: OptimizerConfig, step: int, total: int, warmup: int, decay: int = 0) -> float:
    """The rate of step ``step`` (from 0) of ``total``.

    It rises linearly for ``warmup`` steps. Then it is constant, a cosine to 0, or constant until it falls linearly to 0
    in the last ``decay`` steps.
    """
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        return config.lr * min(1.0, (total - step) / decay)
    progress = (step - warmup) / max(1, total - warmup)
    return config.lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, progress), dtype=torch.float64)).item())
