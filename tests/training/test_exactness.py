"""What keeps results exact and the same each time."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dico_t2i.config import load_config
from dico_t2i.training import parts
from dico_t2i.training.alignment import _weights
from dico_t2i.training.observers.groups import group_sums
from dico_t2i.training.observers.source_losses import SourceLosses

ROOT = Path(__file__).resolve().parents[2]


def test_sums_of_groups():
    values = torch.randn(50, 3, dtype=torch.float64)
    groups = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(6, 3, dtype=torch.float64).index_add_(0, groups, values)
    torch.testing.assert_close(group_sums(values, groups, 6), expected)


def test_a_loss_that_is_not_finite_stays_with_its_source():
    losses = SourceLosses(("a", "b"), torch.device("cpu"))
    losses.add(torch.tensor([1, 0, 1]), torch.tensor([2.0, float("nan"), 4.0]))
    losses.add(torch.tensor([1]), torch.tensor([3.0]))
    (nan, ones), (total, samples) = losses._sums.tolist()
    assert nan != nan
    assert (ones, total, samples) == (1, 9, 3)


def test_weights_of_resampling_are_made_once():
    made = [_weights(4, 7, torch.float32, torch.device("cpu")) for _ in range(2)]
    assert made[0] is made[1]


@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_is_what_the_config_says(monkeypatch, wanted):
    def stop(*_):
        raise NotImplementedError

    stage = SimpleNamespace(
        config=load_config(ROOT / "configs" / "quickstart.yaml", [f"train.tf32={str(wanted).lower()}"])
    )
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    monkeypatch.setattr(parts, "_input_maker", stop)
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = not wanted
    try:
        with pytest.raises(NotImplementedError):
            parts.build_parts([stage], [None], SimpleNamespace(run=None, world=None), None)
        assert matmul.allow_tf32 is cudnn.allow_tf32 is wanted
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
