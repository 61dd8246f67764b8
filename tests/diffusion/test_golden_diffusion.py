"""The published numbers of the original implementation, read from ../shared/golden."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dico_t2i.diffusion import IDDPM

TESTS = Path(__file__).resolve().parents[1]
GOLDEN = TESTS.parents[1] / "shared" / "golden"
FILES = sorted(GOLDEN.glob("diffusion_*.npz"))

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden numbers at {GOLDEN}")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    with np.load(request.param, allow_pickle=False) as arrays:
        return dict(arrays)


def process_of(golden: dict[str, np.ndarray]) -> IDDPM:
    kwargs = json.loads(str(golden["kwargs_json"]))
    return IDDPM(respacing=kwargs.pop("timestep_respacing"), **kwargs)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def test_float32_losses(golden: dict[str, np.ndarray]) -> None:
    diffusion = process_of(golden)
    x, noise, output = (tensor(golden[k]).float() for k in ("x_start", "noise", "model_out"))
    losses = diffusion.training_losses(lambda x, t: output, x, tensor(golden["t"]), noise)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        np.testing.assert_allclose(loss, golden[f"{name}__f32"], rtol=1e-4, atol=1e-6)
    x_t = diffusion.q_sample(x, tensor(golden["t"]), noise)
    np.testing.assert_allclose(x_t, golden["x_t__f32"], rtol=2e-5, atol=2e-6)


def test_posterior_and_reversed_ddim(golden: dict[str, np.ndarray]) -> None:
    diffusion = process_of(golden)
    t, x_start, x_t, output = (tensor(golden[k]) for k in ("t", "x_start", "x_t", "model_out"))
    mean = diffusion.q_posterior_mean(x_start, x_t, t)
    np.testing.assert_allclose(mean, golden["q_posterior_mean"], rtol=1e-9)
    reverse = diffusion.ddim_reverse(lambda x, t: output, x_t, t)
    np.testing.assert_allclose(reverse, golden["ddim_reverse_clip0"], rtol=1e-9, atol=1e-9)
