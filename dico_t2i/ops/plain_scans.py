"""The recurrences along tokens through torch alone: in chunks, with no loop over single tokens.

No exponential is ever of more than 0: decays are sums of gates over the very tokens between two places, or products of
such factors, and never the quotient of two that have run further.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

GLA_CHUNK = 16  # tokens of one chunk of gated linear attention
SCAN_CHUNK = 32  # tokens from one stored state of the selective scan to the next; scans.c has the same


def _wide(tensor: Tensor) -> Tensor:
    """float64 as it is, all else in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# ---- gated linear attention ----


def gla_forward(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    L = q.shape[1]
    q, k, values, gates = (_in_chunks(tensor) for tensor in (q, k, v, gates))
    q, decay = q * q.shape[-1] ** -0.5, gates.exp()
    states, state = _gla_states(k, values, gates)
    weights = torch.zeros(*q.shape[:-1], GLA_CHUNK, dtype=q.dtype, device=q.device)
    for distance, fade in _fades(decay):
        pairs = q[..., distance:, :] * fade * k[..., : GLA_CHUNK - distance, :]
        weights.diagonal(-distance, -2, -1).copy_(pairs.sum(-1))
    out = weights @ values + (q * gates.cumsum(-2).exp()) @ states
    return _tokens(out, L).to(v.dtype), state


def gla_backward(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, state: Tensor, grad: Tensor, grad_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a token does to itself is added apart: no gate has a part in it, and there it would have to cancel."""
    L, likes, scale = q.shape[1], (q, k, v, gates), q.shape[-1] ** -0.5
    q, k, values, gates, grad = (_in_chunks(tensor) for tensor in (q, k, v, gates, grad))
    q, decay, begun, ending = q * scale, gates.exp(), gates.cumsum(-2).exp(), _until_the_end(gates)
    states, _ = _gla_states(k, values, gates)
    later = torch.zeros_like(states[:, :, 0]) if grad_state is None else grad_state
    slopes = _carried(((q * begun).transpose(-1, -2) @ grad).flip(2), begun[..., -1:, :].flip(2), later)[0].flip(2)
    grad_q, grad_k = begun * (grad @ states.transpose(-1, -2)), ending * (values @ slopes.transpose(-1, -2))
    grad_v = (k * ending) @ slopes
    grad_weights = grad @ values.transpose(-1, -2)
    for distance, fade in _fades(decay):
        here, there = (..., slice(distance, None), slice(None)), (..., slice(GLA_CHUNK - distance), slice(None))
        weight = grad_weights.diagonal(-distance, -2, -1)[..., None] * fade
        grad_v[there] += (q[here] * fade * k[there]).sum(-1, keepdim=True) * grad[here]
        if distance:
            grad_q[here] += weight * k[there]
            grad_k[there] += weight * q[here]
    through = _tokens(q * grad_q - k * grad_k, L)
    grad_gates = through.flip(1).cumsum(1).flip(1)
    if grad_state is not None:
        grad_gates = grad_gates + (state * grad_state).sum(-1)[:, None]
    own = grad_weights.diagonal(0, -2, -1)[..., None]
    grads = (_tokens(scale * (grad_q + own * k), L), _tokens(grad_k + own * q, L), _tokens(grad_v, L), grad_gates)
    return tuple(g.to(like.dtype) for g, like in zip(grads, likes, strict=True))  # type: ignore[return-value]


def _in_chunks(x: Tensor) -> Tensor:
    """(N, L, H, d) -> (N, H, chunks, GLA_CHUNK, d), zeros at the end."""
    x = F.pad(_wide(x), (0, 0, 0, 0, 0, -x.shape[1] % GLA_CHUNK)).transpose(1, 2)
    return x.reshape(*x.shape[:2], -1, GLA_CHUNK, x.shape[-1])


def _tokens(x: Tensor, L: int) -> Tensor:
    """The inverse of ``_in_chunks``."""
    return x.flatten(2, 3)[:, :, :L].transpose(1, 2).contiguous()


def _fades(decay: Tensor) -> Iterator[tuple[int, Tensor]]:
    """How much is left after each distance inside a chunk: (..., chunk - distance, K) for the tokens that look back."""
    fade = torch.ones_like(decay)
    yield 0, fade
    for distance in range(1, GLA_CHUNK):
        fade = fade[..., 1:, :] * decay[..., 1 : GLA_CHUNK - distance + 1, :]
        yield distance, fade


def _until_the_end(gates: Tensor) -> Tensor:
    """The decay from after each token to the end of its chunk."""
    following = F.pad(gates[..., 1:, :], (0, 0, 0, 1))
    return following.flip(-2).cumsum(-2).flip(-2).exp()


def _gla_states(k: Tensor, values: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk (N, H, chunks, K, V), and the last one (N, H, K, V)."""
    added = (k * _until_the_end(gates)).transpose(-1, -2) @ values
    return _carried(added, gates.sum(-2, keepdim=True).exp(), torch.zeros_like(added[:, :, 0]))


def _carried(added: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """state <- decay * state + added, from chunk to chunk: the states before each one, and the last.

    added (N, H, chunks, K, V), decay (N, H, chunks, 1, K), state (N, H, K, V).
    """
    states = torch.empty_like(added)
    for chunk in range(added.shape[2]):
        states[:, :, chunk] = state
        state = torch.addcmul(added[:, :, chunk], decay[:, :, chunk].transpose(-1, -2), state)
    return states, state


# ---- selective scan ----


class _Tokens:
    """A scan's tokens, the same place of all chunks at a time: (N, chunks, E) or (N, chunks, n) each.

    Tokens that fill the last chunk have steps of 0, and leave the state as it is.
    """

    def __init__(self, backwards: bool, L: int) -> None:
        self.backwards, self.L = backwards, L

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, L, d) -> SCAN_CHUNK times (N, chunks, d)."""
        x = F.pad(_wide(x.flip(1) if self.backwards else x), (0, 0, 0, -self.L % SCAN_CHUNK))
        return x.unflatten(1, (-1, SCAN_CHUNK)).unbind(2)

    def join(self, parts: list[Tensor]) -> Tensor:
        x = torch.stack(parts, 2).flatten(1, 2)[:, : self.L]
        return x.flip(1) if self.backwards else x


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor, backwards: bool
) -> tuple[Tensor, Tensor]:
    tokens, A = _Tokens(backwards, u.shape[1]), _wide(A)
    dt = F.softplus(_wide(delta) + _wide(bias))
    steps, inputs, keys, queries = (tokens.cut(x) for x in (dt, dt * u, B, C))

    def walk(state: Tensor) -> Iterator[Tensor]:
        for step, x, key in zip(steps, inputs, keys, strict=True):
            state = torch.addcmul(key[..., None] * x[:, :, None], (step[:, :, None] * A).exp(), state)
            yield state

    *_, added = walk(torch.zeros(len(u), len(steps[0][0]), *A.shape, dtype=dt.dtype, device=u.device))
    states = _scan_carried(added, (torch.stack(steps).sum(0)[:, :, None] * A).exp())
    read = [(query[..., None] * state).sum(2) for query, state in zip(queries, walk(states), strict=True)]
    return ((tokens.join(read) + _wide(D) * u) * F.silu(_wide(z))).to(u.dtype), states


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
    tokens, A, z, grad = _Tokens(backwards, u.shape[1]), _wide(A), _wide(z), _wide(grad)
    before = _wide(delta) + _wide(bias)
    dt, gated, sigmoid = F.softplus(before), F.silu(z) * grad, z.sigmoid()
    steps, inputs, keys, queries, slopes = (tokens.cut(x) for x in (dt, dt * u, B, C, gated))
    decays = [(step[:, :, None] * A).exp() for step in steps]
    held = [states]
    for decay, x, key in zip(decays, inputs, keys, strict=True):
        held.append(torch.addcmul(key[..., None] * x[:, :, None], decay, held[-1]))

    def walk_back(later: Tensor) -> Iterator[Tensor]:
        """The gradient of each state; ``later`` is what comes back from the next token."""
        for decay, query, slope in zip(decays[::-1], queries[::-1], slopes[::-1], strict=True):
            of_state = torch.addcmul(later, query[..., None], slope[:, :, None])
            yield of_state
            later = of_state * decay

    *_, first = walk_back(torch.zeros_like(states))
    whole = (torch.stack(steps).sum(0)[:, :, None] * A).exp()
    later = _scan_carried((first * decays[0]).flip(1), whole.flip(1)).flip(1)
    grad_A, parts = torch.zeros_like(A), []
    for place, of_state in zip(range(SCAN_CHUNK)[::-1], walk_back(later), strict=True):
        through = of_state * decays[place] * held[place]
        grad_A += (through * steps[place][:, :, None]).sum((0, 1))
        parts.append(
            (
                (held[place + 1] * queries[place][..., None]).sum(2),
                (through * A).sum(2),
                (of_state * keys[place][..., None]).sum(2),
                (of_state * inputs[place][:, :, None]).sum(3),
                (held[place + 1] * slopes[place][:, :, None]).sum(3),
            )
        )
    read, to_dt, to_input, grad_B, grad_C = (tokens.join(list(part)[::-1]) for part in zip(*parts, strict=True))
    grad_delta = (to_dt + to_input * u) * before.sigmoid()
    grad_z = grad * (read + _wide(D) * u) * sigmoid * (1 + z * (1 - sigmoid))
    grad_u, grad_D = to_input * dt + gated * _wide(D), (gated * u).sum((0, 1))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_delta.sum((0, 1))


def _scan_carried(added: Tensor, decay: Tensor) -> Tensor:
    """The states before each chunk, from 0; added and decay (N, chunks, n, E)."""
    states, state = torch.empty_like(added), torch.zeros_like(added[:, 0])
    for chunk in range(added.shape[1]):
        states[:, chunk] = state
        state = torch.addcmul(added[:, chunk], decay[:, chunk], state)
    return states
