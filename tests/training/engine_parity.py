"""Run under torchrun: the engine at each ZeRO stage against plain optimizers in one process.

A case is STAGE:PRECISION, or STAGE:PRECISION:WHAT. WHAT is muon; or adapter for training one alone; or divided for a
network for text at ZeRO-3 whose parameters are all divided, as large ones are (by default all of these are kept whole);
or grouped for a copy of the weights in groups of two ranks, with a network that has parts large enough to be divided.
"""

import copy
import json
import math
import sys
from unittest import mock

import torch
import torch.distributed as dist

from dico_t2i.config import AdapterConfig, ClusterConfig, DiCoConfig, OptimizerConfig, Span, TrainConfig
from dico_t2i.models import DiCo, add_adapter
from dico_t2i.training.engine import Engine
from dico_t2i.training.ranks.distributed import join_world, leave_world

MODEL = DiCoConfig(hidden_size=8, depths=(1, 1, 1, 1, 1), mlp_ratio=2.0, num_classes=10)
TEXT = DiCoConfig(
    **MODEL.model_dump(include={"hidden_size", "depths", "mlp_ratio"}),
    **{"condition": "text", "text_dim": 16, "pooled_text": False, "checkpoint_stages": ("encoder1", "decoder1")},
)
OPTIMIZER = OptimizerConfig(lr=1e-3, ema=(0.9,), clip=0.5, weight_decay=0.1)
BATCH, MICRO, STEPS = 8, 2, 4


def model(what):
    torch.manual_seed(0)
    configs = {"divided": TEXT, "grouped": MODEL.model_copy(update={"hidden_size": 64})}
    network = DiCo(configs.get(what, MODEL))
    if what == "adapter":
        add_adapter(network, AdapterConfig(rank=3, alpha=6))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def batch(step, what):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 4, 8, 8, generator=generator)
    if step == 2:
        x[5] = math.nan  # a step to be skipped
    t, y = (torch.randint(0, high, (BATCH,), generator=generator) for high in (1000, 10))
    return x, t, torch.randn(BATCH, 77, 16, generator=generator) if what == "divided" else y


def loss_of(network, x, t, y):
    return (network(x, t, y).float() - 1).square().mean()


def plain_optimizers(network, what):
    trained = [p for p in network.parameters() if p.requires_grad]
    if what != "muon":
        return [torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.1)]
    matrices = [layer.weight for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    others = [p for p in trained if all(p is not matrix for matrix in matrices)]
    muon = torch.optim.Muon(matrices, lr=1e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=1e-3, weight_decay=0.1)]


def reference(what):
    network = model(what)
    optimizers = plain_optimizers(network, what)
    ema = copy.deepcopy(network)
    for step in range(STEPS):
        network.zero_grad()
        # In parts, as the engine sums them: AdamW makes whole steps of gradients near zero, whose sign is rounding.
        for part in zip(*(tensor.split(MICRO) for tensor in batch(step, what)), strict=True):
            (loss_of(network, *part) * MICRO / BATCH).backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        if norm.isfinite():
            for optimizer in optimizers:
                optimizer.step()
            for average, parameter in zip(ema.parameters(), network.parameters(), strict=True):
                average.data.lerp_(parameter.data, 0.1)
    trained = [name for name, p in network.named_parameters() if p.requires_grad]
    weights, averages = dict(network.named_parameters()), dict(ema.named_parameters())
    return {name: weights[name] for name in trained}, {name: averages[name] for name in trained}


def engine_result(stage, precision, what, world):
    accumulation = BATCH // MICRO // world.size
    group = {"zero_group": 2} if what == "grouped" else {}
    train = TrainConfig(
        duration=Span(steps=STEPS),
        global_batch=BATCH,
        micro_batch=MICRO,
        precision=precision,
        zero_stage=stage,
        **group,
    )
    optimizer = OPTIMIZER.model_copy(update={"kind": what}) if what == "muon" else OPTIMIZER
    network = model(what)
    frozen = {name: p.detach().clone() for name, p in network.named_parameters() if not p.requires_grad}
    if what == "grouped":
        torch._foreach_mul_([p.data for p in network.parameters()], 2)
    keeps = {"stage3_param_persistence_threshold": 0} if what == "divided" else {}
    usual = Engine._zero
    with mock.patch.object(Engine, "_zero", lambda *arguments: usual(*arguments) | keeps):
        engine = Engine(network, train, optimizer, (MICRO, accumulation), world, ClusterConfig())
    engine.materialize(0)
    if what == "grouped":
        halve(engine)
    skipped = []
    for step in range(STEPS):
        x, t, y = batch(step, what)
        for part in range(accumulation):
            rows = slice(*(MICRO * (world.rank * accumulation + part + i) for i in (0, 1)))
            engine.backward(loss_of(engine.model, x[rows], t[rows], y[rows]))
            engine.step(1e-3)
        skipped.append(bool(engine.skipped))
    for name, value in engine.frozen():
        assert torch.equal(value.float(), frozen[name].to(value.dtype).float()), name
    owned = torch.tensor(sum(piece.numel for piece in engine.owned_pieces()))
    dist.all_reduce(owned)
    return dict(engine.gather("weight")), dict(engine.gather("ema_0.9")), skipped, owned.item(), engine.optimizer_steps


def halve(engine):
    """Change the weights as a resume does, before the first pass: no copy may keep those that the engine began with."""
    for piece in engine.pieces():
        for kind in ("weight", "ema_0.9"):
            piece.tensors[kind].mul_(0.5)
    engine.publish_weights()


def largest_difference(ours, expected):
    return max((ours[name] - expected[name].detach()).abs().max().item() for name in expected)


def main():
    torch.set_num_threads(1)
    world = join_world()
    results = []
    for case in sys.argv[1:]:
        stage, precision, *what = case.split(":")
        weights, averages = reference(*what or [""])
        ours, ema, skipped, owned, steps = engine_result(int(stage), precision, *what or [""], world)
        results.append(
            {
                "case": case,
                "weight": largest_difference(ours, weights),
                "ema": largest_difference(ema, averages),
                "skipped": skipped,
                "owned": owned,
                "trained": sum(weight.numel() for weight in weights.values()),
                "steps": steps,
            }
        )
    if world.is_main:
        print("RESULT", json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main()
