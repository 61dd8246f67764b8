"""Peers: sizes and work as published, functions against independent ones, training under the same interface."""

import pytest
import torch
import torch.nn.functional as F

from dico_t2i.config import DIT_VARIANTS, UVIT_VARIANTS, DiTConfig, MMDiTConfig, PixArtConfig, UViTConfig
from dico_t2i.config.networks import DiGConfig, DiMConfig, DiSConfig
from dico_t2i.models import build_network, count_macs, count_parameters
from dico_t2i.models.peers.dit_release import infer_dit_config, load_released_dit
from dico_t2i.plan.trace import trace_training

TINY = {"hidden_size": 16, "depth": 3, "num_heads": 2}
TEXT = {**TINY, "text_dim": 12, "text_tokens": 5, "latent_size": 8}
CLASSES = DiTConfig(**TINY, num_classes=7)
PEERS = {
    "dit": CLASSES,
    "uvit": UViTConfig(**TEXT),
    "uvit of classes": UViTConfig(**TINY, condition="class", num_classes=7, latent_size=8),
    "pixart": PixArtConfig(**TEXT),
    "mmdit": MMDiTConfig(**TEXT, pooled_dim=10),
    "dig": DiGConfig(**{**TINY, "depth": 8}, skips="xavier", num_classes=7, latent_size=8),
    "dis": DiSConfig(hidden_size=16, depth=2, num_classes=7, latent_size=8),
    "dim": DiMConfig(hidden_size=16, depth=5, num_classes=7, latent_size=8),
}


def inputs(config, height=8, width=8, batch=2):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    cond = torch.tensor([3, 7])[:batch] if config.condition == "class" else draw(batch, 5, 12)
    extra = {"pooled": draw(batch, config.pooled_dim)} if config.pooled_text else {}
    return draw(batch, 4, height, width), torch.tensor([3.0, 800.5])[:batch], cond, extra


def randomized(config, scale=0.1):
    torch.manual_seed(0)
    network = build_network(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return network


def released_state(config, side):
    """Random weights under the names of the released DiT, and its positions for ``side`` x ``side`` patches."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    D, patch, channels = config.hidden_size, config.patch_size, config.in_channels
    out, hidden = patch * patch * config.out_channels, int(config.mlp_ratio * D)
    linears = {
        "t_embedder.mlp.0": (D, 256),
        "t_embedder.mlp.2": (D, D),
        "final_layer.linear": (out, D),
        "final_layer.adaLN_modulation.1": (2 * D, D),
    }
    for n in range(config.depth):
        linears |= {f"blocks.{n}.attn.qkv": (3 * D, D), f"blocks.{n}.attn.proj": (D, D)}
        linears |= {f"blocks.{n}.mlp.fc1": (hidden, D), f"blocks.{n}.mlp.fc2": (D, hidden)}
        linears[f"blocks.{n}.adaLN_modulation.1"] = (6 * D, D)
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    state = {f"{name}.weight": draw(*shape) for name, shape in linears.items()}
    state |= {f"{name}.bias": 0.1 * draw(shape[0]) for name, shape in linears.items()}
    state["x_embedder.proj.weight"], state["x_embedder.proj.bias"] = draw(D, channels, patch, patch), draw(D)
    state["y_embedder.embedding_table.weight"] = draw(config.num_classes + 1, D)
    positions = get_2d_sincos_pos_embed(D, side, base_size=side, output_type="pt")
    return {**state, "pos_embed": positions.float()[None]}


def as_diffusers(state, config, size):
    """diffusers' DiT with released weights, as its conversion maps them, without its three differences."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.depth,
        sample_size=size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=1e-6,
    )
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_2": "final_layer.linear"}
    names["proj_out_1"] = "final_layer.adaLN_modulation.1"
    for n in range(config.depth):
        ours, theirs = f"blocks.{n}", f"transformer_blocks.{n}"
        names |= {f"{theirs}.attn1.to_{c}": f"{ours}.{c}" for c in "qkv"}
        names |= {
            f"{theirs}.attn1.to_out.0": f"{ours}.attn.proj",
            f"{theirs}.norm1.linear": f"{ours}.adaLN_modulation.1",
        }
        names |= {f"{theirs}.ff.net.0.proj": f"{ours}.mlp.fc1", f"{theirs}.ff.net.2": f"{ours}.mlp.fc2"}
        embedder = f"{theirs}.norm1.emb.timestep_embedder.linear"
        names |= {f"{embedder}_1": "t_embedder.mlp.0", f"{embedder}_2": "t_embedder.mlp.2"}
        for leaf in ("weight", "bias"):
            parts = state[f"{ours}.attn.qkv.{leaf}"].chunk(3)
            state = {**state, **{f"{ours}.{c}.{leaf}": part for c, part in zip("qkv", parts, strict=True)}}
    converted = {f"{a}.{leaf}": state[f"{b}.{leaf}"] for a, b in names.items() for leaf in ("weight", "bias")}
    for n in range(config.depth):
        table = f"transformer_blocks.{n}.norm1.emb.class_embedder.embedding_table.weight"
        converted[table] = state["y_embedder.embedding_table.weight"]
    model.load_state_dict(converted)
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.double().eval()


@pytest.mark.parametrize(
    ("name", "millions", "gmacs"),
    [("DiT-S/2", 33.0, 6.06), ("DiT-B/2", 130.5, 23.02), ("DiT-L/2", 458.1, 80.73), ("DiT-XL/2", 675.129632, 118.66)],
)
def test_dit_has_its_published_size_and_work(name, millions, gmacs):
    """The release counts its table of fixed positions, 256 of them, among the parameters."""
    config = DiTConfig(variant=name)
    D, positions = config.hidden_size, 256 * config.hidden_size
    block, time, head = 18 * D**2 + 15 * D, 256 * D + D**2 + 2 * D, 2 * D**2 + 2 * D + 32 * D + 32
    parameters = count_parameters(config)
    assert parameters == config.depth * block + time + head + 1001 * D + 17 * D
    assert abs((parameters + positions) / 1e6 - millions) < (1e-6 if name == "DiT-XL/2" else 0.05)
    assert abs(count_macs(config, (1, 4, 32, 32)) / 1e9 / gmacs - 1) < 0.01


@pytest.mark.parametrize(("name", "millions"), [("U-ViT-S/2", 45), ("U-ViT-S/2 deep", 58)])
def test_uvit_has_its_published_size(name, millions):
    assert abs(count_parameters(UViTConfig(variant=name, learn_sigma=False)) / 1e6 - millions) < 0.5


def test_pixart_has_its_published_size():
    """0.6 billion, with T5's features of width 4096."""
    assert round(count_parameters(PixArtConfig(variant="PixArt-XL/2", text_dim=4096)) / 1e9, 1) == 0.6


def test_released_dit_weights_give_what_diffusers_gives():
    state = released_state(CLASSES, side=4)
    model = build_network(CLASSES)
    assert load_released_dit(model, state) == 8
    x, _, labels, _ = inputs(CLASSES)
    t = torch.tensor([3, 40])  # diffusers has its sinusoids in float32, whose rounding grows with t
    ours = model.double()(x.double(), t, labels)
    theirs = as_diffusers(state, CLASSES, 8)(x.double(), timestep=t, class_labels=labels).sample
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_what_is_no_released_dit_is_named():
    state = released_state(CLASSES, side=4)
    model = build_network(CLASSES)
    with pytest.raises(ValueError, match=r"DiT \(1 differences\): missing blocks\.0\.attn\.proj\.bias"):
        load_released_dit(model, {k: v for k, v in state.items() if k != "blocks.0.attn.proj.bias"})
    with pytest.raises(ValueError, match=r"pos_embed: .* does not hold the fixed positions"):
        load_released_dit(model, {**state, "pos_embed": state["pos_embed"].flip(1)})
    with pytest.raises(ValueError, match="a DiT of width 16 with 3 blocks is none of DiT-S/2"):
        infer_dit_config(state)
    with pytest.raises(ValueError, match="patches, label table or head"):
        infer_dit_config({"pos_embed": state["pos_embed"]})


def plain_uvit(w, x, t, text, heads):
    """U-ViT of five blocks written out, from the weights ``w`` of ours by name; (N, C, H, W), patches of 2."""
    D, N, C, H, W = w["norm.weight"].shape[0], *x.shape

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attention(name, x):
        q, k, v = (part.reshape(N, -1, heads, D // heads) for part in linear(f"{name}.qkv", x).chunk(3, -1))
        scores = torch.einsum("nihd,njhd->nhij", q, k) / (D // heads) ** 0.5
        return linear(f"{name}.project", torch.einsum("nhij,njhd->nihd", scores.softmax(-1), v).flatten(2))

    def block(n, x):
        x = x + attention(f"layers.{n}.attention", norm(f"layers.{n}.norm1", x))
        hidden = linear(f"layers.{n}.ffn.expand", norm(f"layers.{n}.norm2", x))
        return x + linear(f"layers.{n}.ffn.project", hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)

    patches = x.reshape(N, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(N, -1, 4 * C)
    tokens = patches @ w["patches.weight"].reshape(D, -1).T + w["patches.bias"]
    angles = t[:, None] * 10000 ** (-torch.arange(D // 2, dtype=t.dtype) / (D // 2))
    time = torch.cat((angles.cos(), angles.sin()), 1)[:, None]
    x = torch.cat((time, linear("text", text), tokens), 1) + w["positions"]
    x = first = block(0, x)
    x = second = block(1, x)
    x = block(2, x)
    x = block(3, linear("layers.3.merge", torch.cat((x, second), -1)))
    x = block(4, linear("layers.4.merge", torch.cat((x, first), -1)))
    pixels = linear("head", norm("norm", x))[:, 1 + text.shape[1] :].reshape(N, H // 2, W // 2, 2, 2, -1)
    image = pixels.permute(0, 5, 1, 3, 2, 4).reshape(N, -1, H, W)
    return F.conv2d(image, w["smooth.weight"], w["smooth.bias"], padding=1)


def test_uvit_against_the_same_written_out():
    config = UViTConfig(**{**TEXT, "depth": 5})
    network = randomized(config).double()
    x, t, text, _ = inputs(config)
    x, t, text = x.double(), t.double(), text.double()
    expected = plain_uvit(network.state_dict(), x, t, text, config.num_heads)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(network(x, t, text), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["dit", "pixart", "mmdit", "dig"])
def test_a_fresh_peer_says_zero(kind):
    x, t, cond, extra = inputs(PEERS[kind])
    assert not build_network(PEERS[kind])(x, t, cond, **extra).any()


def test_text_has_no_effect_on_a_fresh_pixart():
    network = build_network(PEERS["pixart"])
    torch.nn.init.normal_(network.transformer.proj_out.weight)
    x, t, text, _ = inputs(PEERS["pixart"])
    assert network(x, t, text).any()
    assert torch.equal(network(x, t, text), network(x, t, 5 * text + 1))


@pytest.mark.parametrize("masked", [False, True])
def test_pixart_leaves_padding_out(masked):
    network = randomized(PixArtConfig(**{**TEXT, "text_tokens": 9}, text_mask=masked))
    x, t, text, _ = inputs(PEERS["pixart"])
    padded = torch.cat((text, torch.zeros(2, 4, 12)), 1)
    assert torch.allclose(network(x, t, padded), network(x, t, text), atol=1e-5) == masked


@pytest.mark.parametrize("kind", PEERS)
def test_conditions_are_obeyed_and_everything_is_trained(kind):
    network = randomized(PEERS[kind])
    x, t, cond, extra = inputs(PEERS[kind])
    out = network(x, t, cond, **extra)
    assert out.shape == (2, 4 if kind == "dim" else 8, 8, 8)
    assert not torch.allclose(out, network(x, t, cond.flip(0), **extra), atol=1e-4)
    assert not torch.allclose(out, network(x, t.flip(0), cond, **extra), atol=1e-4)
    if extra:
        assert not torch.allclose(out, network(x, t, cond, pooled=3 * extra["pooled"]), atol=1e-4)
        with pytest.raises(ValueError, match="pooled"):
            network(x, t, cond)
    out.square().mean().backward()
    untouched = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9]
    # softmax does not see a constant added to all keys; the last block's text queries lead nowhere in MMDiT
    expected = ("to_k.bias", "transformer_blocks.2.attn.add_q_proj.weight", "transformer_blocks.2.attn.add_q_proj.bias")
    assert [name for name in untouched if not name.endswith(expected)] == []


@pytest.mark.parametrize("kind", ["dit", "pixart", "mmdit", "dig", "dim"])
def test_oblong_images(kind):
    x, t, cond, extra = inputs(PEERS[kind], height=4, width=12)
    assert randomized(PEERS[kind])(x, t, cond, **extra).shape == (2, 4 if kind == "dim" else 8, 4, 12)


@pytest.mark.parametrize("kind", PEERS)
def test_recomputing_gives_the_same_gradients_and_keeps_less(kind):
    config = PEERS[kind]
    recomputing = config.model_copy(update={"checkpoint_stages": ("blocks",)})
    x, t, cond, extra = inputs(config)
    gradients, kept = [], []
    for each in (config, recomputing):
        network = randomized(each).train()
        network(x, t, cond, **extra).square().mean().backward()
        gradients.append([p.grad for p in network.parameters()])
        network.to("meta")
        on_meta = [v.to("meta") for v in (x, t, cond)]
        pooled = {name: v.to("meta") for name, v in extra.items()}
        with torch.device("meta"):
            traced = trace_training(network, lambda n=network, m=on_meta, p=pooled: n(*m, **p).square().mean())
        kept.append(traced.activations)
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("kind", PEERS)
def test_a_traced_pass_is_counted_as_macs_are(kind):
    """Attention included: DiT's published figures are met with it, and 3.5 % below without."""
    config = PEERS[kind]
    with torch.device("meta"):
        network = build_network(config).train()
        x, t, cond, extra = (v.to("meta") if isinstance(v, torch.Tensor) else v for v in inputs(config))
        pooled = {name: v.to("meta") for name, v in extra.items()}
        traced = trace_training(network, lambda: network(x, t, cond, **pooled).square().mean())
    work = traced.products + traced.others
    assert work[: traced.forward].sum() == 2 * count_macs(config, (2, 4, 8, 8))
    assert 2.9 < work.sum() / work[: traced.forward].sum() < 3.2


def test_every_named_size_builds():
    for section, names in ((DiTConfig, DIT_VARIANTS), (UViTConfig, UVIT_VARIANTS)):
        assert all(count_parameters(section(variant=name)) > 3e7 for name in names)
