"""A peer through the trainer: stopped, resumed, sampled, exported."""

import torch
import yaml

from dico_t2i.config import SamplerConfig
from dico_t2i.export.folder import export
from dico_t2i.sampling.pipeline import load_pipeline

UVIT = {"kind": "uvit", "hidden_size": 32, "depth": 3, "num_heads": 2, "in_channels": 3, "text_dim": 32}
MMDIT = {**UVIT, "kind": "mmdit", "pooled_dim": 32}


def override(model):
    return f"model={yaml.safe_dump({**model, 'latent_size': 16}, default_flow_style=True, width=1000).strip()}"


def test_a_peer_goes_on_where_it_stopped_and_samples_the_same_from_an_export(runs):
    runs.train("whole", override(UVIT), "train.duration.steps=6", "train.zero_stage=2")
    for steps in (3, 6):
        runs.train("parts", override(UVIT), f"train.duration.steps={steps}", "train.zero_stage=2")
    assert runs.losses("parts") == runs.losses("whole")
    export(runs.folder / "whole", None, runs.folder / "exported")
    sampler = SamplerConfig(kind="dpm++", steps=3, guidance=2.0)
    images = [
        load_pipeline(runs.folder / name, None, torch.device("cpu"), torch.float32).generate(
            ["a red circle", "a blue square"], [1, 2], sampler
        )
        for name in ("whole", "exported")
    ]
    assert torch.equal(*images)
    assert images[0].shape == (2, 3, 16, 16)


def test_pooled_text_and_recomputing_in_bf16(runs):
    """With a preview: its network has the averaged weights."""
    preview = ("preview.every.steps=2", "preview.prompts=[a red circle]")
    plain = ("train.duration.steps=2", "train.precision=bf16", override(MMDIT))
    runs.train("mmdit", *plain, *preview, "model.checkpoint_stages=[blocks]")
    assert len(runs.losses("mmdit")) == 2
    assert len(list((runs.folder / "mmdit" / "samples").iterdir())) == 1
