import numpy as np
import pytest
import torch

from dico_t2i import randomness


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x32-10 as published, in Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def test_reference_gives_the_published_vector():
    assert philox((0, 0), (0, 0, 0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("index", [0, 5, 2**32 - 1, 2**40 + 3])
@pytest.mark.parametrize("seed", [0, 7, 2**33 + 1])
def test_words_are_philox_with_seed_as_key(seed, index):
    import zlib

    got = randomness.words(seed, "noise", torch.tensor([index]), 10)[0].tolist()
    tag = zlib.crc32(b"noise")
    key = (seed % 2**32, seed >> 32)
    expected = [w for block in range(3) for w in philox(key, (block, tag, index % 2**32, index >> 32))]
    assert got == expected[:10]


def test_a_sample_does_not_depend_on_its_batch():
    alone = randomness.normal(3, "noise", torch.tensor([41]), (4, 8, 8))
    together = randomness.normal(3, "noise", torch.arange(40, 44), (4, 8, 8))
    assert torch.equal(alone[0], together[1])


def test_moments():
    index = torch.arange(20000)
    normal = randomness.normal(1, "noise", index, (3,)).double()
    assert abs(normal.mean()) < 0.02
    assert abs(normal.std() - 1) < 0.01
    assert abs((normal**4).mean() - 3) < 0.1
    assert abs(torch.corrcoef(normal.T) - torch.eye(3)).max() < 0.03
    counts = randomness.integers(1, "t", index, 10).bincount()
    assert (counts - 2000).abs().max() < 250
    uniform = randomness.uniform(1, "u", index)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01


def test_purposes_and_seeds_are_independent():
    index = torch.arange(5000)
    a, b = randomness.normal(1, "a", index), randomness.normal(1, "b", index)
    c = randomness.normal(2, "a", index)
    assert abs(torch.corrcoef(torch.stack((a, b, c))) - torch.eye(3)).max() < 0.06


def test_permutation_is_one_and_changes_with_the_index():
    first = randomness.permutation(0, "epoch", 0, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert not np.array_equal(first, randomness.permutation(0, "epoch", 1, 1000))
    assert np.array_equal(first, randomness.permutation(0, "epoch", 0, 1000))
