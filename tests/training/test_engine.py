import json
from pathlib import Path

import pytest

from dico_t2i.config import DiCoConfig
from dico_t2i.models import count_parameters

from .conftest import launch

SCRIPT = Path(__file__).with_name("engine_parity.py")
PARAMETERS = count_parameters(DiCoConfig(hidden_size=8, depths=(1, 1, 1, 1, 1), mlp_ratio=2.0, num_classes=10))


def parity(ranks, *cases):
    process = launch(ranks, str(SCRIPT), *cases)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    line = next(line for line in output.splitlines() if line.startswith("RESULT"))
    return json.loads(line.removeprefix("RESULT"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_stage_trains_as_plain_adamw_and_skips_what_is_not_finite(ranks):
    for result in parity(ranks, "0:fp32", "1:fp32", "2:fp32", "3:fp32"):
        assert result["weight"] < 2e-6, result
        assert result["ema"] < 2e-6, result
        assert result["skipped"] == [False, False, True, False], result
        assert result["steps"] == 3, result
        assert result["owned"] == PARAMETERS, result


def test_weights_that_are_divided_are_there_where_other_modules_use_them():
    """Operators of a block take the weights of layers inside it, without calling these."""
    (result,) = parity(2, "3:fp32:divided")
    assert result["weight"] < 2e-5, result
    assert result["skipped"] == [False, False, True, False], result
    assert result["owned"] == result["trained"], result


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_copies_of_the_weights_in_groups_of_ranks_change_nothing(ranks):
    """The difference is that of stage 3 without copies, for this network 4e-5."""
    (result,) = parity(ranks, "3:fp32:grouped")
    assert result["weight"] < 6e-5, result
    assert result["ema"] < 2e-5, result
    assert result["owned"] == result["trained"], result


@pytest.mark.parametrize("ranks", [1, 2])
def test_muon_is_torchs_own_although_its_matrices_are_divided(ranks):
    """The steps are 1e-3; orthogonalizing in bf16 turns the rounding of gradients into differences of this size."""
    for result in parity(ranks, "0:fp32:muon", "1:fp32:muon", "2:fp32:muon"):
        assert result["weight"] < 4e-4, result
        assert result["ema"] < 4e-5, result
        assert result["skipped"] == [False, False, True, False], result
        assert result["steps"] == 3, result
        assert result["owned"] == result["trained"], result


def test_an_adapter_is_trained_at_every_stage_and_nothing_else(long):
    cases = [*(f"{stage}:fp32:adapter" for stage in range(4)), "1:bf16:adapter", "3:bf16:adapter"]
    for result in parity(2, *(cases if long else cases[::5])):
        assert result["weight"] < (2e-5 if "fp32" in result["case"] else 8e-3), result
        assert result["owned"] == result["trained"], result
        assert result["skipped"] == [False, False, True, False], result


def test_bf16_follows_within_its_precision(long):
    for result in parity(2, "0:bf16", "1:bf16", *(["2:bf16", "3:bf16"] if long else [])):
        assert result["weight"] < 8e-3, result
        assert result["skipped"] == [False, False, True, False], result
