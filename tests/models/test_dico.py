import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dico_t2i.models import STAGES, DiCo, DiCoConfig, count_macs, count_parameters

SMALL = {"hidden_size": 8, "depths": (1, 1, 1, 1, 1), "mlp_ratio": 2.0}
TEXT = {**SMALL, "condition": "text", "text_dim": 12, "pooled_dim": 10}


def randomized(config):
    torch.manual_seed(0)
    model = DiCo(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def text_inputs(batch=2):
    generator = torch.Generator().manual_seed(1)
    x, tokens = torch.randn(batch, 4, 8, 12, generator=generator), torch.randn(batch, 77, 12, generator=generator)
    return x, torch.tensor([3, 800])[:batch], tokens, torch.randn(batch, 10, generator=generator)


@pytest.mark.parametrize("fusion", ["dwc", "cross_attention"])
def test_a_fresh_model_says_zero_and_its_text_has_no_effect(fusion):
    model = DiCo(DiCoConfig(**TEXT, text_fusion=fusion))
    x, t, tokens, _ = text_inputs()
    assert not model(x, t, tokens).any()
    torch.nn.init.normal_(model.head.out.weight)
    for module in model.modules():
        if hasattr(module, "modulation"):
            torch.nn.init.normal_(module.modulation.weight, std=0.1)
    assert torch.equal(model(x, t, tokens), model(x, t, 5 * tokens + 1))
    assert model(x, t, tokens).any()


@pytest.mark.parametrize("options", [{}, {"text_projection": "stage"}, {"text_fusion": "cross_attention"}])
@pytest.mark.parametrize("pooled", [False, True])
def test_text_is_obeyed_and_everything_is_trained(options, pooled):
    model = randomized(DiCoConfig(**TEXT, pooled_text=pooled, **options))
    x, t, tokens, pooled_text = text_inputs()
    extra = {"pooled": pooled_text} if pooled else {}
    out = model(x, t, tokens, **extra)
    assert out.shape == (2, 8, 8, 12)
    assert not torch.allclose(out, model(x, t, tokens.flip(1), **extra))
    out.square().mean().backward()
    untouched = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # softmax does not see a constant added to all keys
    assert [n for n in untouched if not n.endswith("key_value.bias")] == []


def test_pooled_text_is_asked_for():
    model = DiCo(DiCoConfig(**TEXT, pooled_text=True))
    x, t, tokens, _ = text_inputs()
    with pytest.raises(ValueError, match="pooled"):
        model(x, t, tokens)


def test_recomputed_stages_give_the_same_gradients():
    plain = randomized(DiCoConfig(**TEXT)).train()
    recomputed = randomized(DiCoConfig(**TEXT, checkpoint_stages=STAGES)).train()
    x, t, tokens, _ = text_inputs()
    for model in (plain, recomputed):
        model(x, t, tokens).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_a_sample_does_not_depend_on_its_batch():
    model = randomized(DiCoConfig(**TEXT)).double()
    x, t, tokens, _ = text_inputs()
    x, tokens = x.double(), tokens.double()
    torch.testing.assert_close(model(x, t, tokens)[1:], model(x[1:], t[1:], tokens[1:]), rtol=1e-10, atol=1e-12)


def test_no_copy_turns_the_layout_inside_a_block():
    """Pointwise, norm and gates work on (N, H, W, C) as it lies in memory."""
    model = randomized(DiCoConfig(**SMALL, num_classes=3))
    block = model.stages["encoder1"][0]
    copies = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func._schema.name in ("aten::clone", "aten::copy_", "aten::contiguous"):
                copies.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        out = block(torch.randn(2, 8, 8, 8), torch.randn(2, 8))
    assert out.is_contiguous()
    assert copies == []


def test_counting_needs_no_memory_and_knows_the_text():
    config = DiCoConfig(variant="DiCo-XL", condition="text")
    per_block = DiCoConfig(variant="DiCo-XL")
    added = (count_parameters(config) - count_parameters(per_block)) / 1e6
    # 80.9M of projections, less the three label tables (1001 x 7 x 416)
    assert abs(added - (80.9 - 1001 * 7 * 416 / 1e6)) < 0.1
    text_macs = count_macs(config, (1, 4, 32, 32)) - count_macs(per_block, (1, 4, 32, 32))
    assert abs(text_macs / 1e9 - (6.2 + 1.33)) < 0.1  # projections and the convolutions themselves


@pytest.mark.parametrize("size", [(4, 4), (8, 20), (12, 4)])
def test_any_size_divisible_by_four(size):
    model = randomized(DiCoConfig(**SMALL, num_classes=3))
    assert model(torch.randn(1, 4, *size), torch.tensor([1]), torch.tensor([0])).shape == (1, 8, *size)
