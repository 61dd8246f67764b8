"""Verification finds each kind of damage, and nothing in a whole data set."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import shapes, verify
from dico_t2i.data.index import DataError, ShardWriter


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
