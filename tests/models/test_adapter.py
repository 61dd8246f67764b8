"""Low-rank adapters: what they compute, what they train, their file, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dico_t2i.config import AdapterConfig, ConfigError, DiCoConfig
from dico_t2i.models import DiCo, adapter_origin, add_adapter, merge_adapter, read_adapter, write_adapter
from dico_t2i.models.cost import count_parameters, count_trained

SMALL = {"hidden_size": 8, "depths": (1, 1, 1, 1, 1), "mlp_ratio": 2.0}
CLASSES = DiCoConfig(**SMALL, num_classes=10)
TEXT = DiCoConfig(**SMALL, condition="text", text_dim=12, pooled_text=True, pooled_dim=12)
RANK = AdapterConfig(rank=3, alpha=6)


def network(config=TEXT, adapter=None):
    """A network whose every weight is in use; with an adapter, that of the adapter too."""
    torch.manual_seed(0)
    made = DiCo(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if adapter:
            add_adapter(made, adapter)
            made.double()
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
    return made


def output(made):
    generator = torch.Generator().manual_seed(1)
    x, cond, pooled = (
        torch.randn(*shape, generator=generator).double() for shape in ((2, 4, 8, 8), (2, 81, 12), (2, 12))
    )
    return made(x, torch.tensor([3, 700]), cond, pooled)


def adapter_of(made):
    return {name: p.detach() for name, p in made.named_parameters() if ".lora_" in name}


def test_an_adapter_changes_nothing_at_first_and_is_all_that_is_trained():
    plain = network()
    before = output(plain)
    add_adapter(plain, RANK)
    plain.double()
    assert torch.equal(output(plain), before)
    trained = {name for name, p in plain.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in plain.named_parameters() if ".lora_" in name}
    layers = {name.rpartition(".lora_")[0] for name in trained}
    for kind in ("conv.expand", "conv.attention", "ffn.project", "text.projection.hidden"):
        assert f"stages.middle.0.{kind}" in layers
    assert "condition_embeddings.0" in layers
    assert not any("modulation" in layer or "time_embeddings" in layer for layer in layers)
    assert sum(p.numel() for p in plain.parameters() if p.requires_grad) == count_trained(TEXT, RANK)
    assert count_trained(TEXT, None) == count_parameters(TEXT)


def test_a_merged_adapter_gives_the_same_output():
    adapted, merged = network(adapter=RANK), network()
    before = output(merged)
    merge_adapter(dict(merged.named_parameters()), adapter_of(adapted), RANK.factor)
    assert (output(adapted) - before).abs().max() > 1e-3
    torch.testing.assert_close(output(merged), output(adapted), rtol=1e-4, atol=1e-5)
    merge_adapter(dict(merged.named_parameters()), adapter_of(adapted), -RANK.factor)
    torch.testing.assert_close(output(merged), before, rtol=1e-4, atol=1e-5)


def test_a_file_has_the_keys_of_diffusers_and_the_factor_inside(tmp_path):
    adapter, file = adapter_of(network(adapter=RANK)), tmp_path / "a.safetensors"
    write_adapter(file, {name: t.float() for name, t in adapter.items()}, RANK, {"run": "brown", "step": 7})
    held = load_file(file)
    layer = "transformer.stages.middle.0.conv.expand"
    assert held[f"{layer}.lora_A.weight"].shape == (3, 32)
    assert held[f"{layer}.lora_B.weight"].shape == (32, 3)
    torch.testing.assert_close(held[f"{layer}.lora_B.weight"], 2 * adapter[f"{layer[12:]}.lora_B.weight"].float())
    with safe_open(file, framework="pt") as opened:
        known = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (known["transformer.r"], known["transformer.lora_alpha"]) == (3, 3)
    assert layer[12:] in known["transformer.target_modules"]
    read, merged, adapted = read_adapter(file), network(), network(adapter=RANK)
    merge_adapter(dict(merged.named_parameters()), read, 1.0)
    torch.testing.assert_close(output(merged), output(adapted), rtol=1e-4, atol=1e-5)
    assert adapter_origin(file)["step"] == 7


def test_alpha_in_a_file_of_others_counts(tmp_path):
    tensors = {"transformer.x.lora_A.weight": torch.ones(2, 4), "transformer.x.lora_B.weight": torch.ones(3, 2)}
    known = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": known})
    assert read_adapter(tmp_path / "a.safetensors")["x.lora_B.weight"].eq(4).all()
    assert adapter_origin(tmp_path / "a.safetensors") == {}


def test_patterns_choose_layers_and_those_of_none_are_named():
    made = network(adapter=AdapterConfig(rank=2, targets=("*.text.*",)))
    assert {name.split(".")[3] for name in adapter_of(made)} == {"text"}
    with pytest.raises(
        ConfigError, match=r"adapter\.targets: blocks\.\* matches no linear layer; .*stages\.encoder1\.0"
    ):
        network(adapter=AdapterConfig(targets=("*.conv.*", "blocks.*")))
    assert adapter_of(network(CLASSES, AdapterConfig(rank=2)))  # which has no layers of the text


def test_an_adapter_of_another_network_changes_nothing():
    weights = dict(network(CLASSES).named_parameters())
    before = {name: p.clone() for name, p in weights.items()}
    with pytest.raises(ValueError, match=r"is of another network: \d+ of its \d+ layers do not fit, such as"):
        merge_adapter(weights, adapter_of(network(adapter=RANK)), 1.0)
    assert all(torch.equal(before[name], p) for name, p in weights.items())


@pytest.mark.parametrize("content", [None, b"no", {"x": 1}, {}])
def test_what_is_no_adapter_is_refused(tmp_path, content):
    file = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        save_file({key: torch.ones(1) for key in content}, file)
    with pytest.raises(ValueError, match=r"a\.safetensors: (there is no such file|it is not an? )"):
        read_adapter(file)
