"""The benchmark on networks small enough for a test: what it counts, what it times, what it writes."""

import json

import pytest
import torch

from dico_t2i.config.networks import DIM_VARIANTS, DIS_VARIANTS
from dico_t2i.models import DiCo, DiCoConfig, Network, count_macs, count_parameters
from dico_t2i.plan.cost import product_rate
from evals import growth, throughput
from evals.speed.measure import Contender, compare
from evals.speed.networks import Setting, contender, network_of, samplers, text_convolutions
from evals.speed.tables import Goal

CPU = torch.device("cpu")
SIZES = {"hidden_size": 8, "depths": (1, 1, 1, 1, 1), "mlp_ratio": 2.0}
SMALL = {
    "class": DiCoConfig(**SIZES),
    "text": DiCoConfig(**SIZES, condition="text", text_dim=16),
}


def setting(condition: str) -> Setting:
    return Setting(SMALL[condition], batch=2, size=20, device=CPU)  # on smaller latents ours leaves out taps


@pytest.mark.parametrize("condition", SMALL)
def test_ours_and_plain_do_the_same_work(condition):
    shared = setting(condition)
    for work in ("step", "pass"):
        ours, plain = (contender(kind, shared, work) for kind in ("ours", "plain"))
        results = compare([ours, plain], 2, CPU)
        assert [len(result.seconds) for result in results] == [2, 2]
        assert ours.held == plain.held > 0
        assert abs(ours.cost.flops / plain.cost.flops - 1) < 1e-6
        assert all(result.operators and result.peak_memory > ours.held for result in results)
    step, forward = (contender("ours", shared, work).cost.flops for work in ("step", "pass"))
    assert forward == 2 * count_macs(shared.config, shared.x.shape)
    assert 2.8 < step / forward < 3.1


def test_a_step_trains():
    for kind in ("ours", "plain"):
        step = contender(kind, setting("text"), "step").run
        losses = [step().item() for _ in range(8)]
        assert losses[-1] < losses[0]


@pytest.mark.long
def test_networks_by_name_beside_what_was_published(tmp_path, capsys):
    """6.06 GMACs of a pass with DiT-S/2; DiG is published only."""
    arguments = ["--networks", "DiCo-S", "DiT-S/2", "--batch", "1", "--rounds", "1", "--device", "cpu"]
    assert throughput.main([*arguments, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "throughput.json").read_text())
    one_pass, step = written["cases"]
    assert [result["name"] for result in one_pass["results"]] == ["DiCo-S", "DiT-S/2"]
    dit = one_pass["results"][1]["cost"]["flops"]
    assert abs(dit / 2 / 6.06e9 - 1) < 0.01
    assert 2.8 < step["results"][1]["cost"]["flops"] / dit < 3.1
    text = (tmp_path / "table.md").read_text()
    assert "Published, not measured here" in text
    assert "| DiG-S/2 | 256 | 4.30 | 961.24 | 62.06 |" in text
    assert "DiG-S/2" in capsys.readouterr().out


def test_networks_of_text_and_of_classes_do_not_compete():
    assert isinstance(network_of("U-ViT-S/2", setting("text")), Network)
    with pytest.raises(ValueError, match=r"DiT-S/2: it does not support condition text"):
        throughput.by_name(["U-ViT-S/2", "DiT-S/2"], 1)
    with pytest.raises(ValueError, match=r"DiT-S: not one of DiCo-S, .*DiT-S/2"):
        throughput.by_name(["DiT-S"], 1)


def test_sampling_with_kernels_once_gives_the_same_latents():
    ours, again, plain = samplers(setting("text"), steps=3, guidance=2.0)
    assert torch.equal(ours.run(), again.run())
    assert isinstance(network_of("ours", setting("text")), DiCo)
    assert plain.run().shape == (2, 4, 20, 20)


def test_the_text_convolution_alone():
    ours, plain = text_convolutions((2, 3, 5), CPU)
    assert ours.cost.flops == 3 * 2 * 81 * 2 * 3 * 25
    for a, b in zip(ours.run(), plain.run(), strict=True):
        assert a.shape == b.shape
    assert product_rate(CPU, torch.float32) > 1e8


def test_ours_is_compared_round_by_round_and_everything_is_written(monkeypatch, tmp_path, capsys):
    def contenders(device):
        shared = setting("class")
        return [contender(kind, shared, "pass") for kind in ("ours", "plain")]

    case = throughput.Case("a small pass", contenders, Goal({"plain": 1e-9}, images_per_s=1e12))
    monkeypatch.setattr(throughput, "QUICK", {"small-pass": case})
    assert throughput.main(["--preset", "small", "--device", "cpu", "--profile", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "throughput.json").read_text())
    ours, plain = written["cases"][0]["results"]
    assert len(ours["seconds"]) == 3
    assert plain["times_ours"] > 0
    assert ours["images_per_s"] == pytest.approx(2 / ours["median_s"])
    table = (tmp_path / "table.md").read_text()
    assert "1e-09x: reached" in table
    assert "1,000,000,000,000 images/s: not reached" in table
    assert "Largest operators, a small pass" in table
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert "images/s" in capsys.readouterr().out


def test_warming_up_is_not_timed():
    calls = []
    (result,) = compare([Contender("ours", lambda: calls.append(0), 1)], 3, CPU, profiled=False)
    assert (len(calls), len(result.seconds)) == (4, 3)


def test_a_preset_that_is_not_there():
    with pytest.raises(ValueError, match="s-class-step"):
        throughput.main(["--preset", "h-1000", "--device", "cpu"])


def test_all_goals_of_the_issue_have_a_case():
    assert count_parameters(DiCoConfig(variant="DiCo-S")) > 0
    wanted = ("xl-64", "xl-256", "h-32", "h-128", "xl-text", "xl-pass", "s-sampling", "text-dwconv-416")
    assert set(wanted) <= set(throughput.GPU)


def test_growth_compares_networks_at_several_sizes(monkeypatch, tmp_path, capsys):
    sizes = {"hidden_size": 16, "depth": 2, "patch_size": 2}
    monkeypatch.setitem(DIS_VARIANTS, "DiS-tiny", sizes)
    monkeypatch.setitem(DIM_VARIANTS, "DiM-tiny", {**sizes, "depth": 3})
    arguments = ["--networks", "DiS-tiny", "DiM-tiny", "--sizes", "4", "8", "--batch", "1", "--rounds", "1"]
    assert growth.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert [(row["network"], row["work"], row["size"]) for row in rows[:3]] == [
        ("DiS-tiny", "pass", 4),
        ("DiM-tiny", "pass", 4),
        ("DiS-tiny", "step", 4),
    ]
    assert all(row["faster"] == 1 for row in rows if row["network"] == "DiS-tiny")
    assert 2.9 < rows[2]["gmacs"] / rows[0]["gmacs"] < 3.1
    assert (tmp_path / "growth.png").stat().st_size > 1000
    assert "| 8x8 | training step | DiM-tiny |" in capsys.readouterr().out
