"""Gated linear attention and the selective scan: against token loops in float64, each implementation against that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dico_t2i import ops
from dico_t2i.ops import native, native_scans, plain_scans, reference
from tests.ops.scan_cases import attention_errors, attention_inputs, scan_errors, scan_inputs

ROOT = Path(__file__).resolve().parents[2]
DOUBLE = torch.float64
# N, L, H, K, V and the strength of the gates: DiG's, sigmoids, and such as let nothing through.
ATTENTION = [((2, 37, 3, 8, 16), 1 / 16), ((1, 64, 2, 16, 16), 1.0), ((2, 50, 1, 33, 20), 30.0), ((1, 2, 2, 4, 3), 1.0)]
# N, L, E, n and the size of the steps.
SCANS = [((2, 37, 12, 16), 0), ((1, 64, 6, 8), 6), ((2, 70, 150, 5), -4), ((1, 1, 3, 2), 0)]
# The gradient of a gate that is shut is a small difference of what float32 has rounded.
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 6e-2}
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")
implementations = pytest.mark.parametrize(
    "module", [plain_scans, pytest.param(native_scans, marks=needs_compiler)], ids=["torch", "c"]
)


def values_and_gradients(function, inputs, **options):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = function(*leaves, **options)
    out = (out,) if isinstance(out, torch.Tensor) else out
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype) for o in out]
    loss = sum((o * w).sum() for o, w in zip(out, weights, strict=True))
    return (*out, *torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize(("shape", "strength"), ATTENTION)
def test_attention_is_the_reference(shape, strength):
    inputs = attention_inputs(shape, strength, DOUBLE)
    both = [values_and_gradients(m.gated_linear_attention, inputs) for m in (ops, reference)]
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("shape", "step"), SCANS)
def test_the_scan_is_the_reference(shape, step, backwards):
    inputs = scan_inputs(shape, step, DOUBLE)
    both = [values_and_gradients(m.selective_scan, inputs, backwards=backwards) for m in (ops, reference)]
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


def test_a_scan_backwards_is_that_of_reversed_tokens():
    u, delta, A, B, C, D, z, bias = scan_inputs((2, 40, 5, 3), 0, DOUBLE)
    turned = ops.selective_scan(*(x.flip(1) for x in (u, delta)), A, *(x.flip(1) for x in (B, C)), D, z.flip(1), bias)
    torch.testing.assert_close(ops.selective_scan(u, delta, A, B, C, D, z, bias, backwards=True), turned.flip(1))


def test_finite_differences():
    attention = [x.requires_grad_() for x in attention_inputs((1, 18, 1, 3, 2), 1, DOUBLE)]
    assert torch.autograd.gradcheck(ops.gated_linear_attention, attention, fast_mode=True)
    scan = [x.requires_grad_() for x in scan_inputs((1, 34, 2, 3), 0, DOUBLE)]
    assert torch.autograd.gradcheck(ops.selective_scan, scan, fast_mode=True)


def test_torch_can_trace_them():
    """Shapes, strides and gradients as declared: what torch.compile and the meta device rely on."""
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    attention = [x.requires_grad_() for x in attention_inputs((2, 5, 2, 3, 4), 1, torch.float32)]
    torch.library.opcheck(torch.ops.dico_t2i.gated_linear_attention, tuple(attention), test_utils=tests)
    scan = [x.requires_grad_() for x in scan_inputs((2, 35, 3, 4), 0, torch.float32)]
    torch.library.opcheck(torch.ops.dico_t2i.selective_scan, (*scan, True), test_utils=tests)


def test_they_compile_as_one_graph():
    for operator, inputs in (
        (ops.gated_linear_attention, attention_inputs((2, 5, 2, 3, 4), 1, torch.float32)),
        (ops.selective_scan, scan_inputs((2, 35, 3, 4), 0, torch.float32)),
    ):
        compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
        for a, b in zip(*(values_and_gradients(f, inputs) for f in (compiled, operator)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@implementations
def test_every_implementation_is_that_of_float64(module, dtype):
    for shape, strength in ATTENTION[:3]:
        found = attention_errors(module, shape, strength, dtype)
        assert max(found.values()) < LIMITS[dtype] * (20 if strength > 1 else 1), (strength, found)
    for shape, step in SCANS:
        found = scan_errors(module, shape, step, dtype)
        assert max(found.values()) < LIMITS[dtype], (step, found)


def test_triton_kernels_through_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.scan_cases", "dico_t2i.ops.kernels_scans"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("RESULT")[2])
    # The gradient of gates that are shut is what two sums that are nearly equal leave of each other: rounding counts.
    rounding = max(found.pop("strong gates, torch").values())
    limits = {"strong gates": 2 * rounding, "bfloat16 attention": 2e-2, "bfloat16 scan": 2e-2}
    assert rounding < 2e-4
    for kind, errors in found.items():
        assert max(errors.values()) < limits.get(kind, 5e-6), (kind, errors)


@pytest.mark.parametrize(
    "name", ["_gla_forward", "_gla_backward_q", "_gla_backward_kv", "_scan_forward", "_scan_backward"]
)
def test_triton_kernels_compile_for_compute_capability_9(name, monkeypatch, tmp_path):
    """At the sizes of the published networks, for bf16; no GPU is needed."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dico_t2i.ops import kernels_scans

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    like = torch.empty(0, dtype=torch.bfloat16)
    attention = "gla" in name
    tile = kernels_scans._gla_tile(32, 64, like) if attention else kernels_scans._scan_tile(16, False)
    warps = tile.pop("num_warps")
    kernel = getattr(kernels_scans, name)
    if "HAS_STATE" in kernel.arg_names:
        tile["HAS_STATE"] = False
    kinds = (
        dict.fromkeys(("L", "H", "K", "V", "E", "S", "N"), "i32") | {"scale": "fp32"} | dict.fromkeys(tile, "constexpr")
    )
    if not attention:
        kinds = {name: kind for name, kind in kinds.items() if name in ("L", "E", "S", "N") or kind == "constexpr"}
    single = {"kept", "state", "grad_A", "grad_B", "grad_C", "grad_D", "grad_bias"}
    single |= {"grad_q", "grad_k"} if attention else set()
    signature = {n: kinds.get(n, "*fp32" if n in single else "*bf16") for n in kernel.arg_names}
    constants = {(kernel.arg_names.index(n),): value for n, value in tile.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert ".target sm_90" in made.asm["ptx"]
    assert made.metadata.shared < 100_000


@needs_compiler
def test_results_do_not_depend_on_threads():
    attention = attention_inputs((2, 40, 3, 20, 30), 1, torch.float32)
    u, delta, A, *rest = scan_inputs((2, 40, 300, 5), 0, torch.float32)
    scan = (u, delta, A.T.contiguous(), *rest)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, state = native_scans.gla_forward(*attention)
            read, states = native_scans.scan_forward(*scan, False)
            gradients = native_scans.gla_backward(*attention, state, out, state)
            results.append((out, state, read, *gradients, *native_scans.scan_backward(*scan, states, read, False)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_their_own_work_is_counted():
    """Three multiply-accumulates for each number of a state and token, and twice as many on the way back."""
    with torch.device("meta"):
        attention = [torch.empty(2, 5, 3, width, requires_grad=True) for width in (4, 4, 6, 4)]
        scan = [x.to("meta").requires_grad_() for x in scan_inputs((2, 35, 3, 4), 0, torch.float32)]
    for operator, inputs, states in ((ops.gated_linear_attention, attention, 24), (ops.selective_scan, scan, 4)):
        ops.flop_formulas()
        with FlopCounterMode(display=False) as counter:
            out = operator(*inputs)
            out = out if isinstance(out, torch.Tensor) else out[0]
            out.sum().backward()
        places = {24: 2 * 5 * 3, 4: 2 * 35 * 3}[states]
        assert counter.get_total_flops() == 3 * 2 * 3 * states * places


@pytest.mark.parametrize(
    ("place", "shape", "message"),
    [(0, (1, 5, 2, 3), "q, k and gates"), (2, (2, 5, 4), "v .N, L, H, V. expected")],
)
def test_shapes_that_do_not_fit_attention_are_named(place, shape, message):
    inputs = [torch.zeros(2, 5, 2, width) for width in (3, 3, 4, 3)]
    inputs[place] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        ops.gated_linear_attention(*inputs)


@pytest.mark.parametrize(("place", "shape"), [(1, (2, 35, 4)), (2, (4, 3)), (3, (2, 35, 5)), (7, (1,))])
def test_shapes_that_do_not_fit_the_scan_are_named(place, shape):
    inputs = scan_inputs((2, 35, 3, 4), 0, torch.float32)
    inputs[place] = torch.zeros(shape)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    with pytest.raises(ValueError, match=f"there is {names[place]} "):
        ops.selective_scan(*inputs)
