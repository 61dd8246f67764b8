"""Text that people write: marks, line ends, encodings."""

import pytest

from dico_t2i.text_lines import check_text, decode_text, read_lines, split_lines


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_marks_say_the_encoding_and_are_removed(tmp_path, encoding):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a café\nein Hütte".encode(encoding))
    assert read_lines(file) == ["a café", "ein Hütte"]


def test_a_mark_inside_joined_files_is_removed_too():
    assert split_lines("a\n\ufeffb\n") == ["a", "b"]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_only_line_ends_end_a_line(inside):
    assert split_lines(f"a{inside}b\nc") == [f"a{inside}b", "c"]


@pytest.mark.parametrize(
    ("text", "lines"),
    [("", []), ("\n", [""]), ("a", ["a"]), ("a\r\nb\rc\n", ["a", "b", "c"]), ("a\n\nb", ["a", "", "b"])],
)
def test_line_ends(text, lines):
    assert split_lines(text) == lines


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"a dog\nein Gel\xe4nde\n", "line 2, character 8: 0xe4 (byte 13) is not utf-8 text"),
        (b"\xef\xbb\xbf\xff", "line 1, character 1: 0xff (byte 3) is not utf-8"),
        (b"\xff\xfea\x00b", "line 1, character 2: 0x62 (byte 4) is not utf-16-le"),
        (b"a\n\n\x80", "line 3, character 1: 0x80 (byte 3)"),
    ],
)
def test_an_encoding_error_is_one_line_with_its_place(data, place):
    with pytest.raises(ValueError, match=r"prompts\.txt") as error:
        decode_text(data, "prompts.txt")
    assert place in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argument", "place"), [("caf\udce9", "character 4: 0xe9"), ("\ud800x", "character 1: U+D800")]
)
def test_arguments_that_are_not_text(argument, place):
    with pytest.raises(ValueError, match="--prompt") as error:
        check_text(argument, "--prompt")
    assert place in str(error.value)
    assert check_text("café", "--prompt") == "café"
