"""Names and ids that two things have: no caption lands on another image, and every clash is told with both sides."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import coco, folder, imagenet, verify, webdataset_shards
from evals.quality.captions import _one_an_image, find_files
from tests.data_prep.test_webdataset_shards import members, write_tar
from tests.shards import image_bytes, read_samples


def annotations(path: Path, images: list[Any], captions: list[Any]) -> Path:
    content = {
        "images": [{"id": i, "file_name": name} if not isinstance(i, dict) else i for i, name in images],
        "annotations": [{"id": n, "image_id": i, "caption": text} for n, (i, text) in enumerate(captions)],
    }
    path.write_text(json.dumps(content))
    return path


def put(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image_bytes(number))
    return root


def import_coco(root: Path, out: Path, *files: Path) -> dict[str, list[str]]:
    options = ["--images", str(root), "--out", str(out), "--crop", "none", "--workers", "1"]
    assert coco.main([*options, "--captions", *map(str, files)]) == 0
    found = [json.loads(sample["json"]) for sample in read_samples(out)]
    assert verify.main([str(out), "--workers", "1"]) == 0
    return {about["file_name"]: about["captions"] for about in found}


def test_ids_are_looked_up_in_their_own_file(tmp_path: Path) -> None:
    root = put(tmp_path / "images", "a_0.jpg", "a_1.jpg", "b_0.jpg")
    a = annotations(tmp_path / "a.json", [(0, "a_0.jpg"), (1, "a_1.jpg")], [(0, "of a 0"), (1, "of a 1")])
    b = annotations(tmp_path / "b.json", [(0, "b_0.jpg")], [(0, "of b 0")])
    expected = {"a_0.jpg": ["of a 0"], "a_1.jpg": ["of a 1"], "b_0.jpg": ["of b 0"]}
    assert import_coco(root, tmp_path / "out", a, b) == expected


def test_an_image_of_two_files_has_the_captions_of_both(tmp_path: Path) -> None:
    root = put(tmp_path / "images", "0.jpg", "1.jpg")
    a = annotations(tmp_path / "a.json", [(0, "0.jpg")], [(0, "short")])
    b = annotations(tmp_path / "b.json", [(0, "0.jpg"), (1, "1.jpg")], [(0, "long"), (1, "other")])
    assert import_coco(root, tmp_path / "out", a, b) == {"0.jpg": ["short", "long"], "1.jpg": ["other"]}
    assert [sample["__key__"] for sample in read_samples(tmp_path / "out")] == ["000000000000", "000000000001"]


@pytest.mark.parametrize("ids", [["7", "8"], [7.0, "8"], ["dog-7", "dog.8"], [7, "007a"]])
def test_ids_of_any_kind_are_used(tmp_path: Path, ids: list[Any]) -> None:
    root = put(tmp_path / "images", "a.jpg", "b.jpg")
    file = annotations(tmp_path / "c.json", [(ids[0], "a.jpg"), (ids[1], "b.jpg")], [(ids[1], "b"), (ids[0], "a")])
    assert import_coco(root, tmp_path / "out", file) == {"a.jpg": ["a"], "b.jpg": ["b"]}


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (
            [(1, "a.jpg"), (1, "b.jpg")],
            [(1, "x")],
            r"images\[1\]: id 1 of 'b.jpg' is also the id of 'a.jpg', .*images\[0\]",
        ),
        ([("1", "a.jpg"), (1, "b.jpg")], [(1, "x")], r"images\[1\]: id 1 of 'b.jpg' is also the id of 'a.jpg'"),
        ([({"id": 1}, "")], [(1, "x")], r"c.json: images\[0\]: file_name is None"),
        ([({"id": 1.5, "file_name": "a"}, "")], [(1, "x")], r"c.json: images\[0\]: id is 1.5"),
        ([({"file_name": "a.jpg"}, "")], [(1, "x")], r"c.json: images\[0\]: id is None"),
        ([(1, "a.jpg")], [(None, "x")], r"c.json: annotations\[0\]: image_id is None"),
        ([(1, "a.jpg"), (2, "./a.jpg")], [(1, "x")], r"'./a.jpg' is the same file as 'a.jpg'"),
        ([(1, "c.jpg")], [(1, "x")], r"'c.jpg' may be one/c.jpg or two/c.jpg"),
    ],
)
def test_clashes_and_odd_entries_name_file_entry_and_field(
    tmp_path: Path, images: list[Any], captions: list[Any], message: str
) -> None:
    root = put(tmp_path / "images", "a.jpg", "b.jpg", "one/c.jpg", "two/c.jpg")
    file = annotations(tmp_path / "c.json", images, captions)
    with pytest.raises(ValueError, match=message):
        coco.main(["--images", str(root), "--captions", str(file), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["images", "images/val2017"])
def test_a_folder_in_front_of_the_name_is_found(tmp_path: Path, given: str) -> None:
    put(tmp_path / "images", "val2017/x.jpg", "train2017/y.jpg")
    file = annotations(tmp_path / "c.json", [(1, "val2017/x.jpg")], [(1, "x")])
    assert import_coco(tmp_path / given, tmp_path / "out", file) == {"val2017/x.jpg": ["x"]}


def test_a_file_of_another_folder_is_not_taken(tmp_path: Path) -> None:
    root = put(tmp_path / "images", "train2017/x.jpg")
    file = annotations(tmp_path / "c.json", [(1, "val2017/x.jpg")], [(1, "x")])
    with pytest.raises(ValueError, match="none of the 1 annotated images"):
        coco.main(["--images", str(root), "--captions", str(file), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="1 of 1 reference images are missing"):
        find_files(("val2017/x.jpg",), root)
    with pytest.raises(ValueError, match=r"may be a/x.jpg or b/x.jpg"):
        find_files(("x.jpg",), put(tmp_path / "two", "a/x.jpg", "b/x.jpg"))


@pytest.mark.parametrize("names", [("n01440764/x.JPEG", "n01443537/x.JPEG"), ("n01440764/x.JPEG", "n01440764/x.png")])
def test_equal_file_names_of_imagenet_have_keys_of_their_own(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = put(tmp_path / "train", *names, "n02102040/y.z.JPEG")
    options = ["--images", str(root), "--out", str(tmp_path / "out"), "--workers", "1", "--size", "16"]
    assert imagenet.main(options) == 0
    assert len(read_samples(tmp_path / "out")) == 3
    assert verify.main([str(tmp_path / "out"), "--workers", "1"]) == 0


def test_two_sets_of_img2dataset_do_not_clash(tmp_path: Path) -> None:
    for part, start in (("one", 0), ("two", 10)):
        (tmp_path / part).mkdir()
        found = [(f"{i:09d}.{name.partition('.')[2]}", data) for i in range(3) for name, data in members(start + i)]
        write_tar(tmp_path / part / "00000.tar", found)
    options = ["--shards", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "out")]
    assert webdataset_shards.main([*options, "--workers", "1"]) == 0
    captions = {s["__key__"]: json.loads(s["json"])["captions"] for s in read_samples(tmp_path / "out")}
    assert captions == {f"{part}-{i:09d}": [f"picture {10 * part + i}"] for part in (0, 1) for i in range(3)}
    assert verify.main([str(tmp_path / "out"), "--workers", "1"]) == 0


def test_keys_that_repeat_in_one_set_are_told_with_both_shards(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, members(0))
    options = ["--shards", str(tmp_path), "--workers", "1"]
    with pytest.raises(ValueError, match=r"key '000000000' is in shard-000000.tar and in shard-000001.tar"):
        webdataset_shards.main([*options, "--out", str(tmp_path / "out")])
    assert webdataset_shards.main([*options, "--out", str(tmp_path / "numbered"), "--number-keys"]) == 0
    keys = [sample["__key__"] for sample in read_samples(tmp_path / "numbered")]
    assert keys == ["000000-000000000", "000001-000000000"]
    with pytest.raises(ValueError, match=r"a\.tar is given twice"):
        webdataset_shards.main(["--shards", *[str(tmp_path / "a.tar")] * 2, "--out", str(tmp_path / "twice")])


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    root = put(tmp_path / "images", "a.jpg")
    (tmp_path / "t.csv").write_text("path,caption,caption\na.jpg,one,two\n")
    with pytest.raises(ValueError, match="two columns are named 'caption'"):
        folder.main(["--images", str(root), "--table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")])


def test_evaluations_draw_text_only(tmp_path: Path) -> None:
    images = [(i, f"{i}.jpg") for i in range(6)]
    values: list[Any] = [None, ["a dog", "a cat"], 7, {"en": "a dog"}, "a  bird ", " "]
    content = coco.read_annotations(annotations(tmp_path / "c.json", images, list(enumerate(values))))
    names = {image.id: image.file_name for image in content.images.values()}
    drawn = _one_an_image(tmp_path / "c.json", content.captions, names, 0)  # type: ignore[arg-type]
    assert drawn == {1: (1, "a dog"), 4: (4, "a bird")}
    odd = coco.read_annotations(annotations(tmp_path / "d.json", [("x", "a.jpg")], [("x", "a dog")]))
    with pytest.raises(ValueError, match="id 'x' is not a number"):
        _one_an_image(tmp_path / "d.json", odd.captions, {}, 0)
