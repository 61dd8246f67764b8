"""Verification finds each kind of damage, and nothing in a whole data set."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import latents, shapes, verify
from data_prep.checking import quarantine
from data_prep.checking.quarantine import DUPLICATE, Entry
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import load_index
from dico_t2i.data.writer import ShardWriter
from tests.shards import image_bytes, tar_bytes
from tests.small_models import save_autoencoder


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    shapes.main(["--out", str(folder), "--samples", "12", "--samples-per-shard", "6"])
    return folder


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def test_whole_data_set_passes(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(whole), "--workers", "1"]) == 0
    assert "12 samples in 2 shards (images)" in capsys.readouterr().out


def test_flipped_byte_is_found(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = whole / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[content.index(b"IDAT") + 10] ^= 1
    tar.write_bytes(content)
    assert verify.main([str(whole), "--workers", "1"]) == 1
    assert "shard-000001.tar: sample '00000006': checksum of png" in capsys.readouterr().out


def test_cut_and_stray_files_are_found(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = whole / "shard-000001.tar"
    (whole / "stray.tar").write_bytes(tar.read_bytes())
    (whole / ".shard-000009.tar.x.part").write_bytes(b"")
    assert verify.main([str(whole), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert "stray.tar: not in index.json" in printed
    assert "interrupted run" in printed
    tar.write_bytes(tar.read_bytes()[:-4000])
    assert verify.main([str(whole), "--workers", "1"]) == 1
    assert "shard-000001.tar" in capsys.readouterr().out


def test_no_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        verify.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ({"png": b"no image", "cls": 1}, "cannot be decoded"),
        ({"cls": 1}, "has no image"),
        ({"png": None}, "neither a caption nor a label"),
        ({"png": None, "json": {"captions": [" "]}}, "neither a caption nor a label"),
        ({"png": None, "json": b"{"}, "Expecting"),
        ({"png": None, "cls": "many"}, "invalid literal"),
    ],
)
def test_bad_image_samples_are_found(
    tmp_path: Path, sample: dict[str, Any], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = shapes.make_sample(0, size=16, seed=0, two_objects=0, held_out=False)
    filled = {name: good["png"] if value is None else value for name, value in sample.items()}
    with ShardWriter(tmp_path / "data", kind="images") as writer:
        writer.write({**good, "__key__": "good"})
        writer.write({**filled, "__key__": "bad"})
    assert verify.main([str(tmp_path / "data"), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert problem in printed
    assert "1 problems" in printed


@pytest.mark.parametrize(
    ("moments", "problem"),
    [(np.full((8, 4, 4), np.nan), "not finite"), (np.zeros((4, 4, 4)), "expected float16 (8, 4, 4)")],
)
def test_bad_moments_are_found(
    tmp_path: Path, moments: np.ndarray, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    meta = {"latent_channels": 4, "latent_size": 4, "mirrored": False}
    with ShardWriter(tmp_path / "data", kind="latents", meta=meta) as writer:
        writer.write({"__key__": "a", "moments.npy": _npy(np.zeros((8, 4, 4), np.float16)), "cls": 0})
        writer.write({"__key__": "b", "moments.npy": _npy(moments.astype(np.float16)), "cls": 0})
    assert verify.main([str(tmp_path / "data"), "--workers", "1"]) == 1
    printed = capsys.readouterr().out
    assert problem in printed
    assert "1 problems" in printed


def damage(tar: Path, mark: bytes) -> None:
    """Flip a bit behind the first ``mark``."""
    content = bytearray(tar.read_bytes())
    content[content.index(mark) + len(mark) + 200] ^= 1
    tar.write_bytes(content)


def test_what_is_wrong_goes_to_the_quarantine(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", samples_per_shard=3) as writer:
        for key in ("a", "b", "c", "d", "b", "e", "f"):
            writer.write({"__key__": key, "jpg": image_bytes(1) if key != "c" else b"no image", "txt": "a dog"})
    (tmp_path / "data" / "shard-000002.tar.index").write_bytes(b"no index")
    known = Entry("shard-000000.tar", "a", f"{DUPLICATE}'x' in shard-000001.tar (near)")
    quarantine.replace(tmp_path / "data", [known], duplicates=True)
    for workers in ("2", "1"):  # the second time in the place of the first
        assert verify.main([str(tmp_path / "data"), "--workers", workers]) == 1
        found = {(entry.shard, entry.key): entry.reason for entry in quarantine.read(tmp_path / "data")}
        assert set(found) == {
            ("shard-000000.tar", "a"),
            ("shard-000000.tar", "c"),
            ("shard-000001.tar", "b"),
            ("shard-000002.tar", None),
        }
        assert found["shard-000000.tar", "a"] == known.reason
        assert found["shard-000001.tar", "b"] == "a sample in shard-000000.tar has the same key"


def test_repair_indexes_anew(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = load_index(whole)
    (whole / "shard-000000.tar.index").unlink()
    tar = whole / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:7000])
    assert verify.main([str(whole), "--workers", "1"]) == 1
    assert "--repair" in capsys.readouterr().out
    assert verify.main([str(whole), "--workers", "1", "--repair"]) == 1  # what was cut off stays away
    found = load_index(whole)
    assert found.samples[0] == 6
    assert 0 < found.samples[1] < 6
    assert found.meta == index.meta
    (whole / "index.json").write_text("{")
    tar.unlink()
    assert verify.main([str(whole), "--workers", "1", "--repair"]) == 0
    assert load_index(whole).samples.tolist() == [6]


def test_repair_encodes_damaged_latents_again(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    autoencoder, out = str(save_autoencoder(tmp_path / "vae")), tmp_path / "latents"
    options = ["--autoencoder", autoencoder, "--device", "cpu"]
    assert latents.main(["--data", str(whole), "--out", str(out), "--size", "16", "--batch", "3", *options]) == 0
    made = tar_bytes(out)
    damage(out / "shard-000000.tar", b"NUMPY")
    assert verify.main([str(out), "--workers", "1"]) == 1
    (entry,) = quarantine.read(out)
    assert (entry.shard, entry.key) == ("shard-000000.tar", "00000000")
    (out / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match="--source and --autoencoder go together"):
        verify.main([str(out), *options])
    capsys.readouterr()
    repair = [str(out), "--workers", "1", "--repair", "--source", str(whole), "--batch", "3", "--device", "cpu"]
    assert verify.main([*repair, "--autoencoder", autoencoder]) == 0
    assert "2 shards encoded again" in capsys.readouterr().out
    assert tar_bytes(out) == made
    assert not (out / quarantine.FILE).exists()
    damage(out / "shard-000000.tar", b"NUMPY")
    with pytest.raises(ValueError, match="a different autoencoder"):
        verify.main([*repair, "--autoencoder", autoencoder, "--scale", "0.5"])


def test_text_features_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = {"latent_channels": 4, "latent_size": 4, "mirrored": False, "text_encoder": {}}
    moments, pooled = np.zeros((8, 4, 4), np.float16), np.zeros((2, 6), np.float16)
    texts = {
        "good": np.zeros((2, 77, 8), np.float16),
        "few": np.zeros((1, 77, 8), np.float16),
        "float32": np.zeros((2, 77, 8), np.float32),
        "nan": np.full((2, 77, 8), np.nan, np.float16),
        "other": np.zeros((2, 77, 9), np.float16),
        "none": None,
    }
    with ShardWriter(tmp_path / "data", kind="latents", meta=meta) as writer:
        for key, text in texts.items():
            features = {} if text is None else {"text.npy": text, "pooled.npy": pooled}
            writer.write({"__key__": key, "moments.npy": moments, "json": {"captions": ["a", "b"]}, **features})
    assert verify.main([str(tmp_path / "data"), "--workers", "1"]) == 1
    assert {entry.key for entry in quarantine.read(tmp_path / "data")} == {"few", "float32", "nan", "none"}
    assert "text features of several encoders" in capsys.readouterr().out
