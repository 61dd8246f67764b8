"""Bytes that a training step keeps for the backward pass and moves, by operator: pinned, so that a rise is noticed."""

import math
from collections import Counter
from pathlib import Path

import pytest

from dico_t2i.config import load_config
from dico_t2i.plan.cost import traced_pass
from dico_t2i.plan.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BATCH = 4


def on_one_gpu(name, batch, *changes):
    sizes = [f"train.micro_batch={batch}", f"train.global_batch={batch}", f"data.streams={batch}"]
    place = ["cluster.nodes=1", "cluster.gpus_per_node=1", "train.zero_stage=1"]
    return load_config(CONFIGS / f"{name}.yaml", [*sizes, *place, *changes])


def counted(name):
    """MB an image: kept, by the operator that made it, and moved, by operator; weights are read once a micro-batch."""
    traced = traced_pass(on_one_gpu(name, BATCH), BATCH)
    moved = Counter()
    for call, traffic in zip(traced.calls, traced.traffic, strict=True):
        moved[call.operator] += traffic
    return {operator: size / BATCH / 1e6 for operator, size in traced.kept.items()}, {
        operator: size / BATCH / 1e6 for operator, size in moved.items()
    }


# MB an image in bf16: kept, moved.
TOTALS = {
    "dico_s_imagenet256": (36.01, 399.9),
    "dico_s_t2i": (42.71, 494.1),
    "dico_xl_imagenet256": (238.85, 3438.5),
    "dico_xl_t2i": (285.15, 4137.1),
    "dico_h_imagenet256": (442.83, 5852.4),
    "dico_h_t2i": (508.03, 6822.3),
}
# Of the operators that keep more than 1 MB and move more than 50 MB.
KEPT = {
    "dico_xl_imagenet256": {
        "aten::addmm": 74.64,
        "dico_t2i::linear_gelu": 61.34,
        "dico_t2i::scale": 34.93,
        "dico_t2i::depthwise": 30.76,
        "dico_t2i::gate_linear": 30.67,
        "aten::cat": 2.56,
        "dico_t2i::norm_modulate": 1.90,
    },
    "dico_xl_t2i": {
        "aten::addmm": 87.84,
        "dico_t2i::linear_gelu": 61.34,
        "dico_t2i::scale": 34.93,
        "dico_t2i::text_dwconv": 32.80,
        "dico_t2i::depthwise": 30.76,
        "dico_t2i::gate_linear": 30.67,
        "aten::cat": 2.56,
        "dico_t2i::norm_modulate": 2.09,
    },
}
MOVED = {
    "dico_xl_imagenet256": {
        "aten::mm": 1113.9,
        "aten::addmm": 465.5,
        "dico_t2i::norm_modulate_backward": 400.1,
        "dico_t2i::gelu_linear_backward": 235.0,
        "dico_t2i::linear_gelu": 173.6,
        "dico_t2i::gate_linear_backward": 132.9,
        "dico_t2i::residual_norm_modulate": 131.6,
        "dico_t2i::scale_backward": 105.3,
        "dico_t2i::scale": 102.8,
        "aten::copy_": 99.4,  # mostly weights of 3x3 convolutions, as are the next ones: a fourth of them an image
        "dico_t2i::depthwise_backward": 99.0,
        "aten::convolution_backward": 76.3,
        "dico_t2i::gate_linear": 71.5,
        "dico_t2i::norm_modulate": 69.4,
        "dico_t2i::depthwise": 65.9,
    },
    "dico_xl_t2i": {
        "aten::mm": 1199.6,
        "dico_t2i::norm_modulate_backward": 564.3,
        "aten::addmm": 532.3,
        "dico_t2i::gelu_linear_backward": 261.3,
        "dico_t2i::linear_gelu": 173.6,
        "dico_t2i::text_dwconv_backward": 151.0,
        "dico_t2i::norm_modulate": 135.3,
        "dico_t2i::gate_linear_backward": 132.9,
        "dico_t2i::residual_norm_modulate": 131.5,
        "dico_t2i::scale_backward": 105.3,
        "dico_t2i::text_dwconv": 105.0,
        "dico_t2i::scale": 102.8,
        "aten::copy_": 99.4,
        "dico_t2i::depthwise_backward": 99.0,
        "aten::convolution_backward": 76.3,
        "dico_t2i::gate_linear": 71.5,
        "dico_t2i::depthwise": 65.9,
    },
}


@pytest.mark.parametrize("name", TOTALS)
def test_what_a_step_keeps_and_moves(name):
    kept, moved = counted(name)
    assert (sum(kept.values()), sum(moved.values())) == pytest.approx(TOTALS[name], rel=2e-3)
    if name in KEPT:
        assert {operator: size for operator, size in kept.items() if size > 1} == pytest.approx(KEPT[name], rel=5e-3)
        assert {operator: size for operator, size in moved.items() if size > 50} == pytest.approx(MOVED[name], rel=2e-3)


@pytest.mark.parametrize("name", ["dico_xl_t2i", pytest.param("dico_xl_imagenet256", marks=pytest.mark.long)])
def test_xl_at_batch_256_fits_on_one_card(name):
    """An H200, with room to spare and nothing computed again."""
    estimate = make_plan(on_one_gpu(name, 256, "cluster.hardware={name: H200, memory_gb: 141}")).estimate
    assert estimate.fits
    assert estimate.memory.total < 0.8 * 141e9


def beside_a_product(call):
    """Bytes in bf16 of an operator that is a product, without those that the product alone would move."""
    x, weight = math.prod(call.shapes[0]), call.shapes[1]
    match call.operator.removeprefix("dico_t2i::"):
        case "gelu_linear_backward" | "gate_linear_backward":  # reads x and writes what the forward pass made of it
            return 4 * x
        case "linear_gelu":  # writes GELU of the result, too
            return 2 * x // weight[1] * weight[0]
    return 0


@pytest.mark.long
def test_bytes_outside_products_of_a_step_of_xl():
    traced = traced_pass(on_one_gpu("dico_xl_imagenet256", 256), 256)
    total = sum(
        beside_a_product(call) if products else traffic
        for call, products, traffic in zip(traced.calls, traced.products, traced.traffic, strict=True)
    )
    assert total == pytest.approx(326e9, rel=2e-3)
