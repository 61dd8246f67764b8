"""Representation alignment: its loss in float64, its gradients, and runs that stop and go on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep import shapes
from dico_t2i.config import ConfigError, load_config
from dico_t2i.data.checks import check_data
from dico_t2i.data.sources import load_data
from dico_t2i.export.folder import export
from dico_t2i.models import DiCo
from dico_t2i.runs.checkpoint import newest_checkpoint, read_weights
from dico_t2i.runs.folder import RunFolder
from dico_t2i.sampling.pipeline import load_pipeline
from dico_t2i.training.alignment import Alignment, alignment_loss, as_map, feature_width, resample, token_side

ENCODER = "{kind: timm, weights: seeded, image_size: 56, seeded: {width: 16, layers: 1, heads: 2}}"
ALIGNED = f"alignment={{block: stages.middle.0, hidden: 24, encoder: {ENCODER}}}"


def test_loss_against_plain_arithmetic():
    rng = np.random.default_rng(0)
    projected, target = rng.normal(size=(2, 2, 3, 5)), rng.normal(size=(2, 4, 6, 5))
    # Twice as many pixels: each is 3/4 the nearest and 1/4 the next, at the edge the nearest alone.
    wide = [(0, 0), (0, 1), (1, 0), (1, 2), (2, 1), (2, 2)]
    tall = [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = np.zeros(2)
    for n in range(2):
        for y, (y1, y2) in enumerate(tall):
            for x, (x1, x2) in enumerate(wide):
                above = 0.75 * projected[n, y1, x1] + 0.25 * projected[n, y1, x2]
                below = 0.75 * projected[n, y2, x1] + 0.25 * projected[n, y2, x2]
                a, b = 0.75 * above + 0.25 * below, target[n, y, x]
                expected[n] -= a @ b / np.sqrt(a @ a * (b @ b)) / 24
    found = alignment_loss(torch.from_numpy(projected), torch.from_numpy(target))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    half = alignment_loss(torch.from_numpy(projected).bfloat16(), torch.from_numpy(target).bfloat16())
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half.numpy(), expected, atol=5e-3)


def test_known_values():
    target = torch.randn(3, 4, 4, 8, dtype=torch.float64)
    assert torch.allclose(alignment_loss(7 * target, target), -torch.ones(3, dtype=torch.float64))
    assert torch.allclose(alignment_loss(-target, target), torch.ones(3, dtype=torch.float64))
    blocks = torch.randn(1, 2, 2, 3, dtype=torch.float64)
    fine = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.allclose(resample(torch.ones(1, 5, 5, 2), 3, 7), torch.ones(1, 3, 7, 2))
    assert torch.autograd.gradcheck(
        lambda x: alignment_loss(x, target), torch.randn_like(target[:, :2, :2]).requires_grad_()
    )
    assert resample(fine, 4, 4) is fine


def test_features_are_maps():
    x = torch.randn(2, 9, 4)
    assert torch.equal(as_map(x, 3), x.view(2, 3, 3, 4))
    assert torch.equal(as_map((None, x), 3), x.view(2, 3, 3, 4))
    assert as_map(x.view(2, 3, 3, 4), 3).shape == (2, 3, 3, 4)
    text_first = torch.cat((torch.randn(2, 5, 4), x), 1)
    assert torch.equal(as_map(text_first, 3), x.view(2, 3, 3, 4))


@pytest.mark.parametrize(("kind", "block"), [("uvit", "layers.1"), ("mmdit", "transformer.transformer_blocks.1")])
def test_blocks_of_transformers_with_text(runs, kind, block):
    sizes = f"hidden_size: 16, depth: 3, num_heads: 2, latent_size: 16, pooled_text: {str(kind == 'mmdit').lower()}"
    model = f"model={{kind: {kind}, in_channels: 3, learn_sigma: false, condition: text, text_dim: 32, {sizes}}}"
    config = load_config(runs.config, [model, ALIGNED])
    assert feature_width(config, block) == 16
    assert token_side(config) == 8
    with pytest.raises(ConfigError, match=rf"no nothing .* for example, {block}"):
        feature_width(config, "nothing")


@pytest.mark.parametrize(("compiled", "recomputed"), [(False, False), (False, True), (True, False)])
def test_gradients_reach_the_blocks_up_to_the_aligned_one(runs, compiled, recomputed):
    config = load_config(runs.config, [ALIGNED, f"model.checkpoint_stages={['middle'] if recomputed else []}"])
    alignment = Alignment(config, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    network = DiCo(config.model)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    alignment.attach(network)
    assert alignment.width == network.widths["middle"]
    if compiled:
        network.stages["middle"][0].compile(backend="aot_eager", dynamic=False)  # as compile_blocks, but in seconds
    inputs = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.randn(2, 77, 32), torch.randn(2, 32)
    target = torch.randn(2, 4, 4, 16)
    for _ in range(2):  # the second time nothing of the first is left
        network.zero_grad()
        network(*inputs)
        losses = alignment.added({"loss": torch.zeros(2)}, target)
        losses["loss"].sum().backward()
    assert alignment._features is None
    assert torch.equal(losses["loss"], 0.5 * losses["alignment"])
    reached = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("alignment.0.") for name in reached)
    assert "stem.weight" in reached
    assert "stages.middle.0.conv.project.weight" in reached
    assert not [name for name in reached if name.startswith(("stages.decoder", "head"))]
    expected = alignment_loss(network.alignment(as_map(_middle(config, network, inputs), 3)), target)
    assert torch.allclose(losses["alignment"], expected, atol=1e-5)


def _middle(config, network, inputs):
    """The middle stage's features of a network without hooks."""
    plain = DiCo(config.model)
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if not k.startswith("alignment.")})
    seen = []
    plain.stages["middle"][0].register_forward_hook(lambda m, i, output: seen.append(output))
    plain(*inputs)
    return seen[0]


@pytest.mark.parametrize(
    ("block", "message"),
    [("stages.middle.5", "no stages.middle.5"), ("stages.middle.0.modulation", "returns no map of features")],
)
def test_a_block_that_is_not_there(runs, block, message):
    config = load_config(runs.config, [ALIGNED, f"alignment.block={block}"])
    with pytest.raises(ConfigError, match=message):
        feature_width(config, block)


def test_stopping_and_going_on_changes_no_bit_and_stages_agree(runs, tmp_path, long):
    steps = ("train.duration.steps=4", "checkpoint.every.steps=2")
    output = runs.train("whole", ALIGNED, *steps, "train.zero_stage=2", ranks=2)
    assert "aligned with: seeded (random, untrained) image encoder" in output
    losses = runs.losses("whole")
    whole = newest_checkpoint(runs.folder / "whole" / "checkpoints")
    assert any(name.startswith("alignment.") for name in whole.shapes)
    whole.path.rename(tmp_path / "kept")
    assert "step-00000002" in runs.train("whole", ALIGNED, *steps, "train.zero_stage=2", ranks=2).replace("\n", "")
    assert runs.losses("whole") == losses
    for file in whole.files:
        before, after = load_file(tmp_path / "kept" / file), load_file(whole.path / file)
        assert all(torch.equal(before[name], after[name]) for name in before)
    runs.train("zero3", ALIGNED, *steps, "train.zero_stage=3", ranks=2)
    assert runs.losses("zero3") == pytest.approx(losses, rel=1e-5)
    if long:
        runs.train("bf16", ALIGNED, *steps, "train.precision=bf16", ranks=2)
        assert runs.losses("bf16") == pytest.approx(losses, rel=0.02)
    reports = [m for m in runs.metrics("whole") if "loss" in m]
    for report in reports:
        assert report["loss"] == pytest.approx(report["mse"] + report["vb"] + 0.5 * report["alignment"], rel=1e-5)
    assert -1 < reports[-1]["alignment"] < reports[0]["alignment"] < 1


def test_what_may_change_within_a_run(runs):
    config = load_config(runs.config, [ALIGNED])
    folder = RunFolder(runs.folder, config.name)
    folder.write_config(config)
    saved = folder.checkpoints / "step-00000001" / "manifest.json"
    saved.parent.mkdir(parents=True)
    saved.touch()
    assert folder.changes(load_config(runs.config, [ALIGNED, "alignment.weight=0.1"]))
    for override, line in (
        ([ALIGNED, "alignment.hidden=32"], "alignment.hidden: 24 -> 32"),
        ([], "alignment.block: 'stages.middle.0' -> None"),
    ):
        with pytest.raises(ConfigError, match=line):
            folder.changes(load_config(runs.config, override))


def test_previews_validation_samples_and_export_leave_the_projector_out(runs, tmp_path):
    held_out = tmp_path / "held_out"
    shapes.main(["--out", str(held_out), "--samples", "24", "--size", "16", "--seed", "7"])
    previews = ("preview.every.steps=2", "preview.prompts=[a red circle]")
    validation = ("validation.every.steps=2", f"validation.path={held_out}", "validation.samples=16")
    runs.train("all", ALIGNED, "train.duration.steps=2", *previews, *validation)
    assert (runs.folder / "all" / "samples" / "step-00000002.png").exists()
    assert any("val_loss" in m for m in runs.metrics("all"))
    checkpoint = newest_checkpoint(runs.folder / "all" / "checkpoints")
    names = {name for name, _ in read_weights(checkpoint, "ema_0.9")}
    pipeline = load_pipeline(runs.folder / "all", None, torch.device("cpu"), torch.float32)
    assert names == set(pipeline.model.state_dict())
    export(runs.folder / "all", None, tmp_path / "export")
    state = load_file(tmp_path / "export" / "model.safetensors")
    assert state.keys() == names


def test_latents_and_buckets_are_refused(runs):
    config = load_config(runs.config, [ALIGNED])
    index = load_data(config.data)
    check_data(config, index)
    with pytest.raises(ConfigError, match=r"alignment: its encoder needs the images, but .* holds latents"):
        check_data(config, replace(index, kind="latents"))
    with pytest.raises(ConfigError, match=r"leave out data.buckets"):
        load_config(runs.config, [ALIGNED, "data.buckets=true"])
