"""The operators against plain references in float64, each implementation against that, and torch's view of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dico_t2i import ops
from dico_t2i.models.blocks import Block, TextConvolution, TextProjection
from dico_t2i.ops import backend, linear, native, plain, reference
from tests.ops.cases import errors, text_errors

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(2, 5, 7, 24), (1, 8, 8, 33), (3, 9, 12, 3), (1, 1, 1, 416), (2, 32, 9, 8)]
LIMITS = {torch.float32: 5e-6, torch.bfloat16: 6e-2}
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler")


def made(kind, shape=(2, 5, 6, 7), dtype=torch.float64):
    """Leaves for an operator.

    Maps "x" to (N, H, W, C), "v" to (N, C), "w" and "b" to a convolution's, "m" and "d" to a linear layer's, "t" to
    tokens (N, 5, C).
    """
    N, _, _, C = shape
    sizes = {"x": shape, "y": shape, "v": (N, C), "w": (C, 1, 3, 3), "b": (C,), "m": (4, C), "d": (4,), "t": (N, 5, C)}
    generator = torch.Generator().manual_seed(len(kind))
    return [torch.randn(sizes[k], generator=generator, dtype=dtype).requires_grad_() for k in kind]


CASES = [
    ("norm_modulate", "x"),
    ("norm_modulate", "xvv"),
    ("residual_norm_modulate", "xy"),
    ("residual_norm_modulate", "xyv"),
    ("residual_norm_modulate", "xyvvv"),
    ("channel_scale", "xv"),
    ("gated_residual", "xvy"),
    ("depthwise3x3_gelu_pool", "xwb"),
]
WHOLE = [
    ("channel_gate", "xv"),
    ("norm_linear", "xmd"),
    ("norm_linear", "xmdvv"),
    ("norm_linear", "xmdvvy"),
    ("norm_linear", "xmdvvyv"),
    ("gelu_linear", "xmd"),
    ("gate_linear", "xvmd"),
    ("norm_text_dwconv", "xyvt"),
]


@pytest.mark.parametrize(("name", "kind"), CASES + WHOLE)
def test_values_and_gradients_are_the_references(name, kind):
    inputs = made(kind)
    both = []
    for module in (ops, reference):
        out = getattr(module, name)(*inputs, *([3] if "t" in kind else []))
        out = (out,) if isinstance(out, torch.Tensor) else out
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype) for o in out]
        loss = sum((o * w).sum() for o, w in zip(out, weights, strict=True))
        both.append((*out, *torch.autograd.grad(loss, inputs)))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "kind"), [("gelu_linear", "xmd"), ("gate_linear", "xvmd")])
def test_values_and_gradients_inside_products(monkeypatch, name, kind):
    """Where a GPU in bf16 takes them: the rules of the gradients, and torch in place of the kernels."""
    monkeypatch.setattr(linear, "_fused", lambda *_: True)
    monkeypatch.setattr(linear, "PIXELS", 1)
    test_values_and_gradients_are_the_references(name, kind)


def test_a_layer_gives_gelu_as_well(monkeypatch):
    """For the next layer, with the gradients of one after the other."""
    x, weight, bias = made("xmd")
    loss = []
    for inside in (False, True):
        monkeypatch.setattr(linear, "_fused", lambda *_, inside=inside: inside)
        _, hidden, activated = ops.norm_linear_gelu(x, weight, bias)
        loss.append(ops.gelu_linear(hidden, weight.T, x[0, 0, 0], None, activated).sin().sum())
    normed = reference.norm_linear(x, weight, bias)[1]
    loss.append(reference.gelu_linear(normed, weight.T, x[0, 0, 0]).sin().sum())
    gradients = [torch.autograd.grad(each, (x, weight, bias)) for each in loss]
    for found in gradients[:2]:
        for a, b in zip(found, gradients[2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


LATE = {
    "residual_norm_modulate": lambda x, y, b, v: ops.residual_norm_modulate(x, y, v, v, v, b)[1],
    "norm_linear": lambda x, y, b, v: ops.norm_linear(x, torch.eye(7).to(v), v[0], v, v, y, v, b)[1],
    "norm_text_dwconv": lambda x, y, b, v: ops.norm_text_dwconv(x, y, v, v[:, None], 3, b),
    "gated_residual": lambda x, y, b, v: ops.gated_residual(x, v, y, b),
    "depthwise3x3_gelu_pool": lambda x, y, b, v: ops.depthwise3x3_gelu_pool(y, torch.ones(7, 1, 3, 3).to(v), v[0], b)[
        0
    ],
    "gelu_linear": lambda x, y, b, v: ops.gelu_linear(y, torch.eye(7).to(v), v[0], b),
}


@pytest.mark.parametrize("name", LATE)
def test_a_bias_of_the_input_gets_its_gradient(name):
    """With and without the operator's help."""
    x, y, v, b = made("xyvb")
    by_operator = LATE[name](x, y + b.detach(), b, v).sin().sum()
    by_torch = LATE[name](x, y + b, None, v).sin().sum()
    assert torch.equal(by_operator, by_torch)
    for a, b in zip(
        *(torch.autograd.grad(loss, (x, y, v, b), allow_unused=True) for loss in (by_operator, by_torch)), strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_torch_can_trace_them(name, kind):
    """Shapes, strides and gradients as declared: what torch.compile and the meta device rely on."""
    inputs = made(kind, dtype=torch.float32)
    operator, arguments = {
        "norm_modulate": (torch.ops.dico_t2i.norm_modulate, (*inputs, None, None)[:3]),
        "residual_norm_modulate": (torch.ops.dico_t2i.residual_norm_modulate, (*inputs, None, None, None, None)[:6]),
        "channel_scale": (torch.ops.dico_t2i.scale, (*inputs, None, None)[:4]),
        "gated_residual": (torch.ops.dico_t2i.scale, (inputs[-1], *inputs[1:-1], inputs[0], None)),
        "depthwise3x3_gelu_pool": (torch.ops.dico_t2i.depthwise, (*inputs, None)),
    }[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("module", [plain, pytest.param(native, marks=needs_compiler)], ids=["torch", "c"])
def test_every_implementation_is_that_of_float64(module, shape, dtype):
    found = errors(module, shape, dtype, tokens=(77, 81, 1))
    assert max(found.values()) < LIMITS[dtype], found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "tokens"), [(5, (25, 7)), (7, (49,)), (11, (121, 77)), (3, (9,)), (13, (100,))])
@pytest.mark.parametrize("module", [plain, pytest.param(native, marks=needs_compiler)], ids=["torch", "c"])
def test_text_kernels_of_other_sides(module, kernel, tokens, dtype):
    for shape in ((2, 5, 7, 24), (1, 13, 12, 3)):
        found = text_errors(module, shape, dtype, tokens, kernel)
        assert max(found.values()) < LIMITS[dtype], found


def test_triton_kernels_through_the_interpreter(long):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.ops.cases", "dico_t2i.ops.kernels", *(["--long"] if long else [])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.partition("RESULT")[2])
    for kind, errors_of in found.items():
        assert max(errors_of.values()) < (2e-2 if kind == "bfloat16" else 5e-6), (kind, errors_of)


@needs_compiler
def test_results_do_not_depend_on_threads():
    torch.manual_seed(0)
    x, grad, context, vector = (torch.randn(s) for s in ((2, 16, 16, 40), (2, 16, 16, 40), (2, 77, 40), (2, 40)))
    weight, bias = torch.randn(40, 1, 3, 3), torch.randn(40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            _, _, mean, rstd = native.norm_forward(x, None, None, vector, vector)
            results.append(
                (
                    *native.norm_backward(x, mean, rstd, vector, vector, grad, vector, None, grad, True),
                    *native.gelu_backward(x, grad),
                    *native.depthwise_backward(x, weight, bias, grad, vector),
                    *native.scale_backward(x, vector, grad),
                    *native.text_backward(x, context, grad, 9, (True, True)),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiler
def test_gelu_is_exact_in_the_tails():
    """On a grid, of a convolution that does nothing; torch's own GELU errs by 4e-7 at most."""
    x = torch.linspace(-14, 14, 8 * 40 * 8).reshape(1, 8, 40, 8)
    weight = torch.zeros(8, 1, 3, 3)
    weight[:, 0, 1, 1] = 1
    got, _ = native.depthwise_forward(x, weight, torch.zeros(8))
    expected = torch.nn.functional.gelu(x.double())
    assert (got - expected).abs().max() < 6e-7
    assert ((got - expected) / expected)[(x > -5) & (x != 0)].abs().max() < 2e-6


@pytest.mark.parametrize("compiler", ["/bin/false", ""])
def test_without_a_compiler_torch_takes_over(monkeypatch, caplog, tmp_path, compiler):
    """It is said once; nothing is left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.setenv("DICO_NO_COMPILER", "1")
    native.library.cache_clear()
    try:
        x = torch.randn(1, 4, 4, 8)
        for _ in range(2):
            torch.testing.assert_close(ops.norm_modulate(x), reference.norm_modulate(x))
        assert native.library() is None
    finally:
        native.library.cache_clear()
    assert len(caplog.records) == (1 if compiler else 0)
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), OSError("no space left")])
def test_where_triton_cannot_start_kernels_torch_takes_over(monkeypatch, caplog, error):
    def fail(name):
        raise error

    monkeypatch.setattr(backend, "find_spec", lambda name: object())
    monkeypatch.setattr(backend, "import_module", fail)
    backend.find_triton.cache_clear()
    try:
        assert [backend.find_triton() for _ in range(2)] == [False, False]
    finally:
        backend.find_triton.cache_clear()
    (record,) = caplog.records
    assert str(error) in record.getMessage()


def block_and_inputs():
    torch.manual_seed(0)
    block = Block(12, 2.0, TextConvolution(TextProjection(6, 12)))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block, (torch.randn(2, 8, 8, 12, requires_grad=True), torch.randn(2, 12), torch.randn(2, 77, 6))


def gradients(block, run, inputs):
    loss = run(*inputs).square().mean()
    return torch.autograd.grad(loss, (inputs[0], *block.parameters()))


def test_a_block_compiles_as_one_graph_and_can_be_recomputed():
    block, inputs = block_and_inputs()
    expected = gradients(block, block, inputs)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    recomputed = gradients(block, lambda *a: checkpoint(block, *a, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, expected, strict=True))
    for a, b in zip(gradients(block, compiled, inputs), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_block_keeps_what_it_must():
    """The text branch has no gate: it need not be kept. The FFN's hidden layer is twice as wide.

    Norms, the outputs of GELU, and sums with a gate are computed again.
    """
    names = ["x", "expanded", "scaled", "branch", "residual", "ffn", "hidden", "hidden"]
    block, inputs = block_and_inputs()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(*inputs)
    assert out.requires_grad  # what was kept is there until here
    pixels = 2 * 8 * 8
    channels = sum(t.shape[-1] for t in kept.values() if t.numel() == pixels * t.shape[-1])
    assert channels == 12 * len(names)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, v: ops.norm_modulate(x, v),
        lambda x, v: ops.norm_modulate(x, v[:, :3], v[:, :3]),
        lambda x, v: ops.residual_norm_modulate(x, x[:, :2]),
        lambda x, v: ops.channel_scale(x, v[:1]),
        lambda x, v: ops.gated_residual(x, v, x[..., :3]),
        lambda x, v: ops.depthwise3x3_gelu_pool(x, torch.zeros(4, 1, 3, 3), torch.zeros(3)),
    ],
)
def test_shapes_that_do_not_fit_are_named(wrong):
    with pytest.raises(ValueError, match="expected"):
        wrong(torch.zeros(2, 4, 4, 4), torch.zeros(2, 4))
