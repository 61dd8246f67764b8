"""Tables as people have them: encodings, line ends, quotes, bad rows; nothing is swallowed."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep import folder, imagenet
from data_prep.importing.tables import BadRow, columns, stretches
from tests.shards import image_bytes, read_samples

ROWS = [("a.jpg", "Füße, und mehr"), ("b.jpg", 'ein "großer" Hund'), ("c.jpg", "zwei\nZeilen")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate("abcd"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{name}.jpg").write_bytes(image_bytes(i))
    return tmp_path / "images"


def quoted(*cells: str) -> str:
    return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)


def prepare(images: Path, table: Path, *options: str) -> dict[str, list[str]]:
    wanted = ["--images", str(images), "--table", str(table), "--out", str(images.parent / "out"), "--workers", "1"]
    assert folder.main([*wanted, *options]) == 0
    found = [json.loads(sample["json"]) for sample in read_samples(images.parent / "out")]
    return {about["file_name"]: about["captions"] for about in found}


def report(images: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((images.parent / "out" / "report.json").read_text())
    return content


EXPECTED = {"a.jpg": ["Füße, und mehr"], "b.jpg": ['ein "großer" Hund'], "c.jpg": ["zwei Zeilen"]}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_every_encoding_and_line_end(images: Path, encoding: str, end: str) -> None:
    table = images.parent / "t.csv"
    lines = ["path,Überschrift,caption", *(quoted(name, "ü", text) for name, text in ROWS), ""]
    table.write_bytes(end.join(lines).encode(encoding))
    given = "cp1252" if encoding == "cp1252" else "utf-8"
    assert columns(table, given) == ["path", "Überschrift", "caption"]
    assert prepare(images, table, "--encoding", given, "--samples-per-shard", "2") == EXPECTED
    assert report(images)["left out"] == {}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_lines_with_a_mark_and_blank_lines(images: Path, encoding: str) -> None:
    table = images.parent / "t.jsonl"
    lines = [json.dumps({"path": name, "caption": text}, ensure_ascii=False) for name, text in ROWS]
    table.write_bytes(("\n\n".join(lines) + "\n \n").encode(encoding))
    assert prepare(images, table) == EXPECTED
    assert report(images)["seen"] == 3


@pytest.mark.parametrize("rest", ["d.jpg,a cat\n", "d.jpg,a cat\ne.jpg,more", 'd.jpg,a cat\n,"closed"\n"'])
def test_a_quote_that_is_never_closed_is_an_error_with_its_line(images: Path, rest: str) -> None:
    table = images.parent / "t.csv"
    table.write_text(f'path,caption\na.jpg,a dog\nb.jpg,"a cat\n{rest}')
    if rest.endswith('"'):
        table.write_text(table.read_text() + "\nx")
    with pytest.raises(ValueError, match=r"t.csv: line \d: a quote is opened and never closed"):
        prepare(images, table)
    assert not (images.parent / "out").exists()


def test_a_quote_that_goes_wrong_loses_its_own_line(images: Path) -> None:
    table = images.parent / "t.csv"
    table.write_text('path,caption\na.jpg,"a dog\nb.jpg,"a cat"\nc.jpg,"x" y\nd.jpg,"fine"\n')
    assert prepare(images, table) == {"b.jpg": ["a cat"], "d.jpg": ["fine"]}
    assert report(images)["left out"] == {"unreadable rows": 2}
    assert "t.csv: line 2" in report(images)["examples"]["unreadable rows"][0]
    assert "t.csv: line 4" in report(images)["examples"]["unreadable rows"][1]


@pytest.mark.parametrize("first", ["a.jpg", "a.jpg,x,y,z", 'a.jpg,"x" y'])
def test_a_bad_first_row_is_counted(images: Path, first: str) -> None:
    table = images.parent / "t.csv"
    table.write_text(f"path,caption\n{first}\nb.jpg,a cat\n\n")
    assert prepare(images, table) == {"b.jpg": ["a cat"]}
    assert report(images)["left out"] == {"unreadable rows": 1}
    assert "line 2" in report(images)["examples"]["unreadable rows"][0]


@pytest.mark.parametrize("first", ["{", '{"path": "a.jpg"}', '{"path": "a.jpg", "path": "b.jpg"}', "[]"])
def test_a_first_json_line_without_a_caption_or_malformed(images: Path, first: str) -> None:
    table = images.parent / "t.jsonl"
    table.write_text(f'{first}\n{{"path": "b.jpg", "caption": "a cat"}}\n')
    assert prepare(images, table) == {"b.jpg": ["a cat"]}
    assert report(images)["seen"] == 2


def test_a_header_in_another_encoding_asks_for_it(images: Path) -> None:
    table = images.parent / "t.csv"
    table.write_bytes("path,Überschrift\na.jpg,x\n".encode("cp1252"))
    with pytest.raises(ValueError, match="names of its columns are in a different encoding; give it with --encoding"):
        prepare(images, table)


def test_values_that_are_no_text_never_become_captions(images: Path) -> None:
    table = images.parent / "t.jsonl"
    values: list[Any] = [["ok", None, 3], float("nan"), {"a": "dog"}, 7]
    table.write_text(
        "".join(json.dumps({"path": f"{n}.jpg", "text": v}) + "\n" for n, v in zip("abcd", values, strict=True))
    )
    assert prepare(images, table) == {"a.jpg": ["ok"]}
    left_out = report(images)["left out"]
    assert left_out == {"images without captions": 3, "captions that are not text": 2}
    examples = report(images)["examples"]["images without captions"]
    assert examples == ["b.jpg: null instead", "c.jpg: an object instead", "d.jpg: a number instead"]


def test_stretches_read_alone_are_the_table(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    lines = [f'{i}.jpg,"text {i}\nmore"' if i % 3 else f"{i}.jpg" for i in range(50)]
    table.write_bytes("\r\n".join(["path,caption", *lines]).encode("utf-16"))
    whole = [row for stretch in stretches(table, 1000, "utf-8") for row in stretch.rows()]
    parts = [row for stretch in stretches(table, 7, "utf-8") for row in stretch.rows()]
    assert parts == whole
    assert len(whole) == 50
    assert sum(isinstance(row, BadRow) for row in whole) == 17


def test_names_with_a_mark_and_a_blank_last_line(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("n01440764 tench\r\nn01443537 goldfish\r\n\r\n".encode("utf-8-sig"))
    assert imagenet.read_names(file) == {"n01440764": "tench", "n01443537": "goldfish"}
    file.write_text("n01440764 tench\n\nn01440764 shark\n")
    with pytest.raises(ValueError, match="line 3: n01440764 has two names, tench and shark"):
        imagenet.read_names(file)
