"""Data sets of Hugging Face: layouts, splits, columns, nested captions."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from data_prep import huggingface
from data_prep.huggingface import split_of
from tests.data_prep.test_counts import report
from tests.shards import image_bytes, read_samples, tar_bytes


def rows(count: int, **columns: Any) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": image_bytes(i), "path": f"{i}.jpg"},
            "text": f"picture {i}",
            "score": i / 2,
            **{name: value(i) for name, value in columns.items()},
        }
        for i in range(count)
    ]


def parquet(path: Path, content: list[dict[str, Any]], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(content), path, **options)


def prepare(place: Path | str, out: Path, *options: str) -> list[dict[str, Any]]:
    wanted = ["--data", str(place), "--out", str(out), "--workers", "1", "--crop", "none", "--samples-per-shard", "4"]
    assert huggingface.main([*wanted, *options]) == 0
    return read_samples(out)


def test_parquet_files_of_a_split(tmp_path: Path) -> None:
    for number in range(2):
        parquet(tmp_path / "hub" / "data" / f"train-0000{number}-of-00002.parquet", rows(5), row_group_size=3)
    parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows(2))
    with pytest.raises(ValueError, match="has the splits test, train; choose one with --split"):
        prepare(tmp_path / "hub", tmp_path / "none")
    with pytest.raises(ValueError, match="--split valid: not one of test, train"):
        prepare(tmp_path / "hub", tmp_path / "none", "--split", "valid")
    samples = prepare(tmp_path / "hub", tmp_path / "out", "--split", "train")
    assert [sample["jpg"] for sample in samples] == [image_bytes(i % 5) for i in range(10)]
    assert json.loads(samples[3]["json"]) == {
        "captions": ["picture 3"],
        "file_name": "3.jpg",
        "score": 1.5,
        "width": 60,
        "height": 40,
    }
    assert len({sample["__key__"] for sample in samples}) == 10
    assert len(prepare(tmp_path / "hub", tmp_path / "test", "--split", "test")) == 2


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("plain_text/train/0000.parquet", "train"),
        ("train/data-00000-of-00001.arrow", "train"),
        ("validation_matched-00000-of-00001.parquet", "validation_matched"),
        ("test.parquet", "test"),
        ("data-00000-of-00001.arrow", "train"),
        ("default/partial-train/0000.parquet", "partial-train"),
        ("part_0.parquet", "train"),
    ],
)
def test_splits_are_told_by_names(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize("form", ["stream", "file"])
def test_a_folder_that_save_to_disk_wrote(tmp_path: Path, form: str) -> None:
    table = pa.Table.from_pylist(rows(7))
    (tmp_path / "saved" / "train").mkdir(parents=True)
    (tmp_path / "saved" / "train" / "state.json").write_text("{}")
    path = tmp_path / "saved" / "train" / "data-00000-of-00001.arrow"
    new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    samples = prepare(tmp_path / "saved", tmp_path / "out")
    assert [sample["jpg"] for sample in samples] == [image_bytes(i) for i in range(7)]


def test_the_declared_image_column_is_taken_and_captions_may_lie_deeper(tmp_path: Path) -> None:
    content = rows(3, sentences=lambda i: [{"raw": f"one {i}", "id": 1}, {"raw": f"two {i}", "id": 2}])
    content = [{"photograph": row["image"], **{k: v for k, v in row.items() if k != "image"}} for row in content]
    features = {"photograph": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    table = pa.Table.from_pylist(content)
    about = json.dumps({"info": {"features": features}}).encode()
    (tmp_path / "hub").mkdir()
    pq.write_table(table.replace_schema_metadata({"huggingface": about}), tmp_path / "hub" / "train.parquet")
    samples = prepare(tmp_path / "hub", tmp_path / "out", "--caption-columns", "text", "sentences.raw")
    found = json.loads(samples[1]["json"])
    assert found["captions"] == ["picture 1", "one 1", "two 1"]
    assert found["caption_sources"] == ["text", "sentences.raw", "sentences.raw"]
    with pytest.raises(ValueError, match="--caption-columns: the table has no words"):
        prepare(tmp_path / "hub", tmp_path / "none", "--caption-columns", "words")


def test_bare_bytes_paths_and_rows_of_no_use(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.jpg").write_bytes(image_bytes(1))
    parquet(tmp_path / "hub" / "train.parquet", [{"image": "a.jpg", "text": "x y"}, {"image": None, "text": "x y"}])
    assert len(prepare(tmp_path / "hub", tmp_path / "paths")) == 1
    parquet(
        tmp_path / "bare" / "train.parquet",
        [{"image": image_bytes(1), "text": None}, *[{"image": image_bytes(2), "text": "x y"}] * 2],
    )
    assert len(prepare(tmp_path / "bare", tmp_path / "out")) == 2
    assert report(tmp_path / "out")["left out"] == {"images without captions": 1}


def test_shards_do_not_depend_on_processes(tmp_path: Path) -> None:
    parquet(tmp_path / "hub" / "train.parquet", rows(9), row_group_size=4)
    prepare(tmp_path / "hub", tmp_path / "one")
    prepare(tmp_path / "hub", tmp_path / "two", "--workers", "2")
    assert tar_bytes(tmp_path / "one") == tar_bytes(tmp_path / "two")


def test_no_data_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no .parquet or .arrow files"):
        prepare(tmp_path, tmp_path / "out")


def test_a_data_set_far_away_is_read_by_its_row_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory = fsspec.filesystem("memory")
    parquet(tmp_path / "train-00000-of-00001.parquet", rows(9), row_group_size=4)
    memory.pipe("/far/data/train-00000-of-00001.parquet", (tmp_path / "train-00000-of-00001.parquet").read_bytes())
    samples = prepare("memory://far", tmp_path / "out")
    assert [sample["jpg"] for sample in samples] == [image_bytes(i) for i in range(9)]
    prepare("memory://far", tmp_path / "out")
    assert "already contains" in capsys.readouterr().out


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match="--data someone/birds: there is no such folder, and it cannot be read from the hub"
    ) as error:
        prepare("someone/birds", tmp_path / "out")
    assert "\n" not in str(error.value)
