import json
from itertools import islice

import numpy as np
import pytest
from test_loader import BATCH, SAMPLES, STREAMS, build, loader, make_sample, rows, steps

from dico_t2i.data.errors import DataError
from dico_t2i.data.index import load_index
from dico_t2i.data.order import Order


@pytest.fixture
def index(tmp_path):
    return build(tmp_path / "set", map(make_sample, range(SAMPLES)))


def quarantine(index, *entries):
    lines = [json.dumps({"shard": f"shard-{shard:06d}.tar", "key": key, "reason": "test"}) for shard, key in entries]
    (index.root / "quarantine.jsonl").write_text("\n".join(lines) + "\n")
    return load_index(index.root)


def test_samples_in_quarantine_are_replaced_by_their_neighbours_and_not_bad(index):
    before = steps(index, SAMPLES // BATCH)
    listed = quarantine(index, (0, "0003"), (2, "0015"), (2, "0016"))
    assert listed.quarantined == 3
    found = list(islice(loader(listed), SAMPLES // 2))
    after = rows(found)
    assert not any(batch.bad for batch in found)
    out = {"0003", "0015", "0016"}
    replaced = {p for p, (key, *_) in rows(islice(loader(index), SAMPLES // 2)).items() if key in out}
    assert len(replaced) == sum(batch.quarantined for batch in found) == 3
    order = Order(3, index.samples, STREAMS, 5)
    for position, row in after.items():
        assert row[0] not in out
        if position not in replaced:
            assert before.get(position, row) == row
            continue
        attempt = 1
        while True:
            shard, member = order.locate(np.array([order.successor(position, attempt)]))
            number = int(shard[0]) * 7 + int(member[0])
            if f"{number:04d}" not in out:
                break
            attempt += 1
        assert int(row[0]) == number


def test_ranks_and_workers_see_the_same(index):
    listed = quarantine(index, (1, None), (0, "0000"), (99, "unknown"))
    assert listed.quarantined == 8
    expected = steps(listed, 14)
    assert not {int(key) // 7 for key, *_ in expected.values()} & {1}
    for options in ({"world": 2}, {"world": 4, "micro_batch": 1}, {"workers": 2}):
        assert steps(listed, 14, **options) == expected


def test_a_shard_in_quarantine_is_not_opened(index):
    listed = quarantine(index, (1, None))
    listed.path(1).unlink()
    found = list(islice(loader(listed), SAMPLES // 2))
    assert not any(batch.bad for batch in found)
    assert sum(batch.quarantined for batch in found) == 7


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"shard": 3, "key": null}', '{"shard": "a.tar"}', '{"shard": "a", "key": 1}']
)
def test_a_line_that_is_no_entry_is_told(index, line):
    (index.root / "quarantine.jsonl").write_text(f'{{"shard": "a.tar", "key": null}}\n\n{line}\n')
    with pytest.raises(DataError, match=r"quarantine\.jsonl: line 3: expected"):
        load_index(index.root)


def test_all_in_quarantine_stops_with_a_message(index):
    listed = quarantine(index, *((shard, None) for shard in range(9)))
    with pytest.raises(DataError, match=r"more than 100 bad samples in a row, .*quarantine"):
        next(iter(loader(listed)))
