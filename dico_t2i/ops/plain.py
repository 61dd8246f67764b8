"""The operators in torch alone, for any device and dtype; the only implementation for float64."""

import torch
from torch import Tensor

from dico_t2i.ops.convolution import conv3x3

NORM_EPS = 1e-6

aten = torch.ops.aten


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged if it is float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _each(vector: Tensor) -> Tensor:
    """(N, C) -> (N, 1, 1, C), in float32 or more."""
    return _wide(vector)[:, None, None]


def norm_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    residual = None if branch is None else x + branch if gate is None else scale_forward(branch, gate, x)
    source = _wide(x if residual is None else residual)
    out, mean, rstd = aten.native_layer_norm(source, source.shape[-1:], None, None, NORM_EPS)
    if scale is not None and shift is not None:
        out = torch.addcmul(_each(shift), out, 1 + _each(scale))
    return residual, out.to(x.dtype), mean[..., 0], rstd[..., 0]


def norm_backward(
    source: Tensor,
    mean: Tensor,
    rstd: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    grad_residual: Tensor | None,
    grad_out: Tensor,
    again: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, branch and gate, the sum of that of x over pixels, gradients of shift and scale, and the output.

    source: x with a gate, so that the residual is made again and need not be kept; otherwise the residual. The sum,
    (N, C) in float32 or more, is there with a gate, the output of ``norm_forward`` with ``again``.
    """
    residual = source if gate is None or branch is None else scale_forward(branch, gate, source)
    source, grad, mean, rstd = _wide(residual), _wide(grad_out), mean[..., None], rstd[..., None]
    grad_branch = grad_gate = grad_sum = grad_shift = grad_scale = None
    if scale is not None:
        grad_shift = grad.sum((1, 2)).to(scale.dtype)
        grad_scale = (grad * ((source - mean) * rstd)).sum((1, 2)).to(scale.dtype)
        grad = grad * (1 + _each(scale))
    none = [True, False, False]
    grad_x = aten.native_layer_norm_backward(grad, source, source.shape[-1:], mean, rstd, None, None, none)[0]
    if grad_residual is not None:
        grad_x = grad_x + grad_residual
    grad_x = grad_x.to(residual.dtype)
    if gate is not None and branch is not None:
        grad_branch, grad_gate, grad_sum = scale_backward(branch, gate, grad_x)
    out = norm_forward(residual, None, None, shift, scale)[1] if again else None
    return grad_x, grad_branch, grad_gate, grad_sum, grad_shift, grad_scale, out


def scale_forward(x: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    scaled = _each(scale).to(x.dtype)
    return x * scaled if base is None else torch.addcmul(base, x, scaled)


def scale_backward(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and scale, and the sum of ``grad`` over pixels (N, C) in float32 or more."""
    wide = _wide(grad)
    return grad * _each(scale).to(grad.dtype), (wide * x).sum((1, 2)).to(scale.dtype), wide.sum((1, 2))


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of GELU's input x, its sum over pixels (C,) in float32 or more, and GELU of x."""
    grad_x = aten.gelu_backward(grad, x)
    return grad_x, _wide(grad_x).flatten(0, -2).sum(0), torch.nn.functional.gelu(x)


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A linear layer, and GELU of it."""
    out = torch.nn.functional.linear(x, weight, bias)
    return out, torch.nn.functional.gelu(out)


def gelu_linear_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What ``gelu_backward`` returns, from the gradient of a linear layer of GELU."""
    return gelu_backward(x, grad @ weight)


def gate_linear_forward(x: Tensor, factor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of x times a factor for each sample and channel."""
    return torch.nn.functional.linear(scale_forward(x, factor, None), weight, bias)


def gate_linear_backward(x: Tensor, factor: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and factor, from that of such a layer, and x times factor."""
    grad_x, grad_factor, _ = scale_backward(x, factor, grad @ weight)
    return grad_x, grad_factor, scale_forward(x, factor, None)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.nn.functional.gelu(_depthwise(x, weight, bias))
    return out, out.mean((1, 2))


def depthwise_backward(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, grad_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, and the sum of that of x over pixels (C,) in float32 or more."""
    _, H, W, C = x.shape
    slope = aten.gelu_backward(grad + (grad_mean / (H * W))[:, None, None], _depthwise(x, weight, bias))
    planes, source = slope.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2)
    with torch.autocast(x.device.type, enabled=False):
        grads = aten.convolution_backward(
            planes, source, weight.to(x.dtype), [C], [1, 1], [1, 1], [1, 1], False, [0, 0], C, [True, True, True]
        )
    grad_x = grads[0].permute(0, 2, 3, 1).contiguous()
    return grad_x, grads[1].to(weight.dtype), grads[2].to(bias.dtype), _wide(grad_x).sum((0, 1, 2))


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return conv3x3(x, weight.to(x.dtype), bias.to(x.dtype), groups=x.shape[-1]).contiguous()


def text_forward(x: Tensor, context: Tensor, kernel: int, base: Tensor | None = None) -> Tensor:
    out = _pixels(_correlate(_planes(x), _kernels(context, kernel), kernel))
    return out if base is None else base + out


def text_backward(
    x: Tensor, context: Tensor, grad: Tensor, kernel: int, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and context.

    The gradient of the kernels is the correlation of the input with the output gradient, that is, a convolution with a
    kernel as large as the image. torch's own backward takes about 20 times as long for it.
    """
    planes = _planes(grad)
    grad_x = _pixels(_correlate(planes, _kernels(context, kernel).flip(2, 3), kernel)) if wants[0] else None
    grad_context = _tokens(_correlate(_planes(x), planes, kernel), context.shape[1]) if wants[1] else None
    return grad_x, grad_context


def _correlate(planes: Tensor, kernels: Tensor, size: int) -> Tensor:
    """Correlate planes (N, C, H, W) with kernels (N, C, h, w), one for each sample and channel; padding size // 2."""
    N, C, H, W = planes.shape
    flat, weights = planes.reshape(1, N * C, H, W), kernels.reshape(N * C, 1, *kernels.shape[2:])
    with torch.autocast(planes.device.type, enabled=False):
        out = torch.nn.functional.conv2d(flat, weights, padding=size // 2, groups=N * C)
    return out.reshape(N, C, *out.shape[2:])


def _kernels(context: Tensor, size: int) -> Tensor:
    """Tokens (N, T, C) -> kernels (N, C, size, size); the taps from T on repeat the last token."""
    N, T, C = context.shape
    taps = torch.cat((context, context[:, -1:].expand(-1, size**2 - T, -1)), dim=1)
    return _transposed(taps).reshape(N, C, size, size)


def _tokens(kernels: Tensor, count: int) -> Tensor:
    """The adjoint of ``_kernels``: (N, C, size, size) -> (N, T, C); the repeated taps are summed."""
    taps = _transposed(kernels.flatten(2))
    return torch.cat((taps[:, : count - 1], taps[:, count - 1 :].sum(1, keepdim=True)), dim=1)


def _planes(x: Tensor) -> Tensor:
    """(N, H, W, C) -> contiguous (N, C, H, W)."""
    N, H, W, C = x.shape
    return _transposed(x.reshape(N, H * W, C)).reshape(N, C, H, W)


def _pixels(planes: Tensor) -> Tensor:
    """(N, C, H, W) -> contiguous (N, H, W, C)."""
    N, C, H, W = planes.shape
    return _transposed(planes.reshape(N, C, H * W)).reshape(N, H, W, C)


def _transposed(x: Tensor) -> Tensor:
    """(N, a, b) -> contiguous (N, b, a). torch transposes single matrices up to three times faster than a batch."""
    out = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    for n in range(len(x)):
        out[n] = x[n].T
    return out
