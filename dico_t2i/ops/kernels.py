"""The operators as Triton kernels, for GPUs. Their speed is not measured yet; docs/operators.md says what to expect.

One tile is a few pixels by all channels (norms, factors) or by a block of channels (convolutions). Each tile writes its
sums over pixels, and torch adds them in a fixed order, without atomics, so that results are deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_t2i.ops.plain import NORM_EPS

CHUNK = 32  # pixels that one program sums over
CONV_PIXELS, CONV_CHANNELS = 64, 32  # tile of the 3x3 convolution
TEXT_CHANNELS = 64  # two for each thread of a warp, which thus reads 128 bytes of bf16 at a time
TEXT_PIXELS, TEXT_GRADIENT_PIXELS = 8, 4  # pixels that a thread holds of each of its rows
TEXT_GROUPS = {5: 5, 7: 7, 9: 3}  # kernel size -> columns of taps whose gradients a thread holds; else 1
OPTIMIZER_BLOCK = 1024


# ---- LayerNorm over channels, with the residual before it and the modulation after it ----


@triton.jit
def _row_tile(first, last, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Pixels ``first`` to ``first + ROWS``, masked at ``last``: indices (ROWS,), offsets and mask (ROWS, BLOCK)."""
    rows = first + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    mask = (rows < last)[:, None] & (channels < C)[None, :]
    return rows, rows.to(tl.int64)[:, None] * C + channels[None, :], mask


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def _norm_forward(
    x, branch, gate, shift, scale, residual, out, mean, rstd,
    rows_total, pixels, C, eps,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, MODULATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, at, mask = _row_tile(tl.program_id(0) * ROWS, rows_total, C, ROWS, BLOCK)
    vectors = (rows // pixels)[:, None] * C + tl.arange(0, BLOCK)[None, :]
    value = _load(x, at, mask)
    if HAS_BRANCH:
        added = _load(branch, at, mask)
        if HAS_GATE:
            added *= _load(gate, vectors, mask)
        rounded = (value + added).to(residual.dtype.element_ty)  # round first, as backward sees the stored value
        tl.store(residual + at, rounded, mask)
        value = rounded.to(tl.float32)
    average = tl.sum(value, 1) / C
    centred = tl.where(mask, value - average[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(mean + rows, average, rows < rows_total)
    tl.store(rstd + rows, inverse, rows < rows_total)
    normed = centred * inverse[:, None]
    if MODULATE:
        normed = normed * (1.0 + _load(scale, vectors, mask)) + _load(shift, vectors, mask)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask)


@triton.jit
def _norm_backward(
    residual, mean, rstd, scale, branch, gate, grad_residual, grad_out, grad_x, grad_branch, sums,
    pixels, C, chunk_pixels,
    HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, MODULATE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums (3, N, chunks, C), float32: the gradients of gate, shift and scale."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, BLOCK)
    inside = channels < C
    zero = tl.zeros((BLOCK,), tl.float32)
    gate_sum, shift_sum, scale_sum = zero, zero, zero
    factor = zero + 1.0
    if MODULATE:
        factor += _load(scale + n * C, channels, inside)
    if HAS_GATE:
        gates = _load(gate + n * C, channels, inside)
    first = n * pixels + chunk * chunk_pixels
    last = tl.minimum(first + chunk_pixels, (n + 1) * pixels)
    for start in range(first, last, ROWS):
        rows, at, mask = _row_tile(start, last, C, ROWS, BLOCK)
        grad = _load(grad_out, at, mask)
        average, inverse = _load(mean, rows, rows < last)[:, None], _load(rstd, rows, rows < last)[:, None]
        normed = tl.where(mask, (_load(residual, at, mask) - average) * inverse, 0.0)
        if MODULATE:
            shift_sum += tl.sum(grad, 0)
            scale_sum += tl.sum(grad * normed, 0)
            grad *= factor[None, :]
        dot = tl.sum(grad * normed, 1)[:, None] / C
        value = inverse * (grad - tl.sum(grad, 1)[:, None] / C - normed * dot)
        if HAS_RESIDUAL:
            value += _load(grad_residual, at, mask)
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask)
        if HAS_GATE:
            gate_sum += tl.sum(value * _load(branch, at, mask), 0)
            tl.store(grad_branch + at, (value * gates[None, :]).to(grad_branch.dtype.element_ty), mask)
    at_sums = (n * tl.num_programs(0) + chunk) * C + channels
    plane = tl.num_programs(1) * tl.num_programs(0) * C
    if HAS_GATE:
        tl.store(sums + at_sums, gate_sum, inside)
    if MODULATE:
        tl.store(sums + plane + at_sums, shift_sum, inside)
        tl.store(sums + 2 * plane + at_sums, scale_sum, inside)


# ---- a factor for each sample and channel ----


@triton.jit
def _scale_forward(x, scale, base, out, rows_total, pixels, C, HAS_BASE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip  # noqa: E501
    rows, at, mask = _row_tile(tl.program_id(0) * ROWS, rows_total, C, ROWS, BLOCK)
    vectors = (rows // pixels)[:, None] * C + tl.arange(0, BLOCK)[None, :]
    value = _load(x, at, mask) * _load(scale, vectors, mask)
    if HAS_BASE:
        value += _load(base, at, mask)
    tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit
def _scale_backward(x, scale, grad, grad_x, sums, pixels, C, chunk_pixels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sums (N, chunks, C), float32: the gradient of scale."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    channels = tl.arange(0, BLOCK)
    factor = _load(scale + n * C, channels, channels < C)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    first = n * pixels + chunk * chunk_pixels
    last = tl.minimum(first + chunk_pixels, (n + 1) * pixels)
    for start in range(first, last, ROWS):
        _, at, mask = _row_tile(start, last, C, ROWS, BLOCK)
        value = _load(grad, at, mask)
        total += tl.sum(value * _load(x, at, mask), 0)
        tl.store(grad_x + at, (value * factor).to(grad_x.dtype.element_ty), mask)
    tl.store(sums + (n * tl.num_programs(0) + chunk) * C + channels, total, channels < C)


# ---- depthwise 3x3, GELU, mean ----


@triton.jit
def _conv_tile(H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """The tile of a program (pixels, channels, sample).

    Returns row and column (PIXELS,), channels (CHANNELS,), offsets and mask (PIXELS, CHANNELS).
    """
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (pixel < H * W)[:, None] & (channels < C)[None, :]
    at = (tl.program_id(2).to(tl.int64) * H * W + pixel)[:, None] * C + channels[None, :]
    return pixel // W, pixel % W, channels, at, mask


@triton.jit
def _load_shifted(pointer, at, mask, row, column, i, j, H, W, C):
    """Load the tile shifted by i pixels down and j to the right; it is 0 outside the image."""
    inside = (row + i >= 0) & (row + i < H) & (column + j >= 0) & (column + j < W)
    return tl.load(pointer + at + (i * W + j) * C, mask & inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _convolve(x, weight, bias, at, mask, row, column, channels, H, W, C):
    known = channels < C
    value = tl.zeros(at.shape, tl.float32) + _load(bias, channels, known)[None, :]
    for tap in tl.static_range(9):
        factor = _load(weight, channels * 9 + tap, known)
        value += _load_shifted(x, at, mask, row, column, tap // 3 - 1, tap % 3 - 1, H, W, C) * factor[None, :]
    return value


@triton.jit
def _normal(x):
    """The standard normal distribution function at x."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _depthwise_forward(x, weight, bias, out, sums, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """sums (N, tiles, C), float32: the sum of out over pixels."""
    row, column, channels, at, mask = _conv_tile(H, W, C, PIXELS, CHANNELS)
    value = _convolve(x, weight, bias, at, mask, row, column, channels, H, W, C)
    value = tl.where(mask, value * _normal(value), 0.0)
    tl.store(out + at, value.to(out.dtype.element_ty), mask)
    at_sums = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * C + channels
    tl.store(sums + at_sums, tl.sum(value, 0), channels < C)


@triton.jit
def _depthwise_slope(x, weight, bias, grad, grad_mean, before, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Compute ``before``, the gradient of GELU's input."""
    row, column, channels, at, mask = _conv_tile(H, W, C, PIXELS, CHANNELS)
    value = _convolve(x, weight, bias, at, mask, row, column, channels, H, W, C)
    slope = _normal(value) + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
    pooled = _load(grad_mean + tl.program_id(2) * C, channels, channels < C) / (H * W)
    result = (_load(grad, at, mask) + pooled[None, :]) * slope
    tl.store(before + at, result.to(before.dtype.element_ty), mask)


@triton.jit
def _depthwise_backward(x, weight, before, grad_x, sums, H, W, C, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Both gradients use one shifted load. sums (N, tiles, 10, C), float32: gradients of the nine taps and the bias."""
    row, column, channels, at, mask = _conv_tile(H, W, C, PIXELS, CHANNELS)
    known = channels < C
    source = _load(x, at, mask)
    result = tl.zeros(at.shape, tl.float32)
    at_sums = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * 10 * C + channels
    for tap in tl.static_range(9):
        grad = _load_shifted(before, at, mask, row, column, 1 - tap // 3, 1 - tap % 3, H, W, C)
        result += grad * _load(weight, channels * 9 + tap, known)[None, :]
        tl.store(sums + at_sums + tap * C, tl.sum(grad * source, 0), known)
        if tap == 4:
            tl.store(sums + at_sums + 9 * C, tl.sum(grad, 0), known)
    tl.store(grad_x + at, result.to(grad_x.dtype.element_ty), mask)


# ---- the text convolution ----


@triton.jit
def _load_row(pointer, sample, row, column, channels, H, W, C, COUNT: tl.constexpr):
    """Load COUNT pixels of a row, starting at ``column``, each (CHANNELS,) in float32; 0 outside the image."""
    pixels = ()
    at = (sample * H + row) * W * C + channels
    for p in tl.static_range(COUNT):
        inside = (row >= 0) & (row < H) & (column + p >= 0) & (column + p < W)
        value = tl.load(pointer + at + (column + p) * C, channels < C * inside, other=0.0)
        pixels = pixels + (value.to(tl.float32),)
    return pixels


@triton.jit
def _text_forward(
    x, context, out, H, W, C, T, FLIPPED: tl.constexpr, K: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Each thread moves down PIXELS columns of two channels and holds the K output rows that a row contributes to.

    The pixels that it loads of a row are used for K columns of taps and for all K output rows.
    """
    sample, first = tl.program_id(2).to(tl.int64), tl.program_id(0) * PIXELS
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    tokens = context + sample * T * C + channels
    zero = tl.zeros((CHANNELS,), tl.float32)
    window = (zero,) * (K * PIXELS)  # output rows row - K // 2 to row + K // 2
    for row in range(H + K // 2):
        source = _load_row(x, sample, row, first - K // 2, channels, H, W, C, PIXELS + K - 1)
        for j in tl.static_range(K):
            sums = ()
            for k in tl.static_range(K):
                tap = (K - 1 - k) * K + j
                if FLIPPED:
                    tap = K * K - 1 - tap
                factor = _load(tokens, tl.minimum(tap, T - 1) * C, channels < C)
                for p in tl.static_range(PIXELS):
                    sums = sums + (tl.fma(source[p + j], factor, window[k * PIXELS + p]),)
            window = sums
        if row >= K // 2:
            at = (sample * H + row - K // 2) * W * C + channels
            for p in tl.static_range(PIXELS):
                value = window[p].to(out.dtype.element_ty)
                tl.store(out + at + (first + p) * C, value, channels < C * (first + p < W))
        window = window[PIXELS:] + (zero,) * PIXELS


@triton.jit
def _text_taps(
    x, grad, sums, H, W, C, columns_each,
    K: tl.constexpr, GROUP: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the kernels, (tiles, N, K * K, C) in float32; a program computes K rows and GROUP columns of taps.

    A thread holds K rows of the output gradient, PIXELS wide, and combines each input row that it loads with all of
    them.
    """
    sample = (tl.program_id(2) // (K // GROUP)).to(tl.int64)
    first_tap = tl.program_id(2) % (K // GROUP) * GROUP
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(0) * columns_each
    zero = tl.zeros((CHANNELS,), tl.float32)
    total = (zero,) * (K * GROUP)
    for first in range(begin, tl.minimum(begin + columns_each, W), PIXELS):
        window = (zero,) * (PIXELS * (K // 2 + 1))  # K // 2 + 1 rows of zeros; then rows 0 to K // 2 - 1
        for k in tl.static_range(K // 2):
            window = window + _load_row(grad, sample, k, first, channels, H, W, C, PIXELS)
        for row in range(H):
            window = window[PIXELS:] + _load_row(grad, sample, row + K // 2, first, channels, H, W, C, PIXELS)
            source = _load_row(x, sample, row, first + first_tap - K // 2, channels, H, W, C, PIXELS + GROUP - 1)
            for p in tl.static_range(PIXELS):
                more = ()
                for k in tl.static_range(K * GROUP):
                    gradient = window[(K - 1 - k // GROUP) * PIXELS + p]
                    more = more + (tl.fma(source[p + k % GROUP], gradient, total[k]),)
                total = more
    samples = tl.num_programs(2) // (K // GROUP)
    at = (tl.program_id(0) * samples + sample) * K * K * C + channels
    for k in tl.static_range(K * GROUP):
        tap = k // GROUP * K + first_tap + k % GROUP
        tl.store(sums + at + tap * C, total[k], channels < C)


# ---- The interface that ``plain`` and ``native`` have as well ----


def _rows(C: int) -> dict[str, int]:
    """Tile size and number of warps of a kernel whose tile holds all channels."""
    block = triton.next_power_of_2(C)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": 4 if rows * block <= 2048 else 8}


def _tile() -> dict[str, int]:
    return {"PIXELS": CONV_PIXELS, "CHANNELS": CONV_CHANNELS}


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _as(like: Tensor | None, sums: Tensor) -> Tensor | None:
    """Sum over chunks: (N, chunks, C) -> (N, C), in the dtype of ``like``."""
    return None if like is None else sums.sum(1).to(like.dtype)


def norm_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor | None, scale: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    N, H, W, C = x.shape
    residual, out = None if branch is None else torch.empty_like(x), torch.empty_like(x)
    mean, rstd = (torch.empty(N, H, W, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = _rows(C)
    _norm_forward[triton.cdiv(N * H * W, tile["ROWS"]),](
        x, branch, *map(_vector, (gate, shift, scale)), residual, out, mean, rstd, N * H * W, H * W, C, NORM_EPS,
        HAS_BRANCH=branch is not None, HAS_GATE=gate is not None, MODULATE=scale is not None, **tile,
    )  # fmt: skip
    return residual, out, mean, rstd


def norm_backward(
    residual: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    grad_residual: Tensor | None,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    N, H, W, C = residual.shape
    chunks = triton.cdiv(H * W, CHUNK)
    grad_x, grad_branch = torch.empty_like(residual), None if gate is None else torch.empty_like(residual)
    sums = torch.empty(3, N, chunks, C, dtype=torch.float32, device=residual.device)
    _norm_backward[chunks, N](
        residual, mean, rstd, _vector(scale), branch, _vector(gate), grad_residual, grad_out, grad_x, grad_branch, sums,
        H * W, C, CHUNK,
        HAS_GATE=gate is not None, HAS_RESIDUAL=grad_residual is not None, MODULATE=scale is not None, **_rows(C),
    )  # fmt: skip
    return grad_x, grad_branch, _as(gate, sums[0]), _as(scale, sums[1]), _as(scale, sums[2])


def scale_forward(x: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    N, H, W, C = x.shape
    out, tile = torch.empty_like(x), _rows(C)
    grid = (triton.cdiv(N * H * W, tile["ROWS"]),)
    _scale_forward[grid](x, _vector(scale), base, out, N * H * W, H * W, C, HAS_BASE=base is not None, **tile)
    return out


def scale_backward(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    N, H, W, C = x.shape
    chunks = triton.cdiv(H * W, CHUNK)
    grad_x, sums = torch.empty_like(x), torch.empty(N, chunks, C, dtype=torch.float32, device=x.device)
    _scale_backward[chunks, N](x, _vector(scale), grad, grad_x, sums, H * W, C, CHUNK, **_rows(C))
    return grad_x, sums.sum(1).to(scale.dtype)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    N, H, W, C = x.shape
    tiles = triton.cdiv(H * W, CONV_PIXELS)
    out, sums = torch.empty_like(x), torch.empty(N, tiles, C, dtype=torch.float32, device=x.device)
    grid = (tiles, triton.cdiv(C, CONV_CHANNELS), N)
    _depthwise_forward[grid](x, weight.contiguous(), bias, out, sums, H, W, C, **_tile())
    return out, (sums.sum(1) / (H * W)).to(x.dtype)


def depthwise_backward(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, grad_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    N, H, W, C = x.shape
    tiles, weight = triton.cdiv(H * W, CONV_PIXELS), weight.contiguous()
    before, grad_x = torch.empty_like(x), torch.empty_like(x)
    sums = torch.empty(N * tiles, 10, C, dtype=torch.float32, device=x.device)
    grid = (tiles, triton.cdiv(C, CONV_CHANNELS), N)
    _depthwise_slope[grid](x, weight, bias, grad, grad_mean.contiguous(), before, H, W, C, **_tile())
    _depthwise_backward[grid](x, weight, before, grad_x, sums, H, W, C, **_tile())
    grad_weight, grad_bias = sums[:, :9].sum(0).T.reshape(weight.shape), sums[:, 9].sum(0)
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def text_forward(x: Tensor, context: Tensor, kernel: int) -> Tensor:
    return _correlate(x, context, kernel, flipped=False)


def text_backward(
    x: Tensor, context: Tensor, grad: Tensor, kernel: int, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = _correlate(grad, context, kernel, flipped=True) if wants[0] else None
    return grad_x, _token_gradient(x, context, grad, kernel) if wants[1] else None


def _correlate(x: Tensor, context: Tensor, kernel: int, *, flipped: bool) -> Tensor:
    N, H, W, C = x.shape
    out = torch.empty_like(x)
    _text_forward[triton.cdiv(W, TEXT_PIXELS), triton.cdiv(C, TEXT_CHANNELS), N](
        x, context, out, H, W, C, context.shape[1],
        FLIPPED=flipped, K=kernel, PIXELS=TEXT_PIXELS, CHANNELS=TEXT_CHANNELS, num_warps=1,
    )  # fmt: skip
    return out


def _token_gradient(x: Tensor, context: Tensor, grad: Tensor, kernel: int) -> Tensor:
    """The gradient of the tokens; the gradients of the taps that repeat the last token are summed."""
    (N, H, W, C), T, group = x.shape, context.shape[1], TEXT_GROUPS.get(kernel, 1)
    columns = 8 if N * C < 132 * 16 * TEXT_CHANNELS else 32  # small batches need more tiles to fill the GPU
    tiles = triton.cdiv(W, columns)
    sums = torch.empty(tiles, N, kernel**2, C, dtype=torch.float32, device=x.device)
    _text_taps[tiles, triton.cdiv(C, TEXT_CHANNELS), N * (kernel // group)](
        x, grad, sums, H, W, C, columns,
        K=kernel, GROUP=group, PIXELS=TEXT_GRADIENT_PIXELS, CHANNELS=TEXT_CHANNELS, num_warps=1,
    )  # fmt: skip
    taps = sums.sum(0)
    tokens = torch.cat((taps[:, : T - 1], taps[:, T - 1 :].sum(1, keepdim=True)), dim=1)
    return tokens.to(context.dtype)
