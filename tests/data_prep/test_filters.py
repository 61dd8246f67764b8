"""Captions: decoding, cleaning, sanity in any language; filters of sizes and score fields."""

import argparse
from collections import Counter

import pytest

from data_prep.importing import captions
from data_prep.importing.filters import Dropped, Filters, add_filter_options, filters_of
from dico_t2i.text_lines import decode_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_tell_the_encoding(encoding: str) -> None:
    assert decode_text("Füße 猫".encode(encoding), "file") == "Füße 猫"


def test_other_encodings_have_to_be_named() -> None:
    with pytest.raises(ValueError, match="is not utf-8 text"):
        decode_text("Füße".encode("cp1252"), "file")
    assert decode_text("Füße".encode("cp1252"), "file", "cp1252") == "Füße"
    with pytest.raises(ValueError, match="--encoding klingon: unknown"):
        captions.check_encoding("klingon")


def test_clean_composes_and_removes_what_is_no_text() -> None:
    assert captions.clean(" a\x00 re\u0301d\n\t dog\x1b[31m\ud800 ") == "a r\u00e9d dog[31m"
    family = "👨\u200d👩\u200d👧 می\u200cخواهم"  # joiners belong to the text
    assert captions.clean(family) == family


@pytest.mark.parametrize(
    "text",
    [
        "a dog",
        "2 dogs, 3 cats",
        "猫",
        "كلب",
        "कुत्ता",
        "see https://x.org for the red car",
        "photo of 1234 people",
        "aaah!",
        "Hmmmmm",
    ],
)
def test_what_may_describe_a_picture(text: str) -> None:
    assert captions.oddity(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("?!...", "without letters"),
        ("12 - 345", "without letters"),
        ("https://example.org/a.jpg", "only a URL"),
        ("www.example.org http://b.c !", "only a URL"),
        ("IMG_2041.JPG", "only a file name"),
        ("DSC00012", "only a file name"),
        ("IMG 20170102-1234 (2)", "only a file name"),
        ("looooooooooooong", "repeated characters"),
        ("ha ha ha ha ha ha ha ha ha ha ha ha", "repeated characters"),
        ("a caf\ufffd", "wrongly decoded"),
    ],
)
def test_what_no_language_says(text: str, reason: str) -> None:
    assert captions.oddity(text) == reason


def test_captions_left_out_are_counted() -> None:
    counts: Counter[str] = Counter()
    given = ["  a dog ", "?", "IMG_1234", "abcdefghijkl", "x"]
    filters = Filters(min_caption=2, max_caption=10)
    assert filters.captions(given, lambda reason, example: counts.update([reason])) == ["a dog"]
    assert counts == {
        "captions without letters": 1,
        "captions only a file name": 1,
        "captions not of 2 to 10 characters": 2,
    }
    assert Filters(odd_captions=True).captions(["?", " "], lambda reason, example: None) == ["?"]


def test_sizes_and_fields() -> None:
    filters = Filters(
        min_side=10,
        max_pixels=1000,
        max_aspect=3,
        min_field=(("aesthetic", 5.0),),
        max_field=(("watermark", 0.8),),
        drop_value=(("NSFW", "NSFW"),),
    )
    for size, reason in {
        (9, 20): "smaller side below 10",
        (40, 10): "aspect ratio above 3",
        (40, 30): "more than 1000 pixels",
    }.items():
        with pytest.raises(Dropped) as dropped:
            filters.check_size(*size, "it")
        assert dropped.value.reason == reason
    filters.check_size(30, 10, "it")
    good = {"aesthetic": "5.0", "watermark": 0.8, "NSFW": "UNLIKELY"}
    filters.check_fields(good, "it")
    for change, reason in [
        ({"aesthetic": 4.9}, "aesthetic below 5"),
        ({"aesthetic": None}, "aesthetic missing"),
        ({"aesthetic": "nan"}, "aesthetic missing"),
        ({"watermark": 0.9}, "watermark above 0.8"),
        ({"watermark": [1]}, "watermark missing"),
        ({"NSFW": "nsfw"}, "NSFW is NSFW"),
        ({"NSFW": None}, "NSFW missing"),
    ]:
        with pytest.raises(Dropped) as dropped:
            filters.check_fields({**good, **change}, "it")
        assert dropped.value.reason == reason


def test_options_become_filters() -> None:
    parser = argparse.ArgumentParser()
    add_filter_options(parser)
    options = ["--min-field", "a=1", "b=2.5", "--drop-value", "NSFW=UNSURE", "--max-aspect", "2"]
    filters = filters_of(parser.parse_args(options))
    assert filters.describe() == {
        "max_aspect": 2.0,
        "min_field": (("a", 1.0), ("b", 2.5)),
        "drop_value": (("NSFW", "UNSURE"),),
    }
    assert filters_of(parser.parse_args([])).describe() == {}
    for wrong in (["--min-side", "0"], ["--max-pixels", "999999999"], ["--min-caption", "9", "--max-caption", "8"]):
        with pytest.raises(ValueError, match=wrong[-2] if "caption" in wrong[-1] else "--"):
            filters_of(parser.parse_args(wrong))
    with pytest.raises(SystemExit):
        parser.parse_args(["--min-field", "a"])
