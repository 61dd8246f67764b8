"""What counts as a caption, and which of them an epoch trains on."""

import json
from collections import Counter
from itertools import islice

import pytest
import torch
from pydantic import ValidationError

from dico_t2i.config import DataConfig
from dico_t2i.data.batches import Wanted
from dico_t2i.data.choice import choose_captions
from dico_t2i.data.errors import SampleError
from dico_t2i.data.index import load_index
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import Order
from dico_t2i.data.sample import Caption, captions_in, captions_of, sourced_captions
from dico_t2i.data.writer import ShardWriter
from tests.shards import image_bytes

CAPTIONS = [Caption("a", "alt"), Caption("b", "alt"), Caption("the longest of them", "long"), Caption("c", "short")]


@pytest.mark.parametrize(
    ("value", "texts", "other"),
    [
        (None, [], []),
        ("a dog", ["a dog"], []),
        (["a dog", "a cat"], ["a dog", "a cat"], []),
        (["ok", None, 3], ["ok"], ["null", "a number"]),
        (float("nan"), [], ["null"]),
        ({"en": "a dog"}, [], ["an object"]),
        ([["a dog"], True, {}], [], ["a list", "a number", "an object"]),
        (7, [], ["a number"]),
    ],
)
def test_only_text_is_a_caption(value, texts, other):
    found, rest = captions_in(value)
    assert ([caption.text for caption in found], rest) == (texts, other)


@pytest.mark.parametrize(
    ("about", "txt", "captions"),
    [
        ({"captions": None}, b"a dog", ["a dog"]),
        ({"captions": []}, "Füße".encode("cp1252"), ["Füße"]),
        ({"captions": [None, " "]}, b"a dog", ["a dog"]),
        ({"captions": "a cat"}, b"a dog", ["a cat"]),
        ({"captions": ["a cat", None, 3]}, b"a dog", ["a cat"]),
        ({}, "Füße".encode("utf-32"), ["Füße"]),
    ],
)
def test_the_json_decides_and_else_the_text_beside_it(about, txt, captions):
    assert captions_of({"json": json.dumps(about).encode(), "txt": txt}) == captions


def test_a_sample_without_text_says_what_it_has():
    with pytest.raises(SampleError, match="captions cannot be read: found a number, an object"):
        captions_of({"json": b'{"captions": [1, {}]}'})


def test_sources_go_with_their_captions():
    about = {"captions": ["a", None, " ", "b"], "caption_sources": ["alt", "alt", "short", "long"]}
    assert sourced_captions({"json": json.dumps(about).encode()}) == [Caption("a", "alt"), Caption("b", "long")]
    about["caption_sources"] = ["alt"]  # of another length: it says nothing
    assert sourced_captions({"json": json.dumps(about).encode()}) == [Caption("a"), Caption("b")]


def data(**changes):
    return DataConfig(path="there", workers=0, **changes)


def chosen(count=4000, **changes):
    positions = torch.arange(count)
    numbers = choose_captions(data(**changes), 5, positions, [CAPTIONS] * count)
    return Counter(CAPTIONS[number] for number in numbers)


def test_the_first_and_the_longest_never_change():
    assert chosen(captions="first") == {CAPTIONS[0]: 4000}
    assert chosen(captions="longest") == {CAPTIONS[2]: 4000}


def test_random_takes_all_alike_and_weighted_goes_by_source():
    assert all(abs(n - 1000) < 150 for n in chosen().values())
    found = chosen(captions="weighted", caption_weights={"alt": 1, "long": 3, "short": 0})
    assert set(found) == set(CAPTIONS[:3])
    assert all(abs(found[caption] - 500) < 100 for caption in CAPTIONS[:2])  # they share the weight of their source
    assert abs(found[CAPTIONS[2]] - 3000) < 150


def test_a_source_without_a_weight_has_one_and_all_zero_is_uniform():
    found = chosen(captions="weighted", caption_weights={"alt": 0, "long": 1})
    assert abs(found[CAPTIONS[2]] - 2000) < 150
    assert abs(found[CAPTIONS[3]] - 2000) < 150
    zero = dict.fromkeys(("alt", "long", "short"), 0)
    assert all(abs(n - 1000) < 150 for n in chosen(captions="weighted", caption_weights=zero).values())


def test_weights_and_the_choice_go_together():
    for changes in ({"captions": "weighted"}, {"caption_weights": {"alt": 1}}):
        with pytest.raises(ValidationError, match=r"data\.caption_weights go together"):
            data(**changes)


@pytest.mark.parametrize("changes", [{}, {"captions": "weighted", "caption_weights": {"alt": 1, "long": 2}}])
def test_a_resumed_run_and_any_number_of_ranks_see_the_same_captions(tmp_path, changes):
    with ShardWriter(tmp_path, 16) as writer:
        for i in range(32):
            texts = [f"{i}: {caption.text}" for caption in CAPTIONS]
            about = {"captions": texts, "caption_sources": [caption.source for caption in CAPTIONS]}
            writer.write({"__key__": f"{i:03d}", "png": image_bytes(i, (8, 8), "PNG"), "json": about})
    index = load_index(tmp_path)
    config = DataConfig(path=str(tmp_path), image_size=8, streams=4, shuffle_block=4, workers=0, **changes)
    order = Order(3, index.samples, 4, 4)

    def captions(steps, rank=0, world=1, start_step=0):
        loader = make_loader(
            config, index, order, Share(8, 4, rank, world), Wanted("text"), seed=3, start_step=start_step
        )
        batches = islice(loader, steps * 2 // world)
        return {p: c for b in batches for p, c in zip(b.positions.tolist(), b.captions, strict=True)}

    whole = captions(12)  # three epochs
    assert captions(5, start_step=7) == {p: c for p, c in whole.items() if p >= 56}
    assert {**captions(12, 0, 2), **captions(12, 1, 2)} == whole
    assert len(set(whole.values())) > 45  # epochs differ
