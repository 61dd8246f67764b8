import pytest
import torch

from dico_t2i.ops import reference, text_dwconv

SHAPES = [(2, 6, 12, 10, 77), (1, 16, 8, 8, 77), (3, 5, 4, 7, 81), (2, 3, 1, 1, 1), (1, 7, 16, 3, 40)]


def inputs(n, c, h, w, tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n + c + h + w)
    x = torch.randn(n, c, h, w, generator=generator, dtype=dtype)
    return x, torch.randn(n, tokens, c, generator=generator, dtype=dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference_in_value_and_gradients(shape, channels_last):
    x, context = inputs(*shape)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    context.requires_grad_()
    weight = torch.randn(x.shape, dtype=x.dtype)
    got = torch.autograd.grad((text_dwconv(x, context) * weight).sum(), (x, context))
    expected = torch.autograd.grad((reference.text_dwconv(x, context) * weight).sum(), (x, context))
    torch.testing.assert_close(text_dwconv(x, context), reference.text_dwconv(x, context), rtol=1e-12, atol=1e-12)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_finite_differences():
    x, context = inputs(1, 2, 5, 4, 77)
    assert torch.autograd.gradcheck(text_dwconv, (x.requires_grad_(), context.requires_grad_()))


@pytest.mark.parametrize(("kernel", "tokens"), [(3, 9), (5, 25), (7, 30), (9, 77), (11, 121)])
def test_other_sides_agree_with_the_reference_and_with_finite_differences(kernel, tokens):
    x, context = inputs(2, 2, 4, 5, tokens)
    x.requires_grad_()
    context.requires_grad_()
    got, expected = text_dwconv(x, context, kernel), reference.text_dwconv(x, context, kernel)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(got)
    both = [torch.autograd.grad((out * weight).sum(), (x, context)) for out in (got, expected)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: text_dwconv(a, b, kernel), (x, context), fast_mode=True)


def test_memory_format_is_kept():
    x, context = inputs(2, 8, 6, 6, 77, torch.float32)
    assert text_dwconv(x, context).is_contiguous()
    last = text_dwconv(x.to(memory_format=torch.channels_last), context)
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_the_centre_tap_is_token_40_and_the_last_tokens_repeat():
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    context = torch.zeros(1, 77, 3, dtype=torch.float64)
    context[:, 40] = 2
    torch.testing.assert_close(text_dwconv(x, context), 2 * x)
    context = torch.zeros(1, 77, 3, dtype=torch.float64)
    context[:, 76] = 1
    impulse = torch.zeros(1, 3, 12, 12, dtype=torch.float64)
    impulse[..., 6, 6] = 1
    # Token 76 is tap (8, 4) to (8, 8): output (y, x) reads input (y + 4, x .. x + 4).
    assert text_dwconv(impulse, context)[0, 0].nonzero().tolist() == [[2, x] for x in range(2, 7)]


def test_autocast_computes_in_its_dtype_and_trains():
    x, context = inputs(2, 4, 6, 6, 77, torch.float32)
    x.requires_grad_()
    context.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = text_dwconv(x, context)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert x.grad.dtype == context.grad.dtype == torch.float32


@pytest.mark.parametrize("context", [(2, 82, 4), (2, 0, 4), (1, 77, 4), (2, 77, 5)])
def test_shapes_that_do_not_fit_are_named(context):
    with pytest.raises(ValueError, match="text_dwconv: x"):
        text_dwconv(torch.zeros(2, 4, 8, 8), torch.zeros(context))


def test_kernels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="1 to 25 tokens"):
        text_dwconv(torch.zeros(2, 4, 8, 8), torch.zeros(2, 26, 4), 5)
    with pytest.raises(ValueError, match="must be odd, got 4"):
        text_dwconv(torch.zeros(2, 4, 8, 8), torch.zeros(2, 16, 4), 4)
