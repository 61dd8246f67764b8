"""Matrix products together with the GELU or the gate beside them, as Triton kernels, for GPUs; not timed yet.

A product and what is beside it read and write the same tensor. Where the layer is narrow, the memory limits both, and
one kernel saves passes over that tensor in each direction. A program makes a tile of the product with the tensor cores,
and finishes it in four parts, so that two programs fit on a multiprocessor: the memory serves one of them while the
other multiplies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_t2i.ops.kernels_gelu import FUSED, slope, tail
from dico_t2i.ops.linear import PIXELS

TILE = PIXELS  # rows and columns of a program
STAGES = {64: 3, 32: 4}  # channels of a step -> steps that are loaded ahead
WARPS, REGISTERS = 8, 128  # of a program; registers of a thread: two programs fit on a multiprocessor


@triton.jit
def _product(
    left, right, factor, rows, columns, M, N, K, inner_stride, column_stride,
    SCALED: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """(TILE, TILE) in float32, in four parts from left to right; left is (M, K).

    SCALED: left is first multiplied by factor (K,). EVEN: INNER divides K.
    """
    inner = tl.arange(0, INNER)
    at_left = left + rows.to(tl.int64)[:, None] * K + inner[None, :]
    at_right = right + inner[:, None] * inner_stride + columns[None, :] * column_stride
    known_left, known_right = (rows < M)[:, None], (columns < N)[None, :]
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, INNER):
        if not EVEN:
            known_left = (rows < M)[:, None] & (inner < K - start)[None, :]
            known_right = (columns < N)[None, :] & (inner < K - start)[:, None]
        a, b = tl.load(at_left, known_left, other=0.0), tl.load(at_right, known_right, other=0.0)
        if SCALED:
            scale = tl.load(factor + start + inner, inner < K - start, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) * scale[None, :]).to(a.dtype)
        total = tl.dot(a, b, total, input_precision="ieee")
        at_left += INNER
        at_right += INNER * inner_stride
    first, second = _halves(total, TILE, TILE)
    parts = _halves(first, TILE, TILE // 2)
    return parts + _halves(second, TILE, TILE // 2)


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _place(N, TILE: tl.constexpr):
    """Row of tiles, first row and first column of the program; neighbours share the rows of the left factor."""
    across = tl.cdiv(N, TILE)
    row = tl.program_id(0) // across
    return row, row * TILE, tl.program_id(0) % across * TILE


@triton.jit
def _part(rows, first, M, N, number: tl.constexpr, TILE: tl.constexpr):
    """Columns, offsets and mask of a fourth of the program's tile."""
    columns = first + number * (TILE // 4) + tl.arange(0, TILE // 4)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    return columns, rows.to(tl.int64)[:, None] * N + columns[None, :], mask


@triton.jit
def _linear_gelu(x, weight, bias, out, activated, M, N, K, EVEN: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr):
    _, above, first = _place(N, TILE)
    rows = above + tl.arange(0, TILE)
    parts = _product(x, weight, x, rows, first + tl.arange(0, TILE), M, N, K, 1, K, False, EVEN, TILE, INNER)
    for p in tl.static_range(4):
        columns, at, mask = _part(rows, first, M, N, p, TILE)
        value = parts[p] + tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
        rounded = value.to(out.dtype.element_ty)
        tl.store(out + at, rounded, mask)
        value = rounded.to(tl.float32)  # as the backward pass sees it
        size = tl.abs(value)
        value = tl.maximum(value, 0.0) - size * tail(size)
        tl.store(activated + at, value.to(activated.dtype.element_ty), mask)


@triton.jit
def _gelu_linear_backward(
    grad, weight, x, grad_x, activated, sums, M, N, K, EVEN: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr
):
    """sums (rows of tiles, N), float32: the sum of grad_x over the rows of each program."""
    row, above, first = _place(N, TILE)
    rows = above + tl.arange(0, TILE)
    parts = _product(grad, weight, grad, rows, first + tl.arange(0, TILE), M, N, K, N, 1, False, EVEN, TILE, INNER)
    for p in tl.static_range(4):
        columns, at, mask = _part(rows, first, M, N, p, TILE)
        value = tl.load(x + at, mask, other=0.0).to(tl.float32)
        size = tl.abs(value)
        above_it = tail(size)
        tl.store(activated + at, (tl.maximum(value, 0.0) - size * above_it).to(activated.dtype.element_ty), mask)
        gradient = parts[p] * slope(value, size, above_it)  # 0 where it is masked
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), mask)
        tl.store(sums + row * N + columns, tl.sum(gradient, 0), columns < N)


@triton.jit
def _gate_linear(
    x, factor, weight, bias, out, pixels, M, N, K, EVEN: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr
):
    """factor (samples, K); TILE divides the ``pixels`` of a sample."""
    _, above, first = _place(N, TILE)
    rows = above + tl.arange(0, TILE)
    factor += above // pixels * K
    parts = _product(x, weight, factor, rows, first + tl.arange(0, TILE), M, N, K, 1, K, True, EVEN, TILE, INNER)
    for p in tl.static_range(4):
        columns, at, mask = _part(rows, first, M, N, p, TILE)
        value = parts[p] + tl.load(bias + columns, columns < N, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit
def _gate_linear_backward(
    grad, weight, x, factor, grad_x, gated, sums, pixels, M, N, K,
    EVEN: tl.constexpr, TILE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """sums (rows of tiles, N), float32: the gradient of factor from the rows of each program."""
    row, above, first = _place(N, TILE)
    rows = above + tl.arange(0, TILE)
    factor += above // pixels * N
    parts = _product(grad, weight, grad, rows, first + tl.arange(0, TILE), M, N, K, N, 1, False, EVEN, TILE, INNER)
    for p in tl.static_range(4):
        columns, at, mask = _part(rows, first, M, N, p, TILE)
        value = tl.load(x + at, mask, other=0.0).to(tl.float32)
        scale = tl.load(factor + columns, columns < N, other=0.0).to(tl.float32)[None, :]
        tl.store(gated + at, (value * scale).to(gated.dtype.element_ty), mask)
        tl.store(grad_x + at, (parts[p] * scale).to(grad_x.dtype.element_ty), mask)
        tl.store(sums + row * N + columns, tl.sum(parts[p] * value, 0), columns < N)


def _launch(kernel: object, M: int, N: int, K: int, *arguments: Tensor | int, widest: int = 64) -> None:
    """widest: the most channels of a step."""
    inner = widest if K % widest == 0 else 32
    kernel[(triton.cdiv(M, TILE) * triton.cdiv(N, TILE),)](  # type: ignore[index]
        *arguments, M, N, K,
        EVEN=K % inner == 0, TILE=TILE, INNER=inner,
        num_warps=WARPS, num_stages=STAGES[inner], maxnreg=REGISTERS, **FUSED,
    )  # fmt: skip


def linear_gelu_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K), weight (N, K), bias (N,) -> a linear layer (..., N), and GELU of it."""
    N, K = weight.shape
    out = x.new_empty(*x.shape[:-1], N)
    activated = torch.empty_like(out)
    _launch(_linear_gelu, x.numel() // K, N, K, x, weight, bias, out, activated)
    return out, activated


def gelu_linear_backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., N), weight (K, N), grad (..., K) -> what ``gelu_backward`` returns for x and grad @ weight."""
    K, N = weight.shape
    M = x.numel() // N
    grad_x, activated = torch.empty_like(x), torch.empty_like(x)
    sums = torch.empty(triton.cdiv(M, TILE), N, dtype=torch.float32, device=x.device)
    _launch(_gelu_linear_backward, M, N, K, grad, weight, x, grad_x, activated, sums)
    return grad_x, sums.sum(0), activated


def gate_linear_forward(x: Tensor, factor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (S, H, W, K) times factor (S, K), then a linear layer of weight (N, K) and bias (N,); TILE divides H * W."""
    (N, K), (_, H, W, _) = weight.shape, x.shape
    out = x.new_empty(*x.shape[:-1], N)
    arguments = (x, factor.contiguous(), weight, bias, out, H * W)
    _launch(_gate_linear, x.numel() // K, N, K, *arguments, widest=32)  # with 64, registers would go to memory
    return out


def gate_linear_backward(x: Tensor, factor: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and factor, and x times factor; grad (S, H, W, K) is that of a layer of weight (K, N)."""
    (K, N), (S, H, W, _) = weight.shape, x.shape
    grad_x, gated = torch.empty_like(x), torch.empty_like(x)
    sums = torch.empty(S * H * W // TILE, N, dtype=torch.float32, device=x.device)
    arguments = (grad, weight, x, factor.contiguous(), grad_x, gated, sums, H * W)
    _launch(_gate_linear_backward, S * H * W, N, K, *arguments)
    return grad_x, sums.view(S, -1, N).sum(1).to(factor.dtype), gated
