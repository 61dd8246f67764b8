"""The operators of ``dico_t2i.ops`` in an exported folder: in plain torch on every device.

Inputs are made contiguous, as in ``dico_t2i.ops``, because torch chooses its convolutions, and with them the last bits
of results, by memory layout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dico_t2i.ops.plain import depthwise_forward, norm_forward, scale_forward, text_forward


def norm_modulate(x: Tensor, shift: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    return norm_forward(x.contiguous(), None, None, shift, scale)[1]


def residual_norm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    return norm_forward(x.contiguous(), branch.to(x.dtype).contiguous(), gate, shift, scale)[:2]


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    if branch is None:
        return x, F.linear(norm_modulate(x, shift, scale), weight, bias)
    residual, normed = residual_norm_modulate(x, branch, gate, shift, scale)
    return residual, F.linear(normed, weight, bias)


def norm_linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    residual, out = norm_linear(x, weight, bias, shift, scale, branch, gate)
    return residual, out, F.gelu(out)


def gelu_linear(
    x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None, activated: Tensor | None = None
) -> Tensor:
    return F.linear(F.gelu(x) if activated is None else activated, weight, bias)


def norm_text_dwconv(
    x: Tensor, branch: Tensor, gate: Tensor, context: Tensor, kernel: int, branch_bias: Tensor | None = None
) -> Tensor:
    residual, normed = residual_norm_modulate(x, branch, gate)
    return text_forward(normed, context.to(x.dtype).contiguous(), kernel, residual)


def depthwise3x3_gelu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return depthwise_forward(x.contiguous(), weight, bias)


def channel_scale(x: Tensor, scale: Tensor) -> Tensor:
    return scale_forward(x.contiguous(), scale, None)


def channel_gate(x: Tensor, logits: Tensor) -> Tensor:
    return channel_scale(x, torch.sigmoid(logits))


def gate_linear(x: Tensor, logits: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(channel_gate(x, logits), weight, bias)


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, branch_bias: Tensor | None = None) -> Tensor:
    return scale_forward(branch.to(x.dtype).contiguous(), gate, x.contiguous())


def text_dwconv(x: Tensor, context: Tensor, kernel: int = 9) -> Tensor:
    pixels, tokens = x.permute(0, 2, 3, 1).contiguous(), context.to(x.dtype).contiguous()
    return text_forward(pixels, tokens, kernel).permute(0, 3, 1, 2)
