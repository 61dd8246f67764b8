"""Channel scores and attention locality: against closed forms, loops and other libraries' own probabilities."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from data_prep import shapes
from dico_t2i.config import parse_config
from dico_t2i.export.folder import write_folder
from dico_t2i.models import DiCo
from evals import attention_locality, channel_activation
from evals.analysis.backbones import KINDS, Flux, load_backbone
from evals.analysis.channels import ChannelStatistics, diversity, last_mixer, watch
from evals.analysis.locality import RelativeMap, locality, uniform_shares
from evals.analysis.recording import attention_probabilities, recording

# --- channels


def test_statistics_are_those_of_numpy():
    features = np.random.default_rng(0).normal(size=(6, 5, 4, 7)) * np.arange(1, 8) - 0.5
    statistics = ChannelStatistics()
    for part in np.split(features, 3):
        statistics.add(torch.from_numpy(part))
    rows = features.reshape(-1, 7)
    pooled = np.maximum(features, 0).mean(axis=(1, 2)).mean(axis=0)
    np.testing.assert_allclose(statistics.scores(), pooled, rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance(), np.cov(rows.T, bias=True), rtol=1e-10)
    found = statistics.report()
    np.testing.assert_allclose(found.scores, sorted(pooled, reverse=True), rtol=1e-12)
    singular = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
    shares = singular / singular.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()) / 7, rel=1e-9)
    others = np.abs(np.corrcoef(rows.T))[~np.eye(7, dtype=bool)]
    assert found.correlation == pytest.approx(others.mean(), rel=1e-9)


def test_known_diversity():
    alike = diversity(torch.ones(8), torch.eye(8))
    assert (alike.alive, alike.participation, alike.correlation) == (1, 1, 0)
    assert alike.effective_rank == pytest.approx(1)
    scores = torch.zeros(8)
    scores[3] = 2.0
    signs = torch.tensor([1.0, -1, 1, 1, -1, 1, 1, 1])
    one = diversity(scores, torch.outer(signs, signs))  # all channels are one, up to its sign
    assert (one.alive, one.participation) == (1 / 8, 1 / 8)
    assert one.effective_rank == pytest.approx(1 / 8, rel=1e-3)
    assert one.correlation == pytest.approx(1)
    dead = diversity(torch.zeros(4), torch.zeros(4, 4))
    assert (dead.alive, dead.participation, dead.correlation) == (0, 0, 0)


TREE = {
    "name": "small",
    "model": {"hidden_size": 8, "depths": [1, 1, 1, 1, 2], "mlp_ratio": 2, "in_channels": 3, "num_classes": 6},
    "autoencoder": {"kind": "pixels"},
    "data": {"image_size": 16, "streams": 4},
    "train": {"duration": {"steps": 1}, "global_batch": 4},
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Shapes, and two exported text networks with random weights, of which one has half of its last channels dead."""
    folder = tmp_path_factory.mktemp("analysis")
    shapes.main(["--out", str(folder / "shapes"), "--samples", "16", "--size", "16"])
    text = {"condition": "text", "text_dim": 16}
    tree = {
        **TREE,
        "model": {**TREE["model"], **text},
        "text_encoder": {"weights": "seeded", "seeded": {"width": 16, "layers": 1, "heads": 2}},
        "data": {**TREE["data"], "path": str(folder / "shapes")},
    }
    for name in ("whole", "half"):
        config = parse_config({**tree, "name": name}, "test")
        torch.manual_seed(0)
        network = DiCo(config.model)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        project = network.stages["decoder1"][-1].conv.project
        if name == "half":
            project.weight.data[:8] = 0
            project.bias.data[:8] = -1
        state = {key: value.detach() for key, value in network.named_parameters()}
        shapes_of = {key: value.shape for key, value in state.items()}
        write_folder(
            folder / name, config, shapes_of, (v.numpy() for v in state.values()), {"weights": "random"}, {}, False
        )
    return folder / "shapes", folder / "whole", folder / "half"


def test_dead_channels_are_found(exports, tmp_path, capsys):
    _, whole, half = exports
    options = ["--out", str(tmp_path), "--samples", "8", "--batch", "4", "--timesteps", "20", "900"]
    assert channel_activation.main(["--checkpoint", str(whole), str(half), *options]) == 0
    found = json.loads((tmp_path / "channels.json").read_text())["checkpoints"]
    assert found.keys() == {"whole", "half"}
    assert (tmp_path / "channels.png").read_bytes().startswith(b"\x89PNG")
    for timestep in ("20", "900"):
        ours, theirs = (found[name]["timesteps"][timestep] for name in ("whole", "half"))
        assert found["whole"]["module"] == "stages.decoder1.1.conv"
        assert len(ours["scores"]) == 16
        assert theirs["alive"] <= 0.5 < ours["alive"]
        assert theirs["scores"][8:] == [0] * 8
        assert theirs["participation"] < ours["participation"]
        assert theirs["effective_rank"] < ours["effective_rank"]
    assert found["whole"]["timesteps"]["20"]["scores"] != found["whole"]["timesteps"]["900"]["scores"]
    assert "stages.decoder1.1.conv" in capsys.readouterr().out


def test_scores_are_those_of_the_networks_own_forward_pass(exports, tmp_path):
    from dico_t2i.sampling.pipeline import load_pipeline
    from evals.analysis.samples import chunks, run_network

    data, whole, _ = exports
    pipeline = load_pipeline(whole, None, torch.device("cpu"), torch.float32)
    seen = []
    module = pipeline.model.get_submodule(last_mixer(pipeline.model))
    module.register_forward_hook(lambda m, i, output: seen.append(output.branch))
    for chunk in chunks(pipeline, str(data), 8, 8):
        assert chunk.latents.shape == (8, 3, 16, 16)
        run_network(pipeline, chunk, 500)
    expected = seen[0].relu().mean(dim=(0, 1, 2)).sort(descending=True).values
    options = ["--out", str(tmp_path), "--samples", "8", "--timesteps", "500", "--data", str(data)]
    channel_activation.main(["--checkpoint", str(whole), *options])
    found = json.loads((tmp_path / "channels.json").read_text())["checkpoints"]["whole"]["timesteps"]["500"]
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--module", "stages.none"], "--module stages.none"),
        (["--timesteps", "1000"], "--timesteps 1000: must lie in 0..999"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_told(exports, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        channel_activation.main(["--checkpoint", str(exports[1]), "--out", str(tmp_path), *options])


def test_names_tell_checkpoints_apart(tmp_path):
    names = channel_activation.names_of([tmp_path / "a" / "x", tmp_path / "b" / "x"])
    assert names == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="given twice"):
        channel_activation.names_of([tmp_path, tmp_path])


# --- locality


def positions(h, w):
    return np.array([(y, x) for y in range(h) for x in range(w)])


def by_loops(attention, h, w):
    """Distance, and window shares, of one head's (h w, h w) attention, as they are defined."""
    p = positions(h, w)
    distance = np.linalg.norm(p[:, None] - p[None], axis=-1)
    chebyshev = np.abs(p[:, None] - p[None]).max(-1)
    shares = [np.where(chebyshev <= r, attention, 0).sum(1).mean() for r in (1, 2)]
    return (attention * distance).sum(1).mean(), *shares


def test_random_attention_against_loops():
    rng = np.random.default_rng(0)
    h, w = 4, 6
    heads = rng.dirichlet(np.ones(h * w), size=(3, h * w))
    seen = RelativeMap((h, w))
    seen.add(torch.from_numpy(head) for head in heads[:2])
    seen.add(torch.from_numpy(head) for head in heads[2:])
    found = seen.locality()
    expected = np.mean([by_loops(head, h, w) for head in heads], axis=0)
    np.testing.assert_allclose((found.distance, found.window[3], found.window[5]), expected, rtol=1e-12)
    assert float(seen.shares.sum()) == pytest.approx(1, abs=1e-12)
    assert found.outside == pytest.approx(0, abs=1e-12)


def test_uniform_attention_is_the_closed_form():
    h, w = 5, 8
    seen = RelativeMap((h, w))
    seen.add([torch.full((h * w, h * w), 1 / (h * w), dtype=torch.float64)])
    torch.testing.assert_close(seen.shares, uniform_shares((h, w)))
    torch.testing.assert_close(seen.picture(), torch.full((9, 15), 1 / 40, dtype=torch.float64))
    found = locality(uniform_shares((h, w)))
    # Pairs within one row or column of each other: (3 h - 2)(3 w - 2); within two: (5 h - 6)(5 w - 6).
    assert found.window[3] == pytest.approx((3 * h - 2) * (3 * w - 2) / (h * w) ** 2, rel=1e-12)
    assert found.window[5] == pytest.approx((5 * h - 6) * (5 * w - 6) / (h * w) ** 2, rel=1e-12)


def test_attention_to_one_neighbour_and_to_text():
    """To itself with 1/2, to the token on its right (the row is a ring) with 1/4, to 3 text tokens with 1/4 in all."""
    h, w, text = 3, 5, 3
    attention = torch.zeros(h * w, text + h * w, dtype=torch.float64)
    attention[:, :text] = 1 / 12
    for number, (y, x) in enumerate(positions(h, w)):
        attention[number, text + number] += 0.5
        attention[number, text + y * w + (x + 1) % w] += 0.25
    seen = RelativeMap((h, w))
    seen.add([attention])
    found = seen.locality()
    assert found.outside == pytest.approx(0.25)
    # A third of the image's share goes one token away, but for the last of five in each row: four away.
    assert found.distance == pytest.approx((4 * 1 + 1 * 4) / 5 / 3)
    assert found.window[3] == pytest.approx(1 - 1 / 15)
    assert found.window[5] == pytest.approx(1 - 1 / 15)
    assert float(seen.picture()[h - 1, w]) == pytest.approx(1 / 3)  # of those that have a right neighbour


# --- recording


class SelfAttention(torch.nn.Module):
    def forward(self, x):
        """x (N, heads, T, d)."""
        return F.scaled_dot_product_attention(x, x.flip(-1), x, scale=0.7)


def test_recorded_rows_are_the_softmax_and_leave_the_output_alone():
    layer, other, x = SelfAttention(), SelfAttention(), torch.randn(2, 3, 6, 8)
    heads = []
    with recording({"layer": layer}, 4, lambda name, found: heads.extend(found)):
        inside = layer(x)
        other(x)
    assert torch.equal(inside, layer(x))
    scores = 0.7 * x.double() @ x.double().flip(-1).transpose(-1, -2)
    expected = scores.softmax(-1)[:, :, -4:]
    torch.testing.assert_close(torch.stack(heads).double(), expected.flatten(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(inside[:, :, -4:].double(), expected @ x.double(), atol=1e-5, rtol=0)
    q, k = torch.randn(4, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    exact = np.exp((q @ k.T).numpy() * 0.3)
    np.testing.assert_allclose(attention_probabilities(q, k, 0.3), exact / exact.sum(1, keepdims=True), rtol=1e-12)


SMALL = {
    "dit": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "out_channels": 8},
    "pixart": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
    },
    "flux": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 12,
        "pooled_projection_dim": 10,
        "axes_dims_rope": [4, 6, 6],
        "guidance_embeds": True,
    },
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random networks, saved as diffusers does: PixArt inside a pipeline's folder."""
    import diffusers

    folders = {}
    for kind, sizes in SMALL.items():
        torch.manual_seed(0)
        network = getattr(diffusers, KINDS[kind].class_name)(**sizes)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        folders[kind] = tmp_path_factory.mktemp("backbones") / kind
        network.save_pretrained(folders[kind] / "transformer" if kind == "pixart" else folders[kind])
    return folders


@pytest.mark.parametrize("kind", SMALL)
def test_networks_of_diffusers(backbones, tmp_path, kind):
    text = {"tokens": torch.randn(5, 12), "pooled": torch.randn(10)}
    save_file(text, tmp_path / "text.safetensors")
    given = tmp_path / "text.safetensors" if kind != "dit" else None
    backbone = load_backbone(kind, str(backbones[kind]), given, torch.device("cpu"), torch.float32)
    if isinstance(backbone, Flux):
        backbone.side = 4
    assert backbone.grid == (4, 4)
    x, t = torch.randn(2, *backbone.shape), torch.tensor([300, 300])
    plain = backbone(x, t)
    seen: dict[str, list] = {}
    with recording(backbone.layers, 16, lambda layer, heads: seen.setdefault(layer, []).extend(heads)):
        recorded = backbone(x, t)
    assert torch.equal(plain, recorded)
    assert list(seen) == list(backbone.layers)
    assert len(seen) == (3 if kind == "flux" else 2)
    for heads in seen.values():
        assert len(heads) == 4
        for rows in heads:
            assert rows.shape == (16, 16 + (5 if kind == "flux" else 0))
            torch.testing.assert_close(rows.sum(1), torch.ones(16), atol=1e-6, rtol=0)
    backbone.text = {name: value + 1 for name, value in backbone.text.items()}
    assert torch.equal(backbone(x, t), plain) == (kind == "dit")


def test_probabilities_of_dit_are_those_of_diffusers(backbones):
    """Against get_attention_scores, which diffusers' own explicit attention uses."""
    backbone = load_backbone("dit", str(backbones["dit"]), None, torch.device("cpu"), torch.float32)
    attention, inputs, heads = backbone.layers["transformer_blocks.1"], [], []
    attention.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    with recording({"one": attention}, 16, lambda layer, found: heads.extend(found)):
        backbone(torch.randn(2, *backbone.shape), torch.tensor([3, 3]))
    query, key = (attention.head_to_batch_dim(part(inputs[0])) for part in (attention.to_q, attention.to_k))
    torch.testing.assert_close(torch.stack(heads), attention.get_attention_scores(query, key), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_the_script_writes_numbers_and_pictures(backbones, tmp_path, kind, capsys):
    options = ["--steps", "4", "--samples", "2", "--timesteps", "250", "1000"]
    options += ["--grid", "4"] if kind == "flux" else []
    arguments = ["--model", str(backbones[kind]), "--kind", kind, "--out", str(tmp_path), *options]
    assert attention_locality.main(arguments) == 0
    found = json.loads((tmp_path / "locality.json").read_text())
    assert set(found["timesteps"]) == ({"250", "1000"} if kind == "flux" else {"333", "999"})
    for layers in found["timesteps"].values():
        for values in layers.values():
            assert 0 < values["window"]["3"] < values["window"]["5"] < 1
            assert 0 < values["distance"] < 3 * math.sqrt(2)
            assert (values["outside"] > 0) == (kind == "flux")
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert "uniform" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--grid", "4"], "--grid: it is only for --kind flux"),
        (["--timesteps", "2000"], r"--timesteps 2000: must lie in 0\.\."),
    ],
)
def test_options_that_do_not_fit_are_told(backbones, tmp_path, options, message):
    arguments = ["--model", str(backbones["dit"]), "--kind", "dit", "--out", str(tmp_path), *options]
    with pytest.raises(ValueError, match=message):
        attention_locality.main(arguments)


def test_outputs_that_are_no_tensor_are_told():
    network = torch.nn.Sequential(torch.nn.Identity())
    watch(network, "0", ChannelStatistics())
    with pytest.raises(ValueError, match="--module 0: it returns a tuple"):
        network((torch.zeros(1), torch.zeros(1)))


def test_what_is_not_there_is_told(backbones, tmp_path):
    def load(kind, model, text=None):
        return load_backbone(kind, str(model), text, torch.device("cpu"), torch.float32)

    with pytest.raises(ValueError, match="it is a DiTTransformer2DModel, but this --kind is FluxTransformer2DModel"):
        load("flux", backbones["dit"])
    with pytest.raises(ValueError, match="DICO_ALLOW_DOWNLOAD=1"):
        load("dit", "nobody/none")
    save_file({"words": torch.zeros(3)}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="it contains words; known names are tokens and pooled"):
        load("pixart", backbones["pixart"], tmp_path / "text.safetensors")
    save_file({"tokens": torch.zeros(3, 7)}, tmp_path / "text.safetensors")
    pixart = load("pixart", backbones["pixart"], tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"tokens is \(3, 7\), but this network takes"):
        pixart(torch.zeros(1, *pixart.shape), torch.tensor([0]))
