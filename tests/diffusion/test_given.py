"""Sampling that begins with given latents: by strength, and with a mask, for every sampler."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dico_t2i.config import DiffusionConfig, SamplerConfig
from dico_t2i.diffusion import GivenLatents, sample

SHAPE = (2, 4, 4)
SAMPLERS = [
    *(("iddpm", kind) for kind in ("iddpm", "ddim", "dpm++")),
    *(("flow", kind) for kind in ("euler", "heun", "dpm++", "euler_sde")),
]


def network(x: Tensor, t: Tensor) -> Tensor:
    """Not linear, and not the same at all places."""
    place = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view(x.shape[1:])
    return (x + place).tanh() * (1 + (t.to(x.dtype) / 300).sin().view(-1, 1, 1, 1))


def noise(seed: int, count: int = 3) -> Tensor:
    return torch.randn(count, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(process: Any, kind: Any, given: GivenLatents | None, steps: int = 9, **options: Any) -> Tensor:
    config = DiffusionConfig(kind=process)
    sampler = SamplerConfig(kind=kind, steps=steps)
    return sample(config, sampler, network, noise(0), lambda k: noise(1 + k), False, given=given, **options)


@pytest.mark.parametrize(("process", "kind"), SAMPLERS)
def test_strength_1_without_a_mask_is_sampling_without_an_image(process: Any, kind: Any) -> None:
    given = GivenLatents(noise(90, 1))
    assert torch.equal(run(process, kind, given), run(process, kind, None))
    everywhere = GivenLatents(noise(90, 1), 1.0, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert torch.equal(run(process, kind, everywhere), run(process, kind, None))


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("process", "kind"), SAMPLERS)
def test_a_mask_keeps_what_is_outside_exactly(process: Any, kind: Any, strength: float) -> None:
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:3, 2:] = True
    clean = noise(90, 1)
    made = run(process, kind, GivenLatents(clean, strength, mask))
    anew = mask.expand(3, 2, 4, 4)
    assert torch.equal(made[~anew], clean.expand_as(made)[~anew])
    assert (made[anew] != clean.expand_as(made)[anew]).all()


@pytest.mark.parametrize(("process", "kind"), SAMPLERS)
def test_outside_of_a_mask_each_step_sees_the_image_with_that_steps_noise(process: Any, kind: Any) -> None:
    """The ratio of image to noise outside of the mask: of the schedule at the step's own timestep."""
    nothing = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    clean, seen = noise(90, 1), []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, float(t[0])))
        return network(x, t)

    config, sampler = DiffusionConfig(kind=process), SamplerConfig(kind=kind, steps=7)
    given = GivenLatents(clean, 1.0, nothing)
    made = sample(config, sampler, watched, noise(0), lambda k: noise(1 + k), False, given=given)
    assert torch.equal(made, clean.expand_as(made))
    if kind == "heun":
        seen = seen[::2]  # the others are inside a step
    for x, t in seen:
        signal, spread = levels(process, t)
        torch.testing.assert_close(x, signal * clean + spread * noise(0), rtol=0, atol=1e-6)


def levels(process: str, t: float) -> tuple[float, float]:
    """The factors of image and noise at a timestep: of the linear path, or of the linear schedule of 1,000 steps."""
    if process == "flow":
        return 1 - t / 1000, t / 1000
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[int(t)].item()
    return math.sqrt(kept), math.sqrt(1 - kept)


@pytest.mark.parametrize(("process", "kind"), SAMPLERS)
def test_less_strength_makes_fewer_steps_and_stays_nearer(process: Any, kind: Any) -> None:
    clean, distances, counts = noise(90, 1), [], []
    for strength in (0.2, 0.5, 0.8):
        done: list[tuple[int, int]] = []
        given = GivenLatents(clean, strength)
        made = run(process, kind, given, steps=19, progress=lambda k, n, done=done: done.append((k, n)))
        assert done == [(k + 1, len(done)) for k in range(len(done))]
        counts.append(len(done))
        distances.append((made - clean).square().mean().item())
    assert counts == sorted(set(counts))
    assert counts[-1] < 19
    assert distances == sorted(distances)


def test_the_strength_of_a_flow_counts_steps_whatever_the_shift() -> None:
    for shift in (1.0, 3.0):
        done: list[int] = []
        sampler = SamplerConfig(kind="euler", steps=10, shift=shift)
        given = GivenLatents(noise(90, 1), 0.5)
        progress = lambda k, n, done=done: done.append(n)  # noqa: E731
        sample(DiffusionConfig(kind="flow"), sampler, network, noise(0), noise, False, progress, given=given)
        assert done == [5] * 5


def test_a_hook_sees_what_the_mask_left() -> None:
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    clean = noise(90, 1)
    last = []
    run("flow", "euler", GivenLatents(clean, 1.0, mask), on_step=lambda k, t, x: last.append(x) or x)
    assert len(last) == 9
    assert torch.equal(last[-1], clean.expand(3, -1, -1, -1))


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    for process, kind in SAMPLERS:
        with pytest.raises(ValueError, match=r"strength: 0\.0005 leaves none of the"):
            run(process, kind, GivenLatents(noise(90, 1), 0.0005), steps=7)
