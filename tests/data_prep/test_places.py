"""Folders and paths as people write them."""

import json
import os
from pathlib import Path

import pytest

from data_prep import folder, webdataset_shards
from data_prep.importing.files import place_in
from tests.data_prep.test_counts import pairs, report, write_tar
from tests.shards import image_bytes, read_samples


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for name in ("0.jpg", "a/1.jpg"):
        (tmp_path / "photos" / name).write_bytes(image_bytes(1))
    return tmp_path / "photos"


def prepare(images: str, paths: list[str], out: Path, table: Path) -> dict[str, int]:
    table.write_text("".join(json.dumps({"path": path, "caption": "a dog"}) + "\n" for path in paths))
    options = ["--images", images, "--table", str(table), "--out", str(out), "--workers", "1"]
    assert folder.main(options) == 0
    return {"kept": report(out)["kept"], **report(out)["left out"]}


@pytest.mark.parametrize("images", [".", "./", "../photos", "ABSOLUTE", "LINK"])
@pytest.mark.parametrize("absolute", [True, False])
def test_images_however_they_are_given(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: str, absolute: bool
) -> None:
    monkeypatch.chdir(photos)
    (tmp_path / "link").symlink_to(photos)
    images = {"ABSOLUTE": str(photos), "LINK": str(tmp_path / "link")}.get(images, images)
    paths = [f"{photos}/{name}" if absolute else name for name in ("0.jpg", "a/../a/1.jpg")]
    found = prepare(
        images, [*paths, "../x.jpg", "/etc/passwd", f"{photos}x/0.jpg"], tmp_path / "out", tmp_path / "t.jsonl"
    )
    assert found == {"kept": 2, "paths outside --images": 3}


def test_a_path_through_a_link_to_the_folder(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(photos)
    assert prepare(str(photos), [f"{tmp_path}/link/0.jpg"], tmp_path / "out", tmp_path / "t.jsonl") == {"kept": 1}


def test_places(photos: Path, tmp_path: Path) -> None:
    assert place_in(photos, "0.jpg") == photos / "0.jpg"
    assert place_in(photos, "") is None
    assert place_in(photos, str(photos)) is None
    assert place_in(photos, "..") is None
    assert place_in(Path("/"), "etc/passwd") == Path("/etc/passwd")


@pytest.mark.parametrize("name", ["a{b", "a}b", "{x}", "{0..2}", "a[1]b", "we{ird, *}"])
@pytest.mark.parametrize("given", ["", "/0.tar", "/*.tar"])
def test_braces_brackets_and_stars_in_names(tmp_path: Path, name: str, given: str) -> None:
    place = tmp_path / name
    place.mkdir()
    write_tar(place / "0.tar", pairs("a"))
    assert webdataset_shards.expand([f"{place}{given}"]) == [str(place / "0.tar")]
    options = ["--shards", f"{place}{given}", "--out", str(tmp_path / "out{"), "--workers", "1"]
    assert webdataset_shards.main(options) == 0
    assert len(read_samples(tmp_path / "out{")) == 1


def test_patterns_still_stand_for_tars(tmp_path: Path) -> None:
    for name in ("00", "01", "02"):
        write_tar(tmp_path / f"{name}.tar", pairs(name))
    tars = [str(tmp_path / f"{name}.tar") for name in ("00", "01", "02")]
    assert webdataset_shards.expand([f"{tmp_path}/{{00..02}}.tar"]) == tars
    assert webdataset_shards.expand([f"{tmp_path}/0*.tar"]) == tars
    assert webdataset_shards.expand([str(tmp_path)]) == tars
    assert webdataset_shards.expand(["https://x.org/{0..1}.tar?a=*"]) == [f"https://x.org/{i}.tar?a=*" for i in (0, 1)]
    os.mkdir(tmp_path / "packed")  # noqa: PTH102
    (tmp_path / "packed" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"there are no tars; 1 are compressed, such as 0.tar.gz: unpack them"):
        webdataset_shards.expand([str(tmp_path / "packed")])


def test_a_folder_of_its_own_name_wins_over_what_its_braces_stand_for(tmp_path: Path) -> None:
    (tmp_path / "{a,b}").mkdir()
    for name in ("0", "1"):
        write_tar(tmp_path / "{a,b}" / f"{name}.tar", pairs(name))
    expected = [str(tmp_path / "{a,b}" / f"{name}.tar") for name in ("0", "1")]
    assert webdataset_shards.expand([f"{tmp_path}/{{a,b}}/{{0..1}}.tar"]) == expected
