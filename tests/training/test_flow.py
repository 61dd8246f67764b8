"""Rectified flow through the whole trainer: draws, losses, held-out losses, grids, and going on after a stop."""

import pytest

from data_prep import shapes

FLOW = (
    "model.learn_sigma=false",
    "diffusion.kind=flow",
    "diffusion.timesteps=logit_normal",
    "sampler.kind=euler",
    "preview.every.steps=4",
    "preview.prompts=[a red circle, a blue square]",
    "preview.sampler={kind: euler_sde, steps: 3, guidance: 2.0, guidance_interval: [0.0, 0.7]}",
)


def test_a_flow_trains_validates_samples_and_resumes(runs, tmp_path):
    held_out = tmp_path / "held_out"
    shapes.main(["--out", str(held_out), "--samples", "16", "--size", "16", "--seed", "7"])
    validation = (f"validation.path={held_out}", "validation.every.steps=8", "validation.samples=16")
    runs.train("unbroken", *FLOW, *validation)
    runs.stop_at(4, "stopped", *FLOW)
    runs.train("stopped", *FLOW, ranks=2)
    losses, again = runs.losses("unbroken"), runs.losses("stopped")
    assert losses.keys() == again.keys() == set(range(1, 9))
    assert [again[step] for step in losses] == pytest.approx(list(losses.values()), rel=1e-5)
    found = next(m for m in runs.metrics("unbroken") if "val_loss" in m)
    bands = [value for key, value in found.items() if key.startswith("val_loss_t")]
    assert len(bands) == 8
    assert found["val_loss"] == found["val_mse"] == pytest.approx(sum(bands) / 8, rel=1e-6)
    assert (runs.folder / "unbroken" / "samples" / "step-00000008.png").exists()
