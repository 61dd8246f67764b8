"""Real runs on buckets, mixtures and cached text."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dico_t2i.config import TextEncoderConfig
from dico_t2i.data.buckets import assign_buckets
from dico_t2i.data.writer import ShardWriter
from dico_t2i.encoders import load_text_encoder

from .conftest import TINY

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def png(size, colour):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def build(root, sizes, count=24, meta=None, features=None):
    """Plain images of some sizes and colours; features: captions -> members to add."""
    colours = list(COLOURS.items())
    with ShardWriter(root, 10, meta=meta) as writer:
        for i in range(count):
            name, colour = colours[i % len(colours)]
            captions = [f"all of it is {name}", f"{name} and no more"]
            more = features(captions) if features else {}
            sample = {"png": png(sizes[i % len(sizes)], colour), "json": {"captions": captions}}
            writer.write({"__key__": f"{i:04d}", **sample, **more})
    return root


def test_batches_of_two_shapes_train_and_go_on_in_mid_epoch(runs, tmp_path):
    data = build(tmp_path / "wide", [(64, 32), (32, 32), (64, 32)], 48)
    index = assign_buckets(data, [(32, 32), (32, 64)])
    assert index.bucket_counts.sum(0).tolist() == [16, 32]
    overrides = (f"data.path={data}", "data.buckets=true", "data.workers=1", "model.pooled_text=true")
    runs.train("whole", *overrides, "train.duration.steps=8")
    runs.train("parts", *overrides, "train.duration.steps=3")
    runs.train("parts", *overrides, "train.duration.steps=8", ranks=2)
    whole, parts = runs.losses("whole"), runs.losses("parts")
    assert whole.keys() == parts.keys() == set(range(1, 9))
    for step, loss in whole.items():
        assert parts[step] == pytest.approx(loss, rel=1e-5), step
    notes = [m["message"] for m in runs.metrics("whole") if m.get("event") == "data"]
    assert notes == [
        "2 of 2 buckets, 6 batches of 8 per epoch; each epoch leaves out 0 samples that do not fill a batch: different"
        " ones each time, except for 0 in buckets with less than one batch"
    ]
    output = runs.train("whole", *overrides[:1], "train.duration.steps=9", code=2)
    assert "data.buckets: True -> False" in output


def test_a_mixture_trains_and_reports_each_source(runs, tmp_path):
    sources = [(build(tmp_path / name, [(16, 16)]), name, weight) for name, weight in (("few", 1), ("many", 3))]
    (tmp_path / "many" / "quarantine.jsonl").write_text('{"shard": "shard-000000.tar", "key": null, "reason": "cut"}\n')
    mixture = ", ".join(f"{{path: {path}, name: {name}, weight: {weight}}}" for path, name, weight in sources)
    overrides = ("data.path=null", f"data.mixture=[{mixture}]", "log.every.steps=8")
    runs.train("mixed", *overrides, ranks=2)
    last = [m for m in runs.metrics("mixed") if "loss" in m][-1]
    assert last["samples/few"] + last["samples/many"] == 64
    assert last["fraction/many"] == last["samples/many"] / 64
    assert 8 <= last["samples/few"] <= 24
    mean = (last["loss/few"] * last["samples/few"] + last["loss/many"] * last["samples/many"]) / 64
    assert mean == pytest.approx(last["loss"], rel=1e-5)
    assert last["quarantined_samples"] > 0
    assert last["bad_samples"] == 0
    notes = [m["message"] for m in runs.metrics("mixed") if m.get("event") == "data"]
    assert notes == [
        "10 samples are in quarantine: others replace them",
        "of each 256 samples of a stream: 64 few, 192 many",
    ]
    moved = tmp_path / "few"
    moved.rename(tmp_path / "elsewhere")
    again = mixture.replace(str(moved), str(tmp_path / "elsewhere"))
    runs.train("mixed", "data.path=null", f"data.mixture=[{again}]", "train.duration.steps=9")
    output = runs.train("mixed", "data.path=null", f"data.mixture=[{again.replace('weight: 3', 'weight: 2')}]", code=2)
    assert "data.mixture.1.weight: 3.0 -> 2.0" in output


def test_stored_text_trains_like_text_encoded_on_the_way(runs, tmp_path):
    encoder = load_text_encoder(TextEncoderConfig.model_validate(TINY["text_encoder"]), "cpu")

    def features(captions):
        tokens, pooled = (part.to(torch.float16).numpy() for part in encoder.encode(encoder.tokenize(captions)))
        assert (tokens.dtype, tokens.shape[:2]) == (np.float16, (2, 77))
        return {"text.npy": tokens, "pooled.npy": pooled}

    data = build(tmp_path / "text", [(16, 16)], meta={"text_encoder": encoder.identity()}, features=features)
    runs.train("online", f"data.path={data}", "train.duration.steps=4")
    runs.train("stored", f"data.path={data}", "train.duration.steps=4", "data.cached_text=true")
    online, stored = runs.losses("online"), runs.losses("stored")
    for step, loss in online.items():
        assert stored[step] == pytest.approx(loss, rel=1e-3), step
    nothing = build(
        tmp_path / "nothing",
        [(16, 16)],
        meta={"text_encoder": encoder.identity()},
        features=lambda captions: {name: np.zeros_like(value) for name, value in features(captions).items()},
    )
    runs.train("nothing", f"data.path={nothing}", "train.duration.steps=4", "data.cached_text=true")
    assert runs.losses("nothing") != online, "what is stored makes no difference"
    output = runs.train("other", f"data.path={data}", "data.cached_text=true", "text_encoder.seeded.layers=2", code=2)
    assert "text features of a different text_encoder" in output.replace("\n", " ")
    output = runs.train("none", "data.cached_text=true", code=2)
    assert "holds no text features" in output.replace("\n", " ")
