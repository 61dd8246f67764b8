from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_loader import make_sample, tokenize

from dico_t2i.config import DataConfig
from dico_t2i.data.batches import Wanted
from dico_t2i.data.errors import DataError
from dico_t2i.data.loader import Share, make_loader
from dico_t2i.data.order import MixtureOrder, Order
from dico_t2i.data.sources import load_data, make_order
from dico_t2i.data.writer import ShardWriter

STREAMS, BATCH = 4, 8
WEIGHTS = {"a": 3, "b": 1, "c": 0.5}
SAMPLES = {"a": 40, "b": 50, "c": 30}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for number, (name, count) in enumerate(SAMPLES.items()):
        with ShardWriter(root / name, samples_per_shard=7) as writer:
            for i in range(count):
                writer.write(make_sample(i, __key__=f"{name}{i:03d}", json={"captions": [f"{number}:{i}"]}))
    return root


def config(folders, **changes):
    mixture = [{"path": str(folders / name), "name": name, "weight": weight} for name, weight in WEIGHTS.items()]
    return DataConfig(
        **{"mixture": mixture, "image_size": 8, "streams": STREAMS, "shuffle_block": 5, "workers": 0, **changes}
    )


def batches(data, count, world=1, rank=0, start_step=0, micro_batch=2):
    index = load_data(data)
    order = make_order(data, index, 3, BATCH)
    found = make_loader(
        data,
        index,
        order,
        Share(BATCH, micro_batch, rank, world),
        Wanted("text", tokenize=tokenize),
        seed=3,
        start_step=start_step,
    )
    return list(islice(found, count * BATCH // world // micro_batch))


def rows(found):
    return {
        position: (key, caption, source)
        for batch in found
        for position, key, caption, source in zip(
            batch.positions.tolist(), batch.keys, batch.captions, batch.sources.tolist(), strict=True
        )
    }


@pytest.mark.parametrize("world", [2, 4])
def test_any_world_size_and_start_gives_the_same_batches(folders, world):
    data = config(folders)
    expected = rows(batches(data, 40))
    found = {}
    for rank in range(world):
        found |= rows(batches(data, 33, world, rank, start_step=7, micro_batch=1))
    assert found == {p: row for p, row in expected.items() if p >= 7 * BATCH}
    assert all("abc"[source] == key[0] and int(caption[0]) == source for key, caption, source in expected.values())


def test_each_source_goes_through_its_own_epochs(folders):
    found = rows(batches(config(folders), 60))
    for name, count in SAMPLES.items():
        keys = [key for _, (key, *_) in sorted(found.items()) if key[0] == name]
        seen = {key: keys.count(key) for key in keys}
        epochs = len(keys) / count
        assert len(seen) >= min(count, len(keys)) - STREAMS
        assert max(seen.values()) <= np.ceil(epochs) + 1


def test_weights_are_exact_over_blocks(folders):
    data = config(folders)
    order = make_order(data, load_data(data), 3, BATCH)
    assert isinstance(order, MixtureOrder)
    assert order.block >= 256
    assert order.per_block.tolist() == [6 * order.block // 9, 2 * order.block // 9, order.block // 9]
    positions = np.arange(3 * order.block * STREAMS)
    sources = order.sources(positions).reshape(3, order.block, STREAMS)
    for block in range(3):
        for stream in range(STREAMS):
            counts = np.bincount(sources[block, :, stream])
            assert counts.tolist() == order.per_block.tolist()
    assert not np.array_equal(sources[0], sources[1])
    assert not np.array_equal(sources[0, :, 0], sources[0, :, 1])


@settings(max_examples=20, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1, 2, 3, 0.1, 0.25, 7]), min_size=1, max_size=4),
    entries=st.integers(1, 900),
    seed=st.integers(0, 2**40),
)
def test_counts_are_those_of_the_positions(weights, entries, seed):
    orders = [Order(seed, [200 + i], 2, 64, f" of {i}") for i in range(len(weights))]
    order = MixtureOrder(seed, orders, np.arange(len(weights)).tolist(), weights)
    found = np.bincount(order.sources(np.arange(entries * 2)), minlength=len(weights))
    assert order.counts(entries * 2).tolist() == found.tolist()
    shard, member = order.locate(np.arange(entries * 2))
    assert np.array_equal(shard, order.sources(np.arange(entries * 2)))
    whole = entries // order.block
    for number, share in enumerate(order.per_block.tolist() if whole else ()):
        own = orders[number].locate(np.arange(whole * 2 * share))[1]  # used one after the other, none left out
        assert sorted(member[shard == number][: len(own)]) == sorted(own)


def test_replacements_come_from_the_same_source(folders, tmp_path):
    with ShardWriter(tmp_path / "bad", samples_per_shard=7) as writer:
        for i in range(40):
            writer.write(make_sample(i, __key__=f"d{i:03d}", **({"png": b"x"} if i % 4 == 0 else {})))
    mixture = [{"path": str(folders / "a"), "name": "a"}, {"path": str(tmp_path / "bad"), "name": "d", "weight": 2}]
    found = batches(config(folders, mixture=mixture), 30)
    bad = [entry for batch in found for entry in batch.bad]
    assert bad
    assert all(entry.shard.startswith("d/shard-") for entry in bad)
    for batch in found:
        assert ["ad"[source] for source in batch.sources.tolist()] == [key[0] for key in batch.keys]


def test_a_quarantine_holds_for_its_source(folders, tmp_path):
    for name in "xy":
        with ShardWriter(tmp_path / name, samples_per_shard=7) as writer:
            for i in range(40):
                writer.write(make_sample(i, __key__=f"{name}{i:03d}"))
    (tmp_path / "y" / "quarantine.jsonl").write_text('{"shard": "shard-000001.tar", "key": "y008", "reason": "r"}\n')
    data = config(folders, mixture=[{"path": str(tmp_path / name), "name": name} for name in "xy"])
    found = batches(data, 40)
    keys = {key for batch in found for key in batch.keys}
    assert "y008" not in keys
    assert "x008" in keys
    assert sum(batch.quarantined for batch in found) > 0
    assert load_data(data).quarantined == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": []}, "give either data.path, or data.mixture"),
        ({"path": "x"}, "give either data.path, or data.mixture"),
        ({"mixture": [{"path": "x", "name": "n"}, {"path": "y", "name": "n"}]}, "give them different names"),
        ({"mixture": [{"path": "x", "name": "n", "weight": 0}]}, "greater than 0"),
        ({"mixture": [{"path": "x", "name": "a b"}]}, "pattern"),
        ({"mixture": [{"path": "http://x/y", "name": "n"}]}, "data.cache"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(folders, changes, message):
    with pytest.raises(ValidationError, match=message):
        config(folders, **changes)


def test_sources_that_do_not_fit_are_refused(folders, tmp_path):
    meta = {"latent_channels": 4, "latent_size": 1, "image_size": 8, "crop": "center", "mirrored": False}
    for name, more in (("l", {}), ("m", {"autoencoder": {"kind": "kl", "weights": "1"}}), ("n", {"latent_size": 2})):
        with ShardWriter(tmp_path / name, 7, "latents", {**meta, **more}) as writer:
            for i in range(9):
                writer.write({"__key__": f"{i}", "moments.npy": np.zeros((8, 1, 1), np.float16), "txt": "1:1"})

    def mix(*paths):
        return config(folders, mixture=[{"path": str(path), "name": path.name} for path in paths])

    for second, word in (("m", "autoencoder is"), ("n", "latent_size is")):
        with pytest.raises(DataError, match=f"l and {second} cannot be mixed: {word}"):
            load_data(mix(tmp_path / "l", tmp_path / second))
    with pytest.raises(DataError, match="a and l cannot be mixed: kind is 'images'"):
        load_data(mix(folders / "a", tmp_path / "l"))
    data = config(folders, streams=40)
    with pytest.raises(DataError, match=r"data\.mixture: c: 30 samples"):
        make_order(data, load_data(data), 0, 40)
    with pytest.raises(DataError, match="use rounder numbers"):
        MixtureOrder(0, [Order(0, [9], 1, 1)] * 2, [0, 1], [0.1234567, 1])
