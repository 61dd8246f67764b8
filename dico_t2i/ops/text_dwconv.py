"""The text convolution: every sample has its own 9x9 depthwise kernels, made from its text (paper, section 3.4)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_SIZE = 9
TAPS = KERNEL_SIZE**2
PADDING = KERNEL_SIZE // 2


def text_dwconv(x: Tensor, context: Tensor) -> Tensor:
    """Convolve each channel of each sample with the kernel that its text tokens spell.

    x (N, C, H, W) in any memory format; context (N, T, C), 1 <= T <= 81, in any dtype. The last token repeats
    up to 81, token 9i + j of channel c is tap (i, j) of the kernel of channel c. Cross-correlation, stride 1, zero
    padding 4. Computed in x's dtype, or in autocast's. Returns (N, C, H, W) in x's memory format; differentiable
    once in both.
    Raises ValueError when the shapes do not fit.
    """
    N, C = x.shape[:2]
    if x.ndim != 4 or context.ndim != 3 or context.shape[::2] != (N, C) or not 1 <= context.shape[1] <= TAPS:
        raise ValueError(
            f"text_dwconv: x (N, C, H, W) and context (N, 1 to {TAPS} tokens, C) expected,"
            f" got {tuple(x.shape)} and {tuple(context.shape)}"
        )
    dtype = _working_dtype(x)
    return _TextConvolution.apply(x.to(dtype), context.to(dtype))


def _working_dtype(x: Tensor) -> torch.dtype:
    """autocast's dtype where it is on, so that forward and backward see the same one; else that of x."""
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class _TextConvolution(torch.autograd.Function):
    """A grouped convolution, with its own backward.

    The kernel gradient correlates the input with the output gradient: a forward convolution whose kernel is as
    large as the image. torch's own backward computes it some 20 times slower.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Tensor) -> Tensor:
        ctx.save_for_backward(x, context)
        return _correlate(x, _kernels(context), PADDING)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, context = ctx.saved_tensors
        grad_x = grad_context = None
        if ctx.needs_input_grad[0]:
            grad_x = _correlate(grad, _kernels(context).flip(2, 3), PADDING)
        if ctx.needs_input_grad[1]:
            grad_context = _tokens(_correlate(x, grad, PADDING), context.shape[1])
        return grad_x, grad_context


def _correlate(x: Tensor, kernels: Tensor, padding: int) -> Tensor:
    """x (N, C, H, W) with kernels (N, C, h, w), one for each sample and channel, in x's memory format."""
    N, C, H, W = x.shape
    planes = x.reshape(1, N * C, H, W)
    out = F.conv2d(planes, kernels.reshape(N * C, 1, *kernels.shape[2:]), padding=padding, groups=N * C)
    out = out.reshape(N, C, *out.shape[2:])
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return out.contiguous(memory_format=torch.channels_last) if channels_last else out


def _kernels(context: Tensor) -> Tensor:
    """Tokens (N, T, C) -> kernels (N, C, 9, 9); taps T to 80 repeat the last token."""
    N, T, C = context.shape
    taps = torch.cat((context, context[:, -1:].expand(-1, TAPS - T, -1)), dim=1)
    return taps.transpose(1, 2).reshape(N, C, KERNEL_SIZE, KERNEL_SIZE)


def _tokens(kernels: Tensor, count: int) -> Tensor:
    """The adjoint of ``_kernels``: (N, C, 9, 9) -> (N, T, C), the repeated taps summed."""
    taps = kernels.flatten(2).transpose(1, 2)
    return torch.cat((taps[:, : count - 1], taps[:, count - 1 :].sum(1, keepdim=True)), dim=1)
