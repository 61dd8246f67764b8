"""A real run with two text encoders: stopped and gone on with, with stored text, sampled, exported."""

import pytest
import torch

from dico_t2i.config import ConfigError, SamplerConfig, TextEncoderConfig, load_config
from dico_t2i.encoders import load_text_encoder
from dico_t2i.encoders.load import load_encoders
from dico_t2i.export.folder import export
from dico_t2i.runs.folder import RunFolder
from dico_t2i.sampling.pipeline import load_pipeline

from .conftest import TINY
from .test_data_options import build

T5 = {"kind": "t5", "tokens": 12, "weights": "seeded", "seeded": {"width": 24, "layers": 1, "heads": 2}}
OVERRIDES = (
    "text_encoder.also=[{kind: t5, tokens: 12, weights: seeded, seeded: {width: 24, layers: 1, heads: 2}}]",
    "model.text_tokens=89",
    "model.text_inputs=[[77, 32], [12, 24]]",
    "model.text_inputs_width=16",
    "model.text_mask=true",
    "model.text_kernel=5",
    "model.text_pooling=attention",
)


def test_two_encoders_train_and_go_on_and_sample(runs, tmp_path):
    config = TextEncoderConfig.model_validate({**TINY["text_encoder"], "also": [T5]})
    encoder = load_text_encoder(config, "cpu")

    def features(captions):
        tokens, pooled = (part.to(torch.float16).numpy() for part in encoder.encode(encoder.tokenize(captions)))
        assert tokens.shape == (2, 89, 32)
        return {"text.npy": tokens, "pooled.npy": pooled}

    data = build(tmp_path / "text", [(16, 16)], meta={"text_encoder": encoder.identity()}, features=features)
    overrides = (f"data.path={data}", *OVERRIDES)
    runs.train("whole", *overrides, "train.duration.steps=4")
    runs.train("parts", *overrides, "train.duration.steps=2")
    runs.train("parts", *overrides, "train.duration.steps=4")
    assert runs.losses("parts") == runs.losses("whole")
    runs.train("stored", *overrides, "train.duration.steps=2", "data.cached_text=true")
    for step, loss in runs.losses("stored").items():
        assert runs.losses("whole")[step] == pytest.approx(loss, rel=1e-3), step

    other = load_config(runs.config, ["name=parts", *overrides, OVERRIDES[0].replace("layers: 1", "layers: 2")])
    with pytest.raises(ConfigError, match=r"text_encoder\.also\.0\.seeded\.layers: 1 -> 2"):
        RunFolder(runs.folder, "parts").changes(other)
    with pytest.raises(ConfigError, match=r"model\.text_tokens: 77, but the text encoder gives 89"):
        load_encoders(load_config(runs.config, OVERRIDES[:1]), torch.device("cpu"), torch.float32)

    run, out = runs.folder / "whole", tmp_path / "export"
    with pytest.raises(ValueError, match="export with --no-encoders"):
        export(run, None, out)
    export(run, None, out, encoders=False)
    sampler = SamplerConfig(kind="dpm++", steps=3, guidance=3.0)
    images = [
        load_pipeline(path, None, torch.device("cpu"), torch.float32).generate(
            ["red", "all of it is blue"], [1, 2], sampler
        )
        for path in (run, out)
    ]
    assert torch.equal(*images)
    assert images[0].shape == (2, 3, 16, 16)
