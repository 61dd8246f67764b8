"""Hashes: equal and near ones against all pairs; planted duplicates are found and listed."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from data_prep import duplicates
from data_prep.checking import hashes, quarantine
from data_prep.checking.quarantine import Entry
from dico_t2i.data.errors import DataError
from dico_t2i.data.writer import ShardWriter
from tests.shards import image_bytes


@pytest.mark.parametrize("part", [1 << 22, 64])  # at once, and in many parts
@pytest.mark.parametrize("distance", [1, 3, 6])
def test_near_hashes_are_all_found(distance: int, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "PART", part)
    monkeypatch.setattr(hashes, "_CHUNK", 100)
    rng = np.random.default_rng(distance)
    values = rng.integers(1, 1 << 63, 600).astype(np.uint64)
    for i in range(200):  # flip some bits of others
        flips = rng.choice(64, rng.integers(1, 9), replace=False)
        values[400 + i] = values[i] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
    values[[7, 11]] = 0  # no hash
    differ = np.bitwise_count(values[:, None] ^ values[None])
    close = (differ <= distance) & (values[:, None] != 0) & (values[None] != 0)
    expected = {(int(i), int(j)) for i, j in np.argwhere(np.triu(close, 1))}
    found = {
        pair
        for first, later in hashes.near(values, distance)
        for pair in zip(first.tolist(), later.tolist(), strict=True)
    }
    assert len(expected) > 10
    assert found == expected


def test_equal_hashes_name_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "PART", 8)
    values = np.array([5, 9, 5, 0, 7, 9, 5, 0], np.uint64)
    pairs = [zip(a.tolist(), b.tolist(), strict=True) for a, b in hashes.equal(values)]
    assert sorted(pair for part in pairs for pair in part) == [(0, 2), (0, 6), (1, 5)]


def test_a_large_set_takes_more_blocks() -> None:
    assert hashes._agreeing_blocks(3, 1000) == 1
    assert hashes._agreeing_blocks(3, 10**9) == 3


def changed(data: bytes, kind: str) -> bytes:
    """The same picture in other bytes."""
    image, buffer = Image.open(io.BytesIO(data)), io.BytesIO()
    if kind == "smaller":
        image = image.resize((image.width * 3 // 4, image.height * 3 // 4))
    elif kind == "brighter":
        image = ImageEnhance.Brightness(image).enhance(1.1)
    image.save(buffer, "JPEG", quality=40)
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures and then repetitions: of bytes (0, 0 again), of what is seen (1, 2, 3), and two flat images."""
    flat = [Image.new("RGB", (50, 50), colour) for colour in ("white", "black")]
    with ShardWriter(tmp_path / "data", samples_per_shard=4) as writer:
        images = [image_bytes(i, (90, 70)) for i in range(12)]
        images += [images[0], images[0], changed(images[1], "smaller"), changed(images[2], "brighter")]
        images += [changed(images[3], "recompressed"), b"no image"]
        for i, image in enumerate(images):
            writer.write({"__key__": f"{i:02d}", "jpg": image, "txt": "x"})
        for i, picture in enumerate(flat):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            writer.write({"__key__": f"flat{i}", "png": buffer.getvalue(), "txt": "x"})
    return tmp_path / "data"


def listed(data: Path) -> dict[str | None, str]:
    return {entry.key: entry.reason for entry in quarantine.read(data)}


def test_planted_duplicates_are_listed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verified = Entry("shard-000004.tar", "17", "image cannot be decoded")
    quarantine.replace(data, [verified], duplicates=False)
    assert duplicates.main([str(data), "--workers", "1"]) == 0
    exact, near = "(exact)", "(near)"
    expected = {"12": (0, exact), "13": (0, exact), "14": (1, near), "15": (2, near), "16": (3, near)}
    reasons = {
        key: f"duplicate of '{first:02d}' in shard-00000{first // 4}.tar {kind}"
        for key, (first, kind) in expected.items()
    }
    assert listed(data) == {"17": verified.reason, **reasons}
    assert "2 exact and 3 near duplicates among 20 samples" in capsys.readouterr().out
    assert json.loads((data / "duplicates.json").read_text()) == {"samples": 20, "distance": 3, "exact": 2, "near": 3}
    assert Image.open(data / "duplicates.png").size == (3 * 128, 2 * 128)
    assert duplicates.main([str(data), "--workers", "1", "--exact-only"]) == 0  # in the place of the others
    assert set(listed(data)) == {"12", "13", "17"}
    assert not (data / "duplicates.png").exists()


def test_an_empty_list_is_removed(data: Path) -> None:
    quarantine.replace(data, [Entry("a", None, "b")], duplicates=False)
    assert quarantine.replace(data, [], duplicates=False) == 0
    assert not (data / quarantine.FILE).exists()
    (data / quarantine.FILE).write_text('{"shard": 1}\n')
    with pytest.raises(DataError, match="line 1 is not an entry"):
        list(quarantine.read(data))


def test_bad_arguments(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--distance: 0 to 8"):
        duplicates.main([str(data), "--distance", "9"])
    with pytest.raises(DataError):
        duplicates.main([str(tmp_path)])
