"""The text convolution: each sample has its own depthwise kernels, made from its text (paper, section 3.4)."""

from typing import Any

import torch
from torch import Tensor

from dico_t2i.ops.backend import backend, present, working_dtype
from dico_t2i.ops.operator import flop_formula, operator


def text_dwconv(x: Tensor, context: Tensor, kernel: int = 9) -> Tensor:
    """Convolve each channel of each sample with the k x k kernel that its text tokens form; the paper's k is 9.

    x (N, C, H, W) in any memory format; only channels-last needs no copy. context (N, T, C), 1 <= T <= k * k, in any
    dtype. kernel: k, odd. The last token is repeated up to k * k tokens, and token k * i + j of channel c is tap (i, j)
    of the kernel of channel c. Cross-correlation, stride 1, zero padding k // 2. It is computed in x's dtype, or in
    that of autocast; sums are in float32, or in float64 if x is. Returns (N, C, H, W) in x's memory format. It can be
    differentiated once with respect to both inputs. Raises ValueError when the shapes do not fit.
    """
    N, C = x.shape[:2]
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"text_dwconv: kernel must be odd, got {kernel}")
    if x.ndim != 4 or context.ndim != 3 or context.shape[::2] != (N, C) or not 1 <= context.shape[1] <= kernel**2:
        raise ValueError(
            f"text_dwconv: x (N, C, H, W) and context (N, 1 to {kernel**2} tokens, C) expected,"
            f" got {tuple(x.shape)} and {tuple(context.shape)}"
        )
    dtype = working_dtype(x)
    out = torch.ops.dico_t2i.text_dwconv(x.to(dtype).permute(0, 2, 3, 1), context.to(dtype), kernel, None)
    out = out.permute(0, 3, 1, 2)
    return out.contiguous() if x.is_contiguous() else out


@operator("text_dwconv")
def _text(x: Tensor, context: Tensor, kernel: int, base: Tensor | None) -> Tensor:
    """With ``base``, the sum of it and the convolution."""
    base = None if base is None else base.contiguous()
    return backend(x).text_forward(x.contiguous(), context.contiguous(), kernel, base)


@operator("text_dwconv_backward")
def _text_backward(
    x: Tensor | None, context: Tensor, grad: Tensor, kernel: int, wants_x: bool, wants_context: bool
) -> tuple[Tensor, Tensor]:
    """x may be None if only its gradient is wanted."""
    inputs = (tensor.contiguous() for tensor in (grad if x is None else x, context, grad))
    return present(*backend(grad).text_backward(*inputs, kernel, (wants_x, wants_context)))  # type: ignore[return-value]


@_text.register_fake
def _(x: Tensor, context: Tensor, kernel: int, base: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@_text_backward.register_fake
def _(
    x: Tensor | None, context: Tensor, grad: Tensor, kernel: int, wants_x: bool, wants_context: bool
) -> tuple[Tensor, ...]:
    wants = ((wants_x, grad), (wants_context, context))
    return present(*(like.new_empty(like.shape) if wanted else None for wanted, like in wants))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kernel, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *wants, _, wants_base = ctx.needs_input_grad
    grads = torch.ops.dico_t2i.text_dwconv_backward(*ctx.saved_tensors, grad, ctx.kernel, *wants)
    given = (gradient if wanted else None for gradient, wanted in zip(grads, wants, strict=True))
    return (*given, None, grad if wants_base else None)


_text.register_autograd(_differentiate, setup_context=_keep)


@flop_formula(torch.ops.dico_t2i.text_dwconv)
def _flops(x_shape: tuple[int, ...], context_shape: Any, kernel: int, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * kernel**2 * torch.Size(x_shape).numel()


@flop_formula(torch.ops.dico_t2i.text_dwconv_backward)
def _backward_flops(
    x_shape: Any, context_shape: Any, grad_shape: Any, kernel: int, wants_x: bool, wants_context: bool, **_: Any
) -> int:
    return (wants_x + wants_context) * _flops(grad_shape, context_shape, kernel)
