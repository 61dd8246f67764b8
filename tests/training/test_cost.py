"""What a step costs, as the metrics tell it."""

import pytest
import torch

from dico_t2i.config import DiCoConfig, parse_config
from dico_t2i.models import count_macs, count_parameters
from dico_t2i.plan.cost import StepCost, product_rate, step_cost
from dico_t2i.training.observers.memory_report import memory_report

MODEL = {"hidden_size": 16, "depths": [1, 1, 1, 1, 1], "mlp_ratio": 2, "num_classes": 10}
CPU = torch.device("cpu")


def config(**model):
    train = {"duration": {"steps": 1}, "global_batch": 16, "micro_batch": 4, "precision": "fp32", "zero_stage": 1}
    data = {"path": "nowhere", "image_size": 128, "streams": 4}
    return parse_config({"name": "x", "model": {**MODEL, **model}, "data": data, "train": train}, "test")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_is_told_its_share_of_the_batch(ranks):
    parameters = count_parameters(DiCoConfig(**MODEL))
    cost = step_cost(config(), ranks, parameters)
    macs = count_macs(DiCoConfig(**MODEL), (16 // ranks, 4, 16, 16))
    assert 2.8 < cost.flops / (2 * macs) < 3.1  # forward, and twice as much backward, less the input's gradient
    alone = step_cost(config(), 1, parameters)
    assert alone.flops == ranks * cost.flops
    assert alone.traffic == ranks * cost.traffic


def test_what_is_recomputed_is_not_useful_but_is_read_and_written():
    keeping, recomputing = (step_cost(config(**k), 1, 1) for k in ({}, {"checkpoint_stages": ["encoder1"]}))
    assert recomputing.flops == keeping.flops
    assert recomputing.traffic > keeping.traffic


def test_rates():
    rates = StepCost(flops=3e9, traffic=8e9).rates(0.5, peak=1e10)
    assert rates == {"flops_utilization": 0.6, "flops_per_s": 6e9, "bytes_per_s": 1.6e10}
    assert product_rate(CPU, torch.float32) > 1e8


def test_memory_by_part_beside_what_was_expected():
    held = {"weights": 1e9, "moments": 2e9}
    text = memory_report(held, 5e9, {"weights": 1.1e9, "moments": 2e9, "the rest": 1e9})
    assert text.startswith(
        "weights 1.00 GB (1.10), moments 2.00 GB (2.00), the rest 2.00 GB (1.00); all 5.00 GB (4.10)"
    )
    assert memory_report(held, 5e9, None) == "weights 1.00 GB, moments 2.00 GB, the rest 2.00 GB; all 5.00 GB"
