"""The recurrences along tokens as Triton kernels, for GPUs. Not measured on one yet.

A program walks along a sequence chunk by chunk, with the state in registers: of one head in gated linear attention,
where a chunk is four small matrix products and a tile of the pairs inside it; of a few channels in the selective scan,
where a chunk is an associative scan. No exponential is of more than 0. No atomics: a result is always the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dico_t2i.ops.kernels import FUSED
from dico_t2i.ops.plain_scans import GLA_CHUNK, SCAN_CHUNK

SCAN_CHANNELS = 16  # of a program


# ---- gated linear attention ----


@triton.jit
def _head_tile(pointer, tokens, columns, L, H, width):
    """Rows of a head (TOKENS, COLUMNS) in float32, 0 outside; the program's axis 0 counts samples and heads."""
    sample, head = tl.program_id(0) // H, tl.program_id(0) % H
    at = ((sample * L + tokens.to(tl.int64)) * H + head)[:, None] * width + columns[None, :]
    return tl.load(pointer + at, (tokens < L)[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_head(pointer, value, tokens, columns, L, H, width):
    sample, head = tl.program_id(0) // H, tl.program_id(0) % H
    at = ((sample * L + tokens.to(tl.int64)) * H + head)[:, None] * width + columns[None, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), (tokens < L)[:, None] & (columns < width)[None, :])


@triton.jit
def _fade(gates, CHUNK: tl.constexpr):
    """What is left of each earlier token (axis 1) at each later one (axis 0); 0 above the diagonal.

    The gates between the two are summed by themselves: the difference of two sums from the start would have lost what
    distinguishes them where gates are strong.
    """
    later, earlier = tl.arange(0, CHUNK)[:, None, None], tl.arange(0, CHUNK)[None, :, None]
    between = tl.cumsum(tl.where(later > earlier, gates[:, None, :], 0.0), 0)
    return tl.where(later >= earlier, tl.exp(between), 0.0)


@triton.jit
def _until_the_end(gates):
    return tl.exp(tl.cumsum(gates, 0, reverse=True) - gates)


@triton.jit
def _gla_forward(
    q, k, v, gates, out, state, L, H, K, V, scale,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    keys, values = tl.arange(0, KEYS), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    held = tl.zeros((KEYS, VALUES), tl.float32)
    for start in range(0, L, CHUNK):
        tokens = start + tl.arange(0, CHUNK)
        queries = _head_tile(q, tokens, keys, L, H, K) * scale
        key, value = _head_tile(k, tokens, keys, L, H, K), _head_tile(v, tokens, values, L, H, V)
        gate = _head_tile(gates, tokens, keys, L, H, K)
        weights = tl.sum(queries[:, None, :] * key[None, :, :] * _fade(gate, CHUNK), 2)
        result = tl.dot(weights, value, input_precision=PRECISION)
        result += tl.dot(queries * tl.exp(tl.cumsum(gate, 0)), held, input_precision=PRECISION)
        _store_head(out, result, tokens, values, L, H, V)
        held *= tl.exp(tl.sum(gate, 0))[:, None]
        held += tl.dot(tl.trans(key * _until_the_end(gate)), value, input_precision=PRECISION)
    at = (tl.program_id(0) * K + keys)[:, None] * V + values[None, :]
    tl.store(state + at, held, (keys < K)[:, None] & (values < V)[None, :])


@triton.jit
def _gla_backward_q(
    k, v, gates, grad, grad_q, L, H, K, V,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q without the scale, and without what a token does to itself."""
    keys, values = tl.arange(0, KEYS), tl.arange(0, VALUES)
    rows = tl.arange(0, CHUNK)
    held = tl.zeros((KEYS, VALUES), tl.float32)
    for start in range(0, L, CHUNK):
        tokens = start + rows
        key, value = _head_tile(k, tokens, keys, L, H, K), _head_tile(v, tokens, values, L, H, V)
        gate, slope = _head_tile(gates, tokens, keys, L, H, K), _head_tile(grad, tokens, values, L, H, V)
        pairs = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
        pairs = tl.where(rows[:, None] > rows[None, :], pairs, 0.0)
        result = tl.exp(tl.cumsum(gate, 0)) * tl.dot(slope, tl.trans(held), input_precision=PRECISION)
        result += tl.sum(_fade(gate, CHUNK) * pairs[:, :, None] * key[None, :, :], 1)
        _store_head(grad_q, result, tokens, keys, L, H, K)
        held *= tl.exp(tl.sum(gate, 0))[:, None]
        held += tl.dot(tl.trans(key * _until_the_end(gate)), value, input_precision=PRECISION)


@triton.jit
def _gla_backward_kv(
    q, k, v, gates, grad, grad_state, grad_k, grad_v, L, H, K, V, scale,
    HAS_STATE: tl.constexpr,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k without what a token does to itself."""
    keys, values = tl.arange(0, KEYS), tl.arange(0, VALUES)
    rows = tl.arange(0, CHUNK)
    held = tl.zeros((KEYS, VALUES), tl.float32)
    if HAS_STATE:
        at = (tl.program_id(0) * K + keys)[:, None] * V + values[None, :]
        held = tl.load(grad_state + at, (keys < K)[:, None] & (values < V)[None, :], other=0.0).to(tl.float32)
    chunks = tl.cdiv(L, CHUNK)
    for number in range(chunks):
        tokens = (chunks - 1 - number) * CHUNK + rows
        queries = _head_tile(q, tokens, keys, L, H, K) * scale
        key, value = _head_tile(k, tokens, keys, L, H, K), _head_tile(v, tokens, values, L, H, V)
        gate, slope = _head_tile(gates, tokens, keys, L, H, K), _head_tile(grad, tokens, values, L, H, V)
        ending, fade = _until_the_end(gate), _fade(gate, CHUNK)
        weights = tl.sum(queries[:, None, :] * key[None, :, :] * fade, 2)
        result = tl.dot(tl.trans(weights), slope, input_precision=PRECISION)
        result += tl.dot(key * ending, held, input_precision=PRECISION)
        _store_head(grad_v, result, tokens, values, L, H, V)
        pairs = tl.dot(slope, tl.trans(value), input_precision=PRECISION)
        pairs = tl.where(rows[:, None] > rows[None, :], pairs, 0.0)
        result = ending * tl.dot(value, tl.trans(held), input_precision=PRECISION)
        result += tl.sum(fade * pairs[:, :, None] * queries[:, None, :], 0)
        _store_head(grad_k, result, tokens, keys, L, H, K)
        held *= tl.exp(tl.sum(gate, 0))[:, None]
        held += tl.dot(tl.trans(queries * tl.exp(tl.cumsum(gate, 0))), slope, input_precision=PRECISION)


def _gla_tile(K: int, V: int, like: Tensor) -> dict[str, object]:
    """Products of float32 are exact ones; those of bf16 run in TF32, which has more digits than they."""
    precision = "ieee" if like.dtype == torch.float32 else "tf32"
    sides = {"KEYS": max(16, triton.next_power_of_2(K)), "VALUES": max(16, triton.next_power_of_2(V))}
    return {"CHUNK": GLA_CHUNK, **sides, "PRECISION": precision, "num_warps": 4}


def gla_forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    (N, L, H, V), K = v.shape, q.shape[-1]
    out, state = torch.empty_like(v), torch.empty(N, H, K, V, dtype=torch.float32, device=v.device)
    tile = _gla_tile(K, min(V, 64), v)
    grid = (N * H, triton.cdiv(V, tile["VALUES"]))
    _gla_forward[grid](q, k, v, gates, out, state, L, H, K, V, K**-0.5, **tile, **FUSED)
    return out, state


def gla_backward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor, grad: Tensor, grad_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (N, L, H, V), K = v.shape, q.shape[-1]
    scale, tile = K**-0.5, _gla_tile(K, V, v)
    grad_q, grad_k = (torch.empty(q.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    grad_v = torch.empty_like(v)
    _gla_backward_q[N * H,](k, v, gates, grad, grad_q, L, H, K, V, **tile, **FUSED)
    _gla_backward_kv[N * H,](
        q, k, v, gates, grad, grad_state, grad_k, grad_v, L, H, K, V, scale,
        HAS_STATE=grad_state is not None, **tile, **FUSED,
    )  # fmt: skip
    through = scale * q * grad_q - k * grad_k
    grad_gates = through.flip(1).cumsum(1).flip(1)
    if grad_state is not None:
        grad_gates += (state * grad_state).sum(-1)[:, None]
    own = (v.float() * grad).sum(-1, keepdim=True)
    grad_q, grad_k = scale * (grad_q + own * k), grad_k + scale * own * q
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v, grad_gates.to(gates.dtype)


# ---- selective scan ----


@triton.jit
def _sigmoid(x):
    small = tl.exp(-tl.abs(x))
    return tl.where(x > 0, 1.0, small) / (1.0 + small)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact where it is small: log1p by the series of 2 atanh(e / (2 + e))."""
    small = tl.exp(-tl.abs(x))
    s = small / (2.0 + small)
    square = s * s
    series = 1.0 / 9 + square * (1.0 / 11 + square / 13)
    series = 1.0 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * series)))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _then(decay1, added1, decay2, added2):
    return decay1 * decay2, added1 * decay2 + added2


@triton.jit
def _then_apart(decay1, added1, faded1, decay2, added2, faded2):
    """faded is added without what the last token adds: a difference would lose it where it is small."""
    passed = added1 * decay2
    return decay1 * decay2, passed + added2, passed + faded2


@triton.jit
def _row(tile, number, CHUNK: tl.constexpr):
    """One row of axis 0."""
    return tl.sum(tl.where(tl.arange(0, CHUNK)[:, None, None] == number, tile, 0.0), 0)


@triton.jit
def _channel_tile(pointer, places, channels, known, E):
    at = places.to(tl.int64)[:, None] * E + channels[None, :]
    return tl.load(pointer + at, known[:, None] & (channels < E)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_channels(pointer, value, places, channels, known, E):
    at = places.to(tl.int64)[:, None] * E + channels[None, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), known[:, None] & (channels < E)[None, :])


@triton.jit
def _steps(delta, offset, places, channels, known, E):
    """dt of some tokens (CHUNK, CHANNELS); 0 where there is none, which leaves a state as it is."""
    raw = _channel_tile(delta, places, channels, known, E) + offset[None, :]
    return tl.where(known[:, None], _softplus(raw), 0.0), raw


@triton.jit
def _scan_forward(
    u, delta, A, B, C, D, z, bias, out, kept, L, E, S,
    BACKWARDS: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    sample, channels = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    states, inside = tl.arange(0, STATES), channels < E
    matrix = states[None, :] * E + channels[:, None]
    there = (states < S)[None, :] & inside[:, None]
    rates = tl.load(A + matrix, there, other=0.0).to(tl.float32)
    skip, offset = tl.load(D + channels, inside, other=0.0), tl.load(bias + channels, inside, other=0.0)
    held = tl.zeros((CHANNELS, STATES), tl.float32)
    chunks = tl.cdiv(L, CHUNK)
    for number in range(chunks):
        step = number * CHUNK + tl.arange(0, CHUNK)
        known = step < L
        places = sample * L + (L - 1 - step if BACKWARDS else step)
        tl.store(kept + (sample * chunks + number).to(tl.int64) * S * E + matrix, held, there)
        dt, _ = _steps(delta, offset, places, channels, known, E)
        source = _channel_tile(u, places, channels, known, E)
        key, query = _channel_tile(B, places, states, known, S), _channel_tile(C, places, states, known, S)
        decay = tl.exp(dt[:, :, None] * rates[None, :, :])
        whole, state = tl.associative_scan((decay, (dt * source)[:, :, None] * key[:, None, :]), 0, _then)
        state += whole * held[None, :, :]
        gate = _channel_tile(z, places, channels, known, E)
        read = tl.sum(state * query[:, None, :], 2) + skip[None, :] * source
        _store_channels(out, read * gate * _sigmoid(gate), places, channels, known, E)
        held = _row(state, CHUNK - 1, CHUNK)


@triton.jit
def _scan_backward(
    u, delta, A, B, C, D, z, bias, kept, grad,
    grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, N, L, E, S,
    BACKWARDS: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """grad_B and grad_C (blocks, N, L, S), grad_A (N, S, E), grad_D and grad_bias (N, E), in float32."""
    sample, channels = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    states, inside = tl.arange(0, STATES), channels < E
    matrix = states[None, :] * E + channels[:, None]
    there = (states < S)[None, :] & inside[:, None]
    rates = tl.load(A + matrix, there, other=0.0).to(tl.float32)
    skip, offset = tl.load(D + channels, inside, other=0.0), tl.load(bias + channels, inside, other=0.0)
    carried = tl.zeros((CHANNELS, STATES), tl.float32)
    sum_A = tl.zeros((CHANNELS, STATES), tl.float32)
    sum_D, sum_bias = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    chunks = tl.cdiv(L, CHUNK)
    for back in range(chunks):
        number = chunks - 1 - back
        row = tl.arange(0, CHUNK)
        step = number * CHUNK + row
        known = step < L
        place = L - 1 - step if BACKWARDS else step
        places = sample * L + place
        dt, raw = _steps(delta, offset, places, channels, known, E)
        source = _channel_tile(u, places, channels, known, E)
        key, query = _channel_tile(B, places, states, known, S), _channel_tile(C, places, states, known, S)
        decay = tl.exp(dt[:, :, None] * rates[None, :, :])
        added = (dt * source)[:, :, None] * key[:, None, :]
        held = tl.load(kept + (sample * chunks + number).to(tl.int64) * S * E + matrix, there, other=0.0)
        whole, state, faded = tl.associative_scan((decay, added, tl.zeros_like(added)), 0, _then_apart)
        state += whole * held[None, :, :]
        faded += whole * held[None, :, :]
        gate, slope = _channel_tile(z, places, channels, known, E), _channel_tile(grad, places, channels, known, E)
        sigmoid = _sigmoid(gate)
        passed = slope * gate * sigmoid
        # The gradient of a state fades by the decay of the token after it; the chunk's last one has it in `carried`.
        following = known & (step + 1 < L) & (row + 1 < CHUNK)
        next_dt, _ = _steps(delta, offset, places + (-1 if BACKWARDS else 1), channels, following, E)
        next_decay = tl.exp(next_dt[:, :, None] * rates[None, :, :])
        read = passed[:, :, None] * query[:, None, :]
        whole, of_state = tl.associative_scan((next_decay, read), 0, _then, reverse=True)
        of_state += whole * carried[None, :, :]
        carried = _row(of_state * decay, 0, CHUNK)
        through = of_state * faded
        to_input = tl.sum(of_state * key[:, None, :], 2)
        to_delta = (tl.sum(through * rates[None, :, :], 2) + to_input * source) * _sigmoid(raw)
        to_delta = tl.where(known[:, None], to_delta, 0.0)
        _store_channels(grad_u, to_input * dt + passed * skip[None, :], places, channels, known, E)
        _store_channels(grad_delta, to_delta, places, channels, known, E)
        result = tl.sum(state * query[:, None, :], 2) + skip[None, :] * source
        result *= slope * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        _store_channels(grad_z, result, places, channels, known, E)
        partial = (tl.program_id(1) * N + sample) * L + place
        _store_channels(grad_B, tl.sum(of_state * (dt * source)[:, :, None], 1), partial, states, known, S)
        _store_channels(grad_C, tl.sum(state * passed[:, :, None], 1), partial, states, known, S)
        sum_A += tl.sum(through * dt[:, :, None], 0)
        sum_D += tl.sum(passed * source, 0)
        sum_bias += tl.sum(to_delta, 0)
    tl.store(grad_A + sample * S * E + matrix, sum_A, there)
    tl.store(grad_D + sample * E + channels, sum_D, inside)
    tl.store(grad_bias + sample * E + channels, sum_bias, inside)


def _scan_tile(states: int, backwards: bool) -> dict[str, object]:
    sides = {"CHUNK": SCAN_CHUNK, "CHANNELS": SCAN_CHANNELS, "STATES": triton.next_power_of_2(states)}
    return {"BACKWARDS": backwards, **sides, "num_warps": 8}


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    (N, L, E), n = u.shape, len(A)
    states = torch.empty(N, triton.cdiv(L, SCAN_CHUNK), n, E, dtype=torch.float32, device=u.device)
    out = torch.empty_like(u)
    grid = (N, triton.cdiv(E, SCAN_CHANNELS))
    _scan_forward[grid](u, delta, A, B, C, D, z, bias, out, states, L, E, n, **_scan_tile(n, backwards), **FUSED)
    return out, states


def scan_backward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    bias: Tensor,
    states: Tensor,
    grad: Tensor,
    backwards: bool,
) -> tuple[Tensor, ...]:
    (N, L, E), n, blocks = u.shape, len(A), triton.cdiv(u.shape[2], SCAN_CHANNELS)

    def sums(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=u.device)

    grad_u, grad_delta, grad_z = torch.empty_like(u), torch.empty_like(delta), torch.empty_like(z)
    grad_A, grad_B, grad_C = sums(N, n, E), sums(blocks, N, L, n), sums(blocks, N, L, n)
    grad_D, grad_bias = sums(N, E), sums(N, E)
    _scan_backward[N, blocks](
        u, delta, A, B, C, D, z, bias, states, grad,
        grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, N, L, E, n,
        **_scan_tile(n, backwards), **FUSED,
    )  # fmt: skip
    summed = (grad_A.sum(0), grad_B.sum(0), grad_C.sum(0), grad_D.sum(0))
    return grad_u, grad_delta, *summed, grad_z, grad_bias.sum(0)
