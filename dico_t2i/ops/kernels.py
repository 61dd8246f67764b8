"""The operators as Triton kernels, for GPUs. Their speed is not measured yet; docs/performance.md says what to expect.

A program walks over pixels with what it needs again in registers, and keeps its sums over pixels there until its end.
torch adds the sums of several programs in a fixed order, without atomics, so that results are deterministic. Most
programs are a single warp: then no sum over channels and no step of a walk has to wait for other warps.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_t2i.ops.kernels_gelu import FUSED, slope, tail
from dico_t2i.ops.kernels_products import gate_linear_backward as gate_linear_backward
from dico_t2i.ops.kernels_products import gate_linear_forward as gate_linear_forward
from dico_t2i.ops.kernels_products import gelu_linear_backward as gelu_linear_backward
from dico_t2i.ops.kernels_products import linear_gelu_forward as linear_gelu_forward
from dico_t2i.ops.plain import NORM_EPS

CHUNK = 32  # pixels that one program of the norms and factors walks over
WARP_TILE = 512  # numbers that a warp of theirs holds of a tensor
GELU_CHUNK, GELU_CHANNELS = 64, 256  # pixels and channels of a program of GELU's backward
CONV_TILE, CONV_PIXELS, CONV_GRADIENT_PIXELS = 128, 4, 2  # numbers of a warp; pixels that a thread holds of a row
CONV_ROWS = 8  # the fewest that a program walks down
TEXT_TILE, TEXT_PIXELS = 64, 8
TAPS_TILE, TAPS_PIXELS, TAPS_ROWS = 32, 4, 2
MULTIPROCESSORS = 132  # of an H100 and an H200


# ---- LayerNorm over channels, with the residual before it and the modulation after it ----


@triton.jit
def _chunk(pixels, chunk_pixels):
    """The program's pixels of a sample, as first and last row of (N * H * W, C)."""
    first = tl.program_id(1) * pixels + tl.program_id(0) * chunk_pixels
    return first, tl.minimum(first + chunk_pixels, (tl.program_id(1) + 1) * pixels)


@triton.jit
def _row_tile(first, last, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Pixels ``first`` to ``first + ROWS``, masked at ``last``: indices (ROWS,), offsets and mask (ROWS, BLOCK)."""
    rows = first + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    mask = (rows < last)[:, None] & (channels < C)[None, :]
    return rows, rows.to(tl.int64)[:, None] * C + channels[None, :], mask


@triton.jit
def _load(pointer, offsets, mask):
    return tl.load(pointer + offsets, mask, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(pointer, C: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of the program's sample, (1, BLOCK)."""
    channels = tl.arange(0, BLOCK)[None, :]
    return _load(pointer + tl.program_id(1) * C, channels, channels < C)


@triton.jit
def _store_sums(pointer, total, C: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sums over pixels, of a tile, into (N, chunks, C)."""
    channels = tl.arange(0, BLOCK)
    at = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * C + channels
    tl.store(pointer + at, tl.sum(total, 0), channels < C)


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _norm_forward(
    x, branch, gate, shift, scale, residual, out, mean, rstd, pixels, eps, chunk_pixels,
    HAS_BRANCH: tl.constexpr, HAS_GATE: tl.constexpr, MODULATE: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if HAS_GATE:
        gates = _load_vector(gate, C, BLOCK)
    if MODULATE:
        factor, offset = 1.0 + _load_vector(scale, C, BLOCK), _load_vector(shift, C, BLOCK)
    known = tl.arange(0, BLOCK)[None, :] < C
    first, last = _chunk(pixels, chunk_pixels)
    for start in range(first, last, ROWS):
        rows, at, mask = _row_tile(start, last, C, ROWS, BLOCK)
        value = _load(x, at, mask)
        if HAS_BRANCH:
            added = _load(branch, at, mask)
            if HAS_GATE:
                added *= gates
            rounded = (value + added).to(residual.dtype.element_ty)  # round first, as backward sees the stored value
            tl.store(residual + at, rounded, mask)
            value = rounded.to(tl.float32)
        average = tl.sum(value, 1) / C
        centred = tl.where(known, value - average[:, None], 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
        tl.store(mean + rows, average, rows < last)
        tl.store(rstd + rows, inverse, rows < last)
        normed = centred * inverse[:, None]
        if MODULATE:
            normed = normed * factor + offset
        tl.store(out + at, normed.to(out.dtype.element_ty), mask)


@triton.jit
def _norm_backward(
    source, mean, rstd, shift, scale, branch, gate, grad_residual, grad_out, grad_x, grad_branch, out, sums,
    pixels, chunk_pixels,
    HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, MODULATE: tl.constexpr, AGAIN: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums (4, N, chunks, C), float32: the gradient of gate, the sum of that of x, the gradients of shift and scale.

    source: x with a gate, otherwise the residual. out: with AGAIN, the output of ``_norm_forward``.
    """
    zero = tl.zeros((ROWS, BLOCK), tl.float32)
    gate_sum, grad_sum, shift_sum, scale_sum = zero, zero, zero, zero
    if MODULATE:
        factor = 1.0 + _load_vector(scale, C, BLOCK)
        if AGAIN:
            offset = _load_vector(shift, C, BLOCK)
    if HAS_GATE:
        gates = _load_vector(gate, C, BLOCK)
    first, last = _chunk(pixels, chunk_pixels)
    for start in tl.range(first, last, ROWS, num_stages=2):  # few warps fit, so each loads a row ahead
        rows, at, mask = _row_tile(start, last, C, ROWS, BLOCK)
        grad = _load(grad_out, at, mask)
        average, inverse = _load(mean, rows, rows < last)[:, None], _load(rstd, rows, rows < last)[:, None]
        value = _load(source, at, mask)
        if HAS_GATE:
            added = _load(branch, at, mask)
            value = (value + added * gates).to(source.dtype.element_ty).to(tl.float32)
        normed = (value - average) * inverse  # where it is masked, the gradient is 0
        if AGAIN:
            value = normed
            if MODULATE:
                value = normed * factor + offset
            tl.store(out + at, value.to(out.dtype.element_ty), mask)
        if MODULATE:
            shift_sum += grad
            scale_sum += grad * normed
            grad *= factor
        total, dot = tl.reduce((grad, grad * normed), 1, _both)
        value = inverse * (grad - total[:, None] / C - normed * (dot[:, None] / C))
        if HAS_RESIDUAL:
            value += _load(grad_residual, at, mask)
        tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask)
        if HAS_GATE:
            grad_sum += value
            gate_sum += value * added
            tl.store(grad_branch + at, (value * gates).to(grad_branch.dtype.element_ty), mask)
    plane = tl.num_programs(1) * tl.num_programs(0) * C
    if HAS_GATE:
        _store_sums(sums, gate_sum, C, BLOCK)
        _store_sums(sums + plane, grad_sum, C, BLOCK)
    if MODULATE:
        _store_sums(sums + 2 * plane, shift_sum, C, BLOCK)
        _store_sums(sums + 3 * plane, scale_sum, C, BLOCK)


# ---- a factor for each sample and channel ----


@triton.jit
def _scale_forward(
    x, scale, base, out, pixels, chunk_pixels,
    HAS_BASE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    factor = _load_vector(scale, C, BLOCK)
    first, last = _chunk(pixels, chunk_pixels)
    for start in range(first, last, ROWS):
        _, at, mask = _row_tile(start, last, C, ROWS, BLOCK)
        value = _load(x, at, mask) * factor
        if HAS_BASE:
            value += _load(base, at, mask)
        tl.store(out + at, value.to(out.dtype.element_ty), mask)


@triton.jit
def _scale_backward(
    x, scale, grad, grad_x, sums, pixels, chunk_pixels, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """sums (2, N, chunks, C), float32: the gradient of scale, and the sum of ``grad``."""
    factor = _load_vector(scale, C, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    plain = total
    first, last = _chunk(pixels, chunk_pixels)
    for start in range(first, last, ROWS):
        _, at, mask = _row_tile(start, last, C, ROWS, BLOCK)
        value = _load(grad, at, mask)
        total += value * _load(x, at, mask)
        plain += value
        tl.store(grad_x + at, (value * factor).to(grad_x.dtype.element_ty), mask)
    _store_sums(sums, total, C, BLOCK)
    _store_sums(sums + tl.num_programs(1) * tl.num_programs(0) * C, plain, C, BLOCK)


# ---- GELU ----


@triton.jit
def _gelu_backward(x, grad, grad_x, out, sums, pixels, chunk_pixels, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """sums (chunks, C), float32: the sum of grad_x over the pixels of each program, of BLOCK channels."""
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    first = tl.program_id(0) * chunk_pixels
    last = tl.minimum(first + chunk_pixels, pixels)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < last)[:, None] & (channels < C)[None, :]
        at = rows.to(tl.int64)[:, None] * C + channels[None, :]
        value = _load(x, at, mask)
        size = tl.abs(value)
        above = tail(size)
        tl.store(out + at, (tl.maximum(value, 0.0) - size * above).to(out.dtype.element_ty), mask)
        gradient = _load(grad, at, mask) * slope(value, size, above)
        total += gradient
        tl.store(grad_x + at, gradient.to(grad_x.dtype.element_ty), mask)
    tl.store(sums + tl.program_id(0) * C + channels, tl.sum(total, 0), channels < C)


# ---- what all convolutions share: a walk down the rows of a strip of columns ----


@triton.jit
def _strip(PIXELS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    """First columns (LANES, 1) of PIXELS each, and channels (1, CHANNELS), of a program (strip, channels, sample)."""
    columns = (tl.program_id(0) * LANES + tl.arange(0, LANES)) * PIXELS
    return columns[:, None], (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]


@triton.jit
def _load_row(pointer, row, columns, channels, H, W, C: tl.constexpr, COUNT: tl.constexpr):
    """Load COUNT pixels of a row, from ``columns`` on, each (LANES, CHANNELS) in float32; 0 outside the image."""
    pixels = ()
    row = row + tl.zeros((1, 1), tl.int32)  # a tensor, in the interpreter as well
    at = pointer + ((row * W + columns) * C + channels)
    for p in tl.static_range(COUNT):
        inside = (columns + p >= 0) & (columns + p < W) & (channels < C) & (row >= 0) & (row < H)
        pixels = pixels + (tl.load(at + p * C, inside, other=0.0).to(tl.float32),)
    return pixels


@triton.jit
def _store_row(pointer, values, row, columns, channels, H, W, C: tl.constexpr, COUNT: tl.constexpr):
    """Store the first COUNT of ``values`` as pixels of a row, from ``columns`` on, where they are in the image."""
    row = row + tl.zeros((1, 1), tl.int32)
    at = pointer + ((row * W + columns) * C + channels)
    for p in tl.static_range(COUNT):
        inside = (columns + p < W) & (channels < C) & (row >= 0) & (row < H)
        tl.store(at + p * C, values[p].to(pointer.dtype.element_ty), inside)


# ---- depthwise 3x3, GELU, mean ----


@triton.jit
def _load_taps(weight, channels, C: tl.constexpr, FLIPPED: tl.constexpr):
    """The nine taps of ``weight`` (9, C), each in the shape of ``channels`` and in float32.

    That shape is a whole tile: each thread then loads its own channels, at once.
    """
    taps = ()
    for tap in tl.static_range(9):
        taps = taps + (_load(weight, (8 - tap if FLIPPED else tap) * C + channels, channels < C),)
    return taps


@triton.jit
def _spread(window, source, taps, fresh, PIXELS: tl.constexpr):
    """Add what an input row gives to the output rows above, at and below it; the first of the three is then complete.

    ``window`` has the first two, PIXELS of each; ``fresh`` is the start of the third. ``source`` has a pixel more at
    either side.
    """
    sums = ()
    for k in tl.static_range(3):
        for p in tl.static_range(PIXELS):
            value = window[k * PIXELS + p] if k < 2 else fresh
            for j in tl.static_range(3):
                value = tl.fma(source[p + j], taps[(2 - k) * 3 + j], value)
            sums = sums + (value,)
    return sums


@triton.jit
def _part(H, rows_each):
    """Sample, and first and last row, of a program whose axis 2 counts parts of samples."""
    parts = tl.cdiv(H, rows_each)
    begin = tl.program_id(2) % parts * rows_each
    return (tl.program_id(2) // parts).to(tl.int64), begin, tl.minimum(begin + rows_each, H)


@triton.jit
def _rows_before(x, begin, columns, channels, taps, fresh, H, W, C: tl.constexpr, PIXELS: tl.constexpr):
    """The window of ``_spread`` with what the two rows above row begin + 1 give."""
    window = (fresh,) * (2 * PIXELS)
    for above in tl.static_range(2):
        source = _load_row(x, begin - 1 + above, columns - 1, channels, H, W, C, PIXELS + 2)
        window = _spread(window, source, taps, fresh, PIXELS)[PIXELS:]
    return window


@triton.jit
def _depthwise_forward(
    x, weight, bias, out, sums, H, W, rows_each,
    C: tl.constexpr, PIXELS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """sums (N * parts * strips, C), float32: the sum of out over the pixels of each program."""
    sample, begin, end = _part(H, rows_each)
    columns, channels = _strip(PIXELS, LANES, CHANNELS)
    start = sample * H * W * C
    wide = tl.broadcast_to(channels, (LANES, CHANNELS))
    taps = _load_taps(weight, wide, C, False)
    zero = tl.zeros((LANES, CHANNELS), tl.float32)
    fresh, total = _load(bias, wide, wide < C), zero
    window = _rows_before(x + start, begin, columns, channels, taps, fresh, H, W, C, PIXELS)
    for row in range(begin, end):
        source = _load_row(x + start, row + 1, columns - 1, channels, H, W, C, PIXELS + 2)
        rows = _spread(window, source, taps, fresh, PIXELS)
        values = ()
        for p in tl.static_range(PIXELS):
            size = tl.abs(rows[p])
            value = tl.maximum(rows[p], 0.0) - size * tail(size)
            values = values + (value,)
            total = tl.fma(value, (columns + p < W).to(tl.float32), total)
        _store_row(out + start, values, row, columns, channels, H, W, C, PIXELS)
        window = rows[PIXELS:]
    at = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * C + channels
    tl.store(sums + at, tl.sum(total, 0)[None, :], channels < C)


@triton.jit
def _depthwise_slope(
    x, weight, bias, grad, grad_mean, before, sums, H, W, rows_each,
    C: tl.constexpr, PIXELS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute ``before``, the gradient of GELU's input. sums (N * parts * strips, C), float32: its sum over pixels."""
    sample, begin, end = _part(H, rows_each)
    columns, channels = _strip(PIXELS, LANES, CHANNELS)
    start = sample * H * W * C
    wide = tl.broadcast_to(channels, (LANES, CHANNELS))
    taps = _load_taps(weight, wide, C, False)
    fresh = _load(bias, wide, wide < C)
    pooled = _load(grad_mean + sample * C, wide, wide < C) / (H * W)
    total = tl.zeros((LANES, CHANNELS), tl.float32)
    window = _rows_before(x + start, begin, columns, channels, taps, fresh, H, W, C, PIXELS)
    for row in range(begin, end):
        given = _load_row(grad + start, row, columns, channels, H, W, C, PIXELS)
        source = _load_row(x + start, row + 1, columns - 1, channels, H, W, C, PIXELS + 2)
        rows = _spread(window, source, taps, fresh, PIXELS)
        values = ()
        for p in tl.static_range(PIXELS):
            size = tl.abs(rows[p])
            values = values + ((given[p] + pooled) * slope(rows[p], size, tail(size)),)
            total = tl.fma(values[p], (columns + p < W).to(tl.float32), total)
        _store_row(before + start, values, row, columns, channels, H, W, C, PIXELS)
        window = rows[PIXELS:]
    at = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * C + channels
    tl.store(sums + at, tl.sum(total, 0)[None, :], channels < C)


@triton.jit
def _depthwise_backward(
    x, weight, before, grad_x, sums, H, W, rows_each,
    C: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Both gradients use one load of ``before``.

    sums (N * parts * strips, 10, C), float32: those of the nine taps, and the sum of grad_x over pixels. EVEN: the
    strips end where the image does.
    """
    sample, begin, end = _part(H, rows_each)
    columns, channels = _strip(PIXELS, LANES, CHANNELS)
    start = sample * H * W * C
    wide = tl.broadcast_to(channels, (LANES, CHANNELS))
    taps = _load_taps(weight, wide, C, True)
    zero = tl.zeros((LANES, CHANNELS), tl.float32)
    totals, passed = (zero,) * 9, zero
    window = (zero,) * (2 * PIXELS)
    inputs = (zero,) * (2 * PIXELS)  # of x, the row above that of ``before`` and the same; 0 where they are not ours
    for row in range(begin - 1, end + 1):
        source = _load_row(before + start, row, columns - 1, channels, H, W, C, PIXELS + 2)
        inputs = inputs + _load_row(x + start, row + 1, columns, channels, end, W, C, PIXELS)
        for p in tl.static_range(PIXELS):
            more = ()
            for tap in tl.static_range(9):
                more = more + (tl.fma(source[p + 2 - tap % 3], inputs[tap // 3 * PIXELS + p], totals[tap]),)
            totals = more
        rows = _spread(window, source, taps, zero, PIXELS)
        if row > begin:
            for p in tl.static_range(PIXELS):
                passed += rows[p] if EVEN else tl.where(columns + p < W, rows[p], 0.0)
            _store_row(grad_x + start, rows, row - 1, columns, channels, H, W, C, PIXELS)
        window, inputs = rows[PIXELS:], inputs[PIXELS:]
    at = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * 10 * C + channels
    for tap in tl.static_range(9):
        tl.store(sums + at + tap * C, tl.sum(totals[tap], 0)[None, :], channels < C)
    tl.store(sums + at + 9 * C, tl.sum(passed, 0)[None, :], channels < C)


# ---- the text convolution ----


@triton.jit
def _text_pack(
    context, taps, T, C: tl.constexpr,
    FLIPPED: tl.constexpr, TAPS: tl.constexpr, BLOCK: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write the taps as ``_text_forward`` reads them: (N, channel blocks, TAPS, CHANNELS) in float32."""
    sample, lanes, tap = tl.program_id(1).to(tl.int64), tl.arange(0, CHANNELS), tl.arange(0, BLOCK)
    channels = tl.program_id(0) * CHANNELS + lanes
    token = tl.minimum(TAPS - 1 - tap if FLIPPED else tap, T - 1)
    known = (tap < TAPS)[:, None]
    value = _load(context + sample * T * C, token[:, None] * C + channels[None, :], known & (channels < C)[None, :])
    at = (sample * tl.num_programs(0) + tl.program_id(0)) * TAPS * CHANNELS
    tl.store(taps + at + (tap[:, None] * CHANNELS + lanes[None, :]), value, known & (lanes >= 0)[None, :])


@triton.jit
def _text_forward(
    x, taps, base, out, H, W,
    HAS_BASE: tl.constexpr, C: tl.constexpr, K: tl.constexpr,
    PIXELS: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each thread moves down PIXELS columns of two channels and holds the K output rows that a row contributes to.

    The pixels that it loads of a row are used for K columns of taps and for all K output rows; each tap that it loads,
    for PIXELS pixels. The distances of the taps in memory are constants, so that loading one is one instruction.
    """
    sample = tl.program_id(2).to(tl.int64)
    columns, channels = _strip(PIXELS, LANES, CHANNELS)
    start = sample * H * W * C
    zero = tl.zeros((LANES, CHANNELS), tl.float32)
    at_taps = taps + (sample * tl.num_programs(1) + tl.program_id(1)) * K * K * CHANNELS
    at_taps += tl.broadcast_to(tl.arange(0, CHANNELS)[None, :], (LANES, CHANNELS))
    window = (zero,) * (K * PIXELS)  # output rows row - K // 2 to row + K // 2
    for row in range(H):
        source = _load_row(x + start, row, columns - K // 2, channels, H, W, C, PIXELS + K - 1)
        for j in tl.static_range(K):
            sums = ()
            for k in tl.static_range(K):
                factor = tl.load(at_taps + ((K - 1 - k) * K + j) * CHANNELS)
                for p in tl.static_range(PIXELS):
                    sums = sums + (tl.fma(source[p + j], factor, window[k * PIXELS + p]),)
            window = sums
        if row >= K // 2:
            _store_sum(out, base, start, window, row - K // 2, columns, channels, H, W, HAS_BASE, C, PIXELS)
        window = window[PIXELS:] + (zero,) * PIXELS
    for k in tl.static_range(K // 2):
        rows = window[k * PIXELS :]
        _store_sum(out, base, start, rows, H - K // 2 + k, columns, channels, H, W, HAS_BASE, C, PIXELS)


@triton.jit
def _store_sum(
    out, base, start, values, row, columns, channels, H, W,
    HAS_BASE: tl.constexpr, C: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Store a row of the text convolution, with that of ``base`` if there is one."""
    if HAS_BASE:
        before = _load_row(base + start, row, columns, channels, H, W, C, PIXELS)
        sums = ()
        for p in tl.static_range(PIXELS):
            sums = sums + (values[p] + before[p],)
        _store_row(out + start, sums, row, columns, channels, H, W, C, PIXELS)
    else:
        _store_row(out + start, values, row, columns, channels, H, W, C, PIXELS)


@triton.jit
def _text_taps(
    x, grad, sums, H, W, T, columns_each,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens, (tiles, N, T, C); those of the taps that repeat the last token are summed.

    A thread holds the gradients of all taps of its channel and K - 1 + ROWS rows of the output gradient, PIXELS wide,
    and combines each input row that it loads with K of them.
    """
    sample = tl.program_id(2).to(tl.int64)
    start = sample * H * W * C
    channels = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    begin = tl.program_id(0) * columns_each
    zero = tl.zeros((1, CHANNELS), tl.float32)
    total = (zero,) * (K * K)
    for first in range(begin, tl.minimum(begin + columns_each, W), PIXELS):
        window = (zero,) * (PIXELS * (K // 2))  # rows above the image; then rows 0 to K // 2 - 1
        for k in tl.static_range(K // 2):
            window = window + _load_row(grad + start, k, first, channels, H, W, C, PIXELS)
        for above in range(0, H, ROWS):
            for r in tl.static_range(ROWS):
                window = window + _load_row(grad + start, above + r + K // 2, first, channels, H, W, C, PIXELS)
            for r in tl.static_range(ROWS):
                source = _load_row(x + start, above + r, first - K // 2, channels, H, W, C, PIXELS + K - 1)
                for p in tl.static_range(PIXELS):
                    more = ()
                    for k in tl.static_range(K * K):
                        gradient = window[(K - 1 + r - k // K) * PIXELS + p]
                        more = more + (tl.fma(source[p + k % K], gradient, total[k]),)
                    total = more
            window = window[ROWS * PIXELS :]
    at = sums + (tl.program_id(0) * tl.num_programs(2) + sample) * T * C + channels
    last, before_last = zero, tl.zeros((1, CHANNELS), tl.int32) + (T - 1)
    for k in tl.static_range(K * K):
        tl.store(at + k * C, total[k].to(sums.dtype.element_ty), (channels < C) & (k < before_last))
        last += tl.where(k < before_last, 0.0, total[k])
    tl.store(at + (T - 1) * C, last.to(sums.dtype.element_ty), channels < C)


# ---- The interface that ``plain`` and ``native`` have as well ----


def _rows(C: int) -> dict[str, int]:
    """Tile size and number of warps of a kernel whose tile holds all channels."""
    block = triton.next_power_of_2(C)
    return {
        "C": C,
        "ROWS": max(1, WARP_TILE // block),
        "BLOCK": block,
        "num_warps": max(1, block // WARP_TILE),
        **FUSED,
    }


def _parts(programs: int, warps: int, most: int) -> int:
    """Into how many parts to cut each program of one warp, so that each multiprocessor has about ``warps`` of them."""
    return max(1, min(most, triton.cdiv(MULTIPROCESSORS * warps, programs)))


def _strips(x: Tensor, tile: int, pixels: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid (strips, channel blocks, N) and tile of a kernel that walks down rows, ``pixels`` columns in a thread."""
    N, _, W, C = x.shape
    lanes = min(triton.next_power_of_2(triton.cdiv(W, pixels)), tile // 32)
    grid = (triton.cdiv(W, lanes * pixels), triton.cdiv(C, tile // lanes), N)
    return grid, {"C": C, "PIXELS": pixels, "LANES": lanes, "CHANNELS": tile // lanes, "num_warps": 1, **FUSED}


def _depthwise_strips(x: Tensor, pixels: int) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Grid (strips, channel blocks, N * parts), the rows of a part, and the tile."""
    (strips, blocks, N), tile = _strips(x, CONV_TILE, pixels)
    H = x.shape[1]
    rows_each = triton.cdiv(H, _parts(strips * blocks * N, 24, triton.cdiv(H, CONV_ROWS)))
    return (strips, blocks, N * triton.cdiv(H, rows_each)), rows_each, tile


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
    _norm_forward[triton.cdiv(H * W, CHUNK), N](
        x, branch, *map(_vector, (gate, shift, scale)), residual, out, mean, rstd, H * W, NORM_EPS, CHUNK,
        HAS_BRANCH=branch is not None, HAS_GATE=gate is not None, MODULATE=scale is not None, **_rows(C),
    )  # fmt: skip
    return residual, out, mean, rstd


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
    N, H, W, C = source.shape
    chunks = triton.cdiv(H * W, CHUNK)
    grad_x, grad_branch = torch.empty_like(source), None if gate is None else torch.empty_like(source)
    out = torch.empty_like(source) if again else None
    sums = torch.empty(4, N, chunks, C, dtype=torch.float32, device=source.device)
    _norm_backward[chunks, N](
        source, mean, rstd, *map(_vector, (shift, scale)), branch, _vector(gate), grad_residual, grad_out,
        grad_x, grad_branch, out, sums, H * W, CHUNK,
        HAS_GATE=gate is not None, HAS_RESIDUAL=grad_residual is not None, MODULATE=scale is not None, AGAIN=again,
        **_rows(C),
    )  # fmt: skip
    likes = (gate, None if gate is None else sums, scale, scale)
    return grad_x, grad_branch, *(_as(like, part) for like, part in zip(likes, sums, strict=True)), out


def scale_forward(x: Tensor, scale: Tensor, base: Tensor | None) -> Tensor:
    N, H, W, C = x.shape
    out = torch.empty_like(x)
    grid = (triton.cdiv(H * W, CHUNK), N)
    _scale_forward[grid](x, _vector(scale), base, out, H * W, CHUNK, HAS_BASE=base is not None, **_rows(C))
    return out


def scale_backward(x: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    N, H, W, C = x.shape
    chunks = triton.cdiv(H * W, CHUNK)
    grad_x, sums = torch.empty_like(x), torch.empty(2, N, chunks, C, dtype=torch.float32, device=x.device)
    _scale_backward[chunks, N](x, _vector(scale), grad, grad_x, sums, H * W, CHUNK, **_rows(C))
    return grad_x, sums[0].sum(1).to(scale.dtype), sums[1].sum(1)


def gelu_backward(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    C = x.shape[-1]
    pixels = x.numel() // C
    grad_x, out, chunks = torch.empty_like(x), torch.empty_like(x), triton.cdiv(pixels, GELU_CHUNK)
    sums = torch.empty(chunks, C, dtype=torch.float32, device=x.device)
    _gelu_backward[chunks, triton.cdiv(C, GELU_CHANNELS)](
        x, grad, grad_x, out, sums, pixels, GELU_CHUNK, C,
        ROWS=WARP_TILE // GELU_CHANNELS, BLOCK=GELU_CHANNELS, num_warps=1, **FUSED,
    )  # fmt: skip
    return grad_x, sums.sum(0), out


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    N, H, W, C = x.shape
    grid, rows_each, tile = _depthwise_strips(x, CONV_PIXELS)
    out, sums = torch.empty_like(x), torch.empty(grid[2] * grid[0], C, dtype=torch.float32, device=x.device)
    _depthwise_forward[grid](x, _taps_first(weight), bias, out, sums, H, W, rows_each, **tile)
    return out, (sums.view(N, -1, C).sum(1) / (H * W)).to(x.dtype)


def depthwise_backward(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, grad_mean: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, H, W, C = x.shape
    taps, before, grad_x = _taps_first(weight), torch.empty_like(x), torch.empty_like(x)
    grid, rows_each, tile = _depthwise_strips(x, CONV_PIXELS)
    bias_sums = torch.empty(grid[2] * grid[0], C, dtype=torch.float32, device=x.device)
    _depthwise_slope[grid](x, taps, bias, grad, grad_mean.contiguous(), before, bias_sums, H, W, rows_each, **tile)
    grid, rows_each, tile = _depthwise_strips(x, CONV_GRADIENT_PIXELS)
    sums = torch.empty(grid[2] * grid[0], 10, C, dtype=torch.float32, device=x.device)
    even = W % (tile["PIXELS"] * tile["LANES"]) == 0
    _depthwise_backward[grid](x, taps, before, grad_x, sums, H, W, rows_each, EVEN=even, **tile)
    grad_weight = sums[:, :9].sum(0).T.reshape(weight.shape).to(weight.dtype)
    return grad_x, grad_weight, bias_sums.sum(0).to(bias.dtype), sums[:, 9].sum(0)


def _taps_first(weight: Tensor) -> Tensor:
    """(C, 1, 3, 3) -> (9, C), so that a thread loads one tap of several channels at once."""
    return weight.reshape(-1, 9).T.contiguous()


def text_forward(x: Tensor, context: Tensor, kernel: int, base: Tensor | None = None) -> Tensor:
    return _correlate(x, context, base, kernel, flipped=False)


def text_backward(
    x: Tensor, context: Tensor, grad: Tensor, kernel: int, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad_x = _correlate(grad, context, None, kernel, flipped=True) if wants[0] else None
    return grad_x, _token_gradient(x, context, grad, kernel) if wants[1] else None


def _correlate(x: Tensor, context: Tensor, base: Tensor | None, kernel: int, *, flipped: bool) -> Tensor:
    (N, H, W, C), T = x.shape, context.shape[1]
    (strips, blocks, _), tile = _strips(x, TEXT_TILE, TEXT_PIXELS)
    count, channels, out = kernel**2, tile["CHANNELS"], torch.empty_like(x)
    taps = torch.empty(N, blocks, count, channels, dtype=torch.float32, device=x.device)
    _text_pack[blocks, N](
        context, taps, T, C,
        FLIPPED=flipped, TAPS=count, BLOCK=triton.next_power_of_2(count), CHANNELS=channels, **FUSED,
    )  # fmt: skip
    _text_forward[strips, blocks, N](x, taps, base, out, H, W, HAS_BASE=base is not None, K=kernel, **tile)
    return out


def _token_gradient(x: Tensor, context: Tensor, grad: Tensor, kernel: int) -> Tensor:
    (N, H, W, C), T = x.shape, context.shape[1]
    blocks = triton.cdiv(C, TAPS_TILE)
    parts = _parts(blocks * N, 8, triton.cdiv(W, TAPS_PIXELS))
    columns = triton.cdiv(triton.cdiv(W, parts), TAPS_PIXELS) * TAPS_PIXELS
    tiles = triton.cdiv(W, columns)
    sums = torch.empty(tiles, N, T, C, dtype=context.dtype if tiles == 1 else torch.float32, device=x.device)
    _text_taps[tiles, blocks, N](
        x, grad, sums, H, W, T, columns,
        C=C, K=kernel, ROWS=TAPS_ROWS, PIXELS=TAPS_PIXELS, CHANNELS=TAPS_TILE, num_warps=1, **FUSED,
    )  # fmt: skip
    return sums[0] if tiles == 1 else sums.sum(0).to(context.dtype)
