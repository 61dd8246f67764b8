"""Latent shards: what is in them, restarts, parts and bad images; with a small real autoencoder."""

import io
import json
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep import latents
from data_prep.checking import quarantine
from data_prep.checking.quarantine import Entry
from dico_t2i.config import AutoencoderConfig, ConfigError, DataConfig, load_config
from dico_t2i.data.batches import Wanted
from dico_t2i.data.buckets import assign_buckets
from dico_t2i.data.decode import decode_image, decode_moments
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.shard import MOMENTS
from dico_t2i.data.sources import make_order
from dico_t2i.data.writer import ShardWriter
from dico_t2i.encoders import load_autoencoder, load_text_encoder, with_measured
from tests import forkserver
from tests.faults.test_disk import fill, small_disk
from tests.shards import tar_bytes
from tests.small_models import save_autoencoder

SIZE = 32


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_autoencoder(tmp_path_factory.mktemp("vae"))


def _png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((56, 40)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten images in shards of four, number 5 of which is cut."""
    with ShardWriter(tmp_path / "images", samples_per_shard=4, kind="images") as writer:
        for i in range(10):
            image = _png(i) if i != 5 else _png(i)[:200]
            writer.write({"__key__": f"{i:03d}", "png": image, "json": {"captions": [f"number {i}"]}, "cls": i})
    return tmp_path / "images"


def _arguments(data: Path, autoencoder: Path) -> list[str]:
    out = data.parent / "latents"
    paths = ["--data", str(data), "--out", str(out), "--autoencoder", str(autoencoder)]
    return [*paths, "--size", str(SIZE), "--batch", "3", "--device", "cpu"]


def _samples(out: Path) -> dict[str, dict[str, Any]]:
    index = load_index(out)
    reader = ShardReader(index)
    places = [(shard, member) for shard, n in enumerate(index.samples.tolist()) for member in range(n)]
    samples = [reader.read(shard, member) for shard, member in places]
    return {sample["__key__"]: sample for sample in samples}


def test_moments_of_images_and_mirror_images(data: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latents.main(_arguments(data, autoencoder)) == 0
    out = data.parent / "latents"
    samples = _samples(out)
    assert list(samples) == [f"{i:03d}" for i in range(10) if i != 5]
    encoder = load_autoencoder(AutoencoderConfig(path=str(autoencoder)), "cpu")
    for key, sample in samples.items():
        image = decode_image(_png(int(key)), SIZE, "center")[None]
        expected = torch.cat((encoder.moments(image), encoder.moments(image.flip(-1))))
        stored = decode_moments(sample["moments.npy"], (2, 8, SIZE // 8, SIZE // 8))
        torch.testing.assert_close(torch.as_tensor(stored).float(), expected, rtol=2e-3, atol=2e-3)
        assert json.loads(sample["json"]) == {"captions": [f"number {int(key)}"]}
        assert int(sample["cls"]) == int(key)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)

    index = load_index(out)
    assert index.kind == "latents"
    assert index.samples.tolist() == [4, 3, 2]
    assert index.meta["autoencoder"] == encoder.identity()
    described = {name: index.meta[name] for name in ("latent_channels", "latent_size", "image_size", "mirrored")}
    assert described == {"latent_channels": 4, "latent_size": 4, "image_size": SIZE, "mirrored": True}
    (skipped,) = (out / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["key"] == "005"
    assert "9 latents of 10 images, 1 skipped" in capsys.readouterr().out


def test_restart_makes_only_what_is_missing(data: Path, autoencoder: Path) -> None:
    arguments = _arguments(data, autoencoder)
    assert latents.main(arguments) == 0
    out = data.parent / "latents"
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".tar"}
    (out / "index.json").unlink()
    (out / "shard-000001.tar").unlink()
    (out / ".shard-000001.tar.dead.part").write_bytes(b"of a killed run")
    kept = (out / "shard-000000.tar").stat()
    assert latents.main(arguments) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.suffix == ".tar"} == whole
    assert (out / "shard-000000.tar").stat() == kept
    assert not list(out.glob("*.part"))
    with pytest.raises(ValueError, match="a different crop"):
        latents.main([*arguments, "--crop", "resize"])


def test_parts_share_the_shards(data: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*_arguments(data, autoencoder), "--no-mirror"]
    out = data.parent / "latents"
    assert latents.main([*arguments, "--part", "0/2"]) == 0
    assert "1 of 3 shards remain for other parts" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("*.tar")) == ["shard-000000.tar", "shard-000002.tar"]
    assert not (out / "index.json").exists()
    assert latents.main([*arguments, "--part", "1/2"]) == 0
    assert len(load_index(out)) == 9
    assert decode_moments(_samples(out)["000"]["moments.npy"], (8, 4, 4)) is not None


def test_bad_input_is_refused(data: Path, autoencoder: Path) -> None:
    arguments = _arguments(data, autoencoder)
    with pytest.raises(ValueError, match="--size 36: must be divisible by 8"):
        latents.main([*arguments, "--size", "36"])
    with pytest.raises(ValueError, match="--device abacus"):
        latents.main([*arguments, "--device", "abacus"])
    (data.parent / "latents").mkdir()
    (data.parent / "latents" / "precious").write_text("x")
    with pytest.raises(ValueError, match="other files"):
        latents.main(arguments)
    with pytest.raises(SystemExit) as stop:
        latents.main([*arguments, "--part", "2/2"])
    assert stop.value.code == 2


TEXT = ("configs/quickstart.yaml", "text_encoder.weights=seeded", "text_encoder.seeded.width=16")


def test_text_features_of_all_captions(tmp_path: Path, autoencoder: Path) -> None:
    texts = [["a cat", " ", "two cats"], ["a dog"], []]
    with ShardWriter(tmp_path / "images") as writer:
        for i, captions in enumerate(texts):
            writer.write({"__key__": f"{i:03d}", "png": _png(i), "json": {"captions": captions}})
    arguments = _arguments(tmp_path / "images", autoencoder)
    assert latents.main([*arguments, "--text-encoder", *TEXT]) == 0
    samples = _samples(tmp_path / "latents")
    assert list(samples) == ["000", "001"]  # the last one has no caption
    encoder = load_text_encoder(load_config(TEXT[0], TEXT[1:]).text_encoder, "cpu")
    for key, captions in (("000", ["a cat", "two cats"]), ("001", ["a dog"])):  # as the loader counts them
        expected = encoder.encode(encoder.tokenize(captions))
        for name, values in (("text.npy", expected.tokens), ("pooled.npy", expected.pooled)):
            stored = np.load(io.BytesIO(samples[key][name]))
            assert (stored.dtype, stored.shape) == (np.float16, tuple(values.shape))
            np.testing.assert_allclose(stored, values, rtol=2e-3, atol=2e-3)
    assert load_index(tmp_path / "latents").meta["text_encoder"] == encoder.identity()
    with pytest.raises(ValueError, match="a different hash, text_encoder"):
        latents.main(arguments)


def test_what_is_in_quarantine_is_left_out(data: Path, autoencoder: Path) -> None:
    entries = [Entry("shard-000000.tar", "002", "bad"), Entry("shard-000002.tar", None, "worse")]
    quarantine.replace(data, entries, duplicates=False)
    assert latents.main(_arguments(data, autoencoder)) == 0
    assert list(_samples(data.parent / "latents")) == ["000", "001", "003", "004", "006", "007"]
    quarantine.replace(data, entries[:1], duplicates=False)
    with pytest.raises(ValueError, match="a different hash, source"):
        latents.main(_arguments(data, autoencoder))


def test_buckets_are_encoded_at_their_shapes_and_trained_on(tmp_path: Path, autoencoder: Path) -> None:
    with ShardWriter(tmp_path / "images", samples_per_shard=8) as writer:
        for i in range(24):
            image = Image.open(io.BytesIO(_png(i))).resize((140, 70) if i % 3 else (64, 64))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            writer.write({"__key__": f"{i:03d}", "png": buffer.getvalue(), "txt": f"number {i}"})
    shapes = [(64, 64), (32, 64)]
    assign_buckets(tmp_path / "images", shapes)
    arguments = _arguments(tmp_path / "images", autoencoder)
    assert latents.main([*arguments, "--size", "64"]) == 0
    samples = _samples(tmp_path / "latents")
    assert len(samples) == 24
    for key, sample in samples.items():
        height, width = shapes[int(key) % 3 > 0]
        assert decode_moments(sample["moments.npy"], (2, 8, height // 8, width // 8)) is not None
    index = load_index(tmp_path / "latents")
    data = DataConfig(path=str(tmp_path / "latents"), image_size=64, streams=4, workers=0, buckets=True)
    order = make_order(data, index, 0, 4)
    batches = make_loader(
        data, index, order, Share(4, 4), Wanted("text", tokenize=lambda texts: torch.zeros(4)), seed=0
    )
    seen = [(batch.keys, tuple(batch.moments.shape)) for batch in islice(batches, 6)]
    assert sorted({key for keys, _ in seen for key in keys}) == sorted(samples)
    assert {shape for _, shape in seen} == {(4, 8, 8, 8), (4, 8, 4, 8)}
    assert all(len({int(key) % 3 > 0 for key in keys}) == 1 for keys, _ in seen)


def test_check_picture_and_where_the_time_went(
    data: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latents.main(_arguments(data, autoencoder)) == 0
    picture = np.asarray(Image.open(data.parent / "latents" / "check.png"))
    assert picture.shape == (3 * SIZE, 3 * SIZE, 3)  # of the first batch: image, decoded, decoded mirror image
    assert (picture[:SIZE, SIZE : 2 * SIZE] == decode_image(_png(1), SIZE, "center").permute(1, 2, 0).numpy()).all()
    assert "images/s in" in (printed := capsys.readouterr().out)
    assert "encoding" in printed


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """160 images in ten shards."""
    with ShardWriter(tmp_path / "images", samples_per_shard=16) as writer:
        for i in range(160):
            writer.write({"__key__": f"{i:03d}", "png": _png(i % 7), "txt": f"number {i}"})
    return tmp_path / "images"


def test_killed_in_the_middle_and_started_again_the_shards_are_the_same(many: Path, autoencoder: Path) -> None:
    # Processes all: in this one, with what other tests have left behind, torch may add up in another order.
    command = [sys.executable, "data_prep/latents.py", *_arguments(many, autoencoder)]
    forkserver.run(command, check=True, stdout=subprocess.DEVNULL)
    out = many.parent / "latents"
    whole = tar_bytes(out)
    out.rename(many.parent / "undisturbed")
    for kill_at in (2, 5):
        job = forkserver.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while len(list(out.glob("*.tar"))) < kill_at and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        job.wait()
        made = tar_bytes(out)
        assert kill_at <= len(made)
        assert made.items() <= whole.items()  # finished shards are whole
    assert len(made) < len(whole)
    forkserver.run(command, check=True, stdout=subprocess.DEVNULL)
    assert tar_bytes(out) == whole
    assert not list(out.glob(".*"))
    assert load_index(out).meta == load_index(many.parent / "undisturbed").meta


def test_on_a_full_disk_finished_shards_stay(many: Path, autoencoder: Path) -> None:
    arguments = _arguments(many, autoencoder)
    out = many.parent / "latents"
    with small_disk(many.parent / "disk"):
        (many.parent / "disk" / "latents").mkdir()
        out.symlink_to(many.parent / "disk" / "latents")
        fill(many.parent / "disk" / "filler", leave=300_000)
        with pytest.raises(OSError, match="No space left"):
            latents.main(arguments)
        made = tar_bytes(out)
        assert 0 < len(made) < 10
        (many.parent / "disk" / "filler").unlink()
        assert latents.main(arguments) == 0
        assert made.items() <= tar_bytes(out).items()
        assert len(load_index(out)) == 160
        assert not list(out.glob(".*"))


def test_the_index_has_the_mean_and_scale_of_each_channel(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    args = ["--data", str(data), "--autoencoder", str(autoencoder), "--size", str(SIZE)]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    latents.main([*args, "--out", str(whole)])
    for part in ("1/2", "0/2"):
        latents.main([*args, "--out", str(parts), "--part", part])
    found = load_index(whole).meta["measured"]
    assert load_index(parts).meta["measured"] == found
    index = load_index(whole)
    reader = ShardReader(index)
    moments = torch.cat(
        [
            decode_moments(reader.read(shard, member)[MOMENTS], (2, 8, 4, 4)).double()
            for shard in range(len(index.names))
            for member in range(int(index.samples[shard]))
        ]
    )
    mean, logvar = moments.chunk(2, dim=1)
    expected = mean.mean((0, 2, 3))
    deviation = (mean.square() + logvar.exp()).mean((0, 2, 3)).sub(expected.square()).sqrt()
    torch.testing.assert_close(torch.tensor(found["mean"]).double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found["scale"]).double(), 1 / deviation, rtol=1e-4, atol=1e-5)

    config = load_config("configs/coco_dwc.yaml", ["autoencoder.scale=measured"])
    made = with_measured(config, index).autoencoder
    assert (made.mean, made.scale) == (tuple(found["mean"]), tuple(found["scale"]))
    own = load_autoencoder(made.model_copy(update={"path": str(autoencoder)}), "cpu")
    noise = torch.randn(len(moments), 4, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = own.latents(moments.float(), noise)
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.ones(4), rtol=0.15, atol=0)
    assert drawn.mean((0, 2, 3)).abs().max() < 0.15
    with pytest.raises(ConfigError, match="has no measured mean and scale"):
        with_measured(config, load_index(data))
    with pytest.raises(ConfigError, match="measured stands for the numbers"):
        load_autoencoder(config.autoencoder.model_copy(update={"path": str(autoencoder)}), "cpu")
