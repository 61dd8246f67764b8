"""AdamW whose moments rest in 8 bits between steps (Dettmers et al., arXiv 2110.02861), with torchao's quantization.

A block of 256 moments has one scale, its largest absolute value, and an 8-bit code for each of them. A step converts
them to fp32 in parts, updates them with torch's AdamW, and converts them back. Checkpoints hold them in fp32.

The smallest value of torchao's map for signed numbers is -0.993. It is -1 here, so that the largest value of a block is
always among those of the map. Converting to fp32 and back then changes nothing, and a resumed run is bit-identical.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from dico_t2i.config import ConfigError, OptimizerConfig
from dico_t2i.runs.kinds import MOMENTS
from dico_t2i.training.optimizer import AdamWEMA

BLOCK = 256
PART = 1 << 22  # moments that are in fp32 at a time, a multiple of BLOCK


class Packed(NamedTuple):
    """Moments in 8 bits: codes, padded to whole blocks, and the scale of each block."""

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


class Adam8bitEMA(AdamWEMA):
    """``AdamWEMA`` with moments of 8 bits. Raises ConfigError without torchao."""

    def __init__(self, params: Iterable[Any], config: OptimizerConfig) -> None:
        super().__init__(params, config)
        try:
            from torchao.optim import quant_utils
        except ImportError:
            raise ConfigError(
                "optimizer.kind: adamw_8bit needs the package torchao; pip install 'dico_t2i[8bit]'"
            ) from None
        self.torchao = quant_utils
        signed = quant_utils.create_dynamic_map(signed=True)
        self.maps = dict(zip(MOMENTS, ([-1.0, *signed[1:]], quant_utils.create_dynamic_map(signed=False)), strict=True))

    def settle(self) -> None:
        for weight, state in self.state.items():
            for name in MOMENTS:
                if isinstance(state[name], Tensor):
                    self.state[weight][name] = self._packed(state[name].view(-1), name)

    def part(self, weight: Tensor, name: str, start: int, stop: int) -> Tensor:
        held = self.state[weight][name]
        if isinstance(held, Tensor):
            return super().part(weight, name, start, stop)
        first, last = start // BLOCK, -(-stop // BLOCK)
        values = self.torchao.dequant_with_qmap(
            held.codes[first * BLOCK : last * BLOCK], self._map(name, weight.device), held.scales[first:last]
        )
        return values[start - first * BLOCK : stop - first * BLOCK]

    def _update(self, weights: Sequence[Tensor]) -> None:
        self.settle()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update_weight(weight, group)

    def _update_weight(self, weight: Tensor, group: dict[str, Any]) -> None:
        assert weight.grad is not None
        flat, gradient, state = weight.view(-1), weight.grad.reshape(-1), self.state[weight]
        step = state["step"]
        for start in range(0, flat.numel(), PART):
            stop = min(start + PART, flat.numel())
            moments = {name: self.part(weight, name, start, stop) for name in MOMENTS}
            step = state["step"].clone()
            adamw(
                [flat[start:stop]],
                [gradient[start:stop]],
                [moments[MOMENTS[0]]],
                [moments[MOMENTS[1]]],
                [],
                [step],
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for name, moment in moments.items():
                packed = self._packed(moment, name)
                state[name].codes[start : start + len(packed.codes)] = packed.codes
                state[name].scales[start // BLOCK : start // BLOCK + len(packed.scales)] = packed.scales
        state["step"].copy_(step)

    def _packed(self, values: Tensor, name: str) -> Packed:
        padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK))
        parts = []
        for part in padded.split(PART):
            scaled, scales = self.torchao.scale_tensor(part, BLOCK)
            parts.append((self.torchao.quantize_8bit_with_qmap(scaled, self._map(name, values.device)), scales))
        codes, scales = zip(*parts, strict=True)
        return Packed(torch.cat(codes), torch.cat(scales))

    def _map(self, name: str, device: torch.device) -> Tensor:
        return torch.tensor(self.maps[name], device=device)
