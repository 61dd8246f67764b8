"""A stale result is never called done: what changed is told, and made anew on demand; what only moved is not."""

import json
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data_prep import coco, folder, imagenet, shapes, webdataset_shards
from data_prep.common import held
from data_prep.importing import conversion
from tests.data_prep.test_counts import pairs, write_tar
from tests.shards import image_bytes, read_samples

CHANGED = (
    r"the source has changed since \d shards were made, such as shard-00000\d.tar; make them again with --redo-changed"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images with text; as a folder, a table, COCO, class folders and tars."""
    images = tmp_path / "source" / "images"
    images.mkdir(parents=True)
    rows, notes = [], []
    for i in range(6):
        (images / f"{i}.jpg").write_bytes(image_bytes(i))
        (images / f"{i}.txt").write_text(f"picture {i}")
        rows.append({"path": f"{i}.jpg", "caption": f"picture {i}"})
        notes.append({"id": i, "image_id": i, "caption": f"picture {i}"})
        of_class = tmp_path / "source" / "classes" / "n01440764"
        of_class.mkdir(parents=True, exist_ok=True)
        (of_class / f"{i}.jpg").write_bytes(image_bytes(i))
    source = tmp_path / "source"
    (source / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)], "annotations": notes}
    (source / "captions.json").write_text(json.dumps(content))
    (source / "tars").mkdir()
    for shard in range(3):
        write_tar(source / "tars" / f"{shard}.tar", pairs(f"{shard}0", f"{shard}1"))
    return tmp_path


def run(root: Path, kind: str, *options: str) -> int:
    source = next(root.glob("*/images")).parent
    out = ["--out", str(root / "out"), "--workers", "1", "--crop", "none", *options]
    if kind == "tars":
        return webdataset_shards.main(["--shards", str(source / "tars"), *out])
    size = ["--samples-per-shard", "2"]
    if kind == "classes":
        return imagenet.main(["--images", str(source / "classes"), *size, *out])
    images = ["--images", str(source / "images"), *size]
    if kind == "coco":
        return coco.main([*images, "--captions", str(source / "captions.json"), *out])
    return folder.main([*images, *(["--table", str(source / "table.jsonl")] if kind == "table" else []), *out])


def correct(source: Path, kind: str) -> None:
    """One caption, or where there are none an image, of the same length and other content."""
    if kind == "folder":
        (source / "images" / "3.txt").write_text("picture X")
    elif kind in ("table", "coco"):
        file = source / ("table.jsonl" if kind == "table" else "captions.json")
        file.write_text(file.read_text().replace("picture 3", "picture X"))
    elif kind == "classes":
        (source / "classes" / "n01440764" / "3.jpg").write_bytes(image_bytes(33))
    else:
        write_tar(source / "tars" / "1.tar", [*pairs("10"), ("11.jpg", image_bytes(1)), ("11.txt", b"a cat")])


KINDS = ["folder", "table", "coco", "classes", "tars"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_corrected_is_told_and_alone_made_anew(
    root: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, kind) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (root / "out").glob("*.tar")}
    assert run(root, kind) == 0
    assert "already contains" in capsys.readouterr().out
    correct(root / "source", kind)
    with pytest.raises(ValueError, match=CHANGED):
        run(root, kind)
    old = [sample["json"] for sample in read_samples(root / "out")]
    assert run(root, kind, "--redo-changed") == 0
    assert "the source of 1 shards has changed" in capsys.readouterr().out
    after = {path.name: path.stat().st_mtime_ns for path in (root / "out").glob("*.tar")}
    assert sum(before[name] != after[name] for name in before) == 1
    fresh = root / "fresh"
    shutil.move(root / "out", fresh)
    assert run(root, kind) == 0  # the same as from the start
    assert {p.name: p.read_bytes() for p in fresh.glob("*.tar")} == {
        p.name: p.read_bytes() for p in (root / "out").glob("*.tar")
    }
    if kind != "classes":
        assert old != [sample["json"] for sample in read_samples(root / "out")]
    assert run(root, kind) == 0
    assert "already contains" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep_times", [True, False])
def test_a_source_that_only_moved_has_not_changed(
    root: Path, kind: str, keep_times: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, kind, "--part", "0/2") == 0
    if keep_times:
        shutil.move(root / "source", root / "elsewhere")
    else:
        shutil.copytree(root / "source", root / "elsewhere", copy_function=shutil.copyfile)
        shutil.rmtree(root / "source")
    assert run(root, kind, "--part", "1/2") == 0
    assert run(root, kind) == 0
    assert "already contains" in capsys.readouterr().out


def test_images_that_were_added_or_taken_away(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = root / "source" / "images"
    assert run(root, "folder") == 0
    for name in ("7", "8"):
        (images / f"{name}.jpg").write_bytes(image_bytes(7))
        (images / f"{name}.txt").write_text("a new one")
    assert run(root, "folder") == 0  # nothing that was made has changed: the new shard alone is made
    assert len(read_samples(root / "out")) == 8
    for name in ("4", "5", "7", "8"):
        (images / f"{name}.jpg").unlink()
    with pytest.raises(ValueError, match=CHANGED):
        run(root, "folder")
    quarantine = root / "out" / "quarantine.jsonl"
    entries = [{"shard": f"shard-{n:06d}.tar", "key": None, "reason": "x"} for n in (0, 3)]
    quarantine.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert run(root, "folder", "--redo-changed") == 0
    assert len(read_samples(root / "out")) == 4
    assert sorted(path.name for path in (root / "out").glob("*.tar*"))[-1] == "shard-000001.tar.index"
    assert [json.loads(line)["shard"] for line in quarantine.read_text().splitlines()] == ["shard-000000.tar"]


def test_a_shard_size_is_kept_and_another_one_is_told(root: Path) -> None:
    assert run(root, "folder") == 0
    images = ["--images", str(root / "source" / "images"), "--out", str(root / "out"), "--crop", "none"]
    assert folder.main([*images, "--workers", "1"]) == 0  # as before
    with pytest.raises(ValueError, match="made with a different samples_per_shard"):
        folder.main([*images, "--workers", "1", "--samples-per-shard", "3"])


def test_a_folder_of_an_older_version_is_gone_on_with(root: Path) -> None:
    assert run(root, "folder") == 0
    out = root / "out"
    settings = json.loads((out / "settings.json").read_text())
    del settings["samples_per_shard"]
    (out / "settings.json").write_text(json.dumps(settings))
    for file in (out / "reports").iterdir():
        content = json.loads(file.read_text())
        del content["state"], content["content"]
        file.write_text(json.dumps({**content, "unit": "0123456789abcdef"}))
    (out / "shard-000001.tar").unlink()
    (out / "index.json").unlink()
    assert run(root, "folder") == 0
    assert len(read_samples(out)) == 6


def hold(out: Path, shards: list[int], ready: Any, done: Any) -> None:
    with held(out, shards):
        ready.set()
        done.wait(60)


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_one_process_makes_a_shard(root: Path, kind: str) -> None:
    assert run(root, kind, "--part", "0/2") == 0
    leftover = root / "out" / ".shard-000001.tar.live.part"
    leftover.write_bytes(b"being written")
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(root / "out", [1], ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match="another process is making the same shards"):
            run(root, kind)
        assert leftover.exists()
        assert run(root, kind, "--part", "0/2") == 0  # which shares the folder with the other
    finally:
        done.set()
        other.join()
    assert run(root, kind) == 0
    assert not leftover.exists()


def writing(out: Path, ready: Any, done: Any) -> None:
    from data_prep.common import finished_or_absent

    with finished_or_absent(out) as folder:
        (folder / "live").write_text("x")
        ready.set()
        done.wait(60)


def test_one_process_draws_shapes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=writing, args=(tmp_path / "out", ready, done))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(ValueError, match="another process is making the same shards"):
            shapes.main(["--out", str(tmp_path / "out"), "--samples", "2"])
        assert (tmp_path / "out.partial" / "live").exists()
    finally:
        done.set()
        other.join()
    assert os.listdir(tmp_path / "out") == ["live"]  # noqa: PTH208


def test_a_unit_says_nothing_of_where_it_lies(root: Path) -> None:
    source = root / "source"
    archive = webdataset_shards.Archives([str(source / "tars" / "0.tar")], (), None).archives[0]
    assert str(source) not in repr(archive)
    signed = webdataset_shards.Archives(["https://x.org/a/0.tar?Signature=abc"], (), None).archives[0]
    again = webdataset_shards.Archives(["https://mirror.org/b/0.tar?Signature=def"], (), None).archives[0]
    assert repr(signed) == repr(again)
    assert conversion.shard_name(3) == "shard-000003.tar"


def test_a_tar_of_the_same_size_and_time_but_other_samples_is_seen_by_its_shard(root: Path) -> None:
    """Sizes and times are what is compared; where both were forged, nothing is seen, and that is documented."""
    path = root / "source" / "tars" / "0.tar"
    assert run(root, "tars") == 0
    status = path.stat()
    write_tar(path, [*pairs("00"), ("01.jpg", image_bytes(1)), ("01.txt", b"a cat")])
    assert path.stat().st_size == status.st_size
    with pytest.raises(ValueError, match=CHANGED):
        run(root, "tars")
    assert tarfile.is_tarfile(path)
