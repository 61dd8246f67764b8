"""Traced on the meta device, held against counts by hand, autograd's own hooks, and torch's autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dico_t2i.models import STAGES, DiCo, DiCoConfig, count_macs
from dico_t2i.plan.trace import trace_training

SMALL = {"hidden_size": 32, "depths": (1, 1, 1, 1, 1), "mlp_ratio": 2.0}
TEXT = {**SMALL, "condition": "text", "text_dim": 16}
CROSS = {**TEXT, "text_fusion": "cross_attention"}
CASES = pytest.mark.parametrize("options", [SMALL, TEXT, CROSS], ids=["class", "dwc", "cross_attention"])


def inputs(config, batch, dtype=torch.float32):
    """Noisy latents of 32x32, timesteps, and labels or text tokens, on the default device."""
    cond = torch.zeros(batch, dtype=torch.int64)
    if config.condition == "text":
        cond = torch.zeros(batch, config.text_tokens, config.text_dim, dtype=dtype)
    return torch.zeros(batch, 4, 32, 32), torch.zeros(batch), cond


def traced(options, batch=4, dtype=torch.float32, **more):
    config = DiCoConfig(**options)

    def loss():
        with torch.device("meta"):
            return network(*inputs(config, batch, dtype)).float().mean()

    with torch.device("meta"):
        network = DiCo(config).to(dtype).train()
    return trace_training(network, loss, **more)


def kept_for_backward(network, arguments):
    """Bytes of what autograd saves in a forward pass, without parameters."""
    own = {id(p.untyped_storage()) for p in network.parameters()}
    kept = {}

    def pack(tensor):
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(*arguments)
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
    assert out.requires_grad  # what was kept is there until here
    return total


class Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [SMALL, TEXT], ids=["class", "dwc"])
def test_operations_are_those_of_a_real_device(options):
    """Among them copies to other layouts, which the meta device makes where others do not."""
    config = DiCoConfig(**options)
    network = DiCo(config)
    with Counter() as counter:
        network(*inputs(config, 4)).float().mean()
    assert traced(options).forward == counter.count


def test_one_layer_counted_by_hand():
    """(8, 4) x (4, 6), then a sum: of a pass forward and backward for the weight."""
    with torch.device("meta"):
        layer, x = nn.Linear(4, 6, bias=False), torch.empty(8, 4)
    done = trace_training(layer, lambda: layer(x).sum())
    assert done.forward == 3  # the weight's transpose is an operation that costs nothing
    assert done.products.sum() == 2 * (2 * 8 * 4 * 6)
    assert list(done.traffic[: done.forward]) == [0, 4 * (8 * 4 + 4 * 6 + 8 * 6), 4 * (8 * 6 + 1)]
    assert done.activations == 4 * (8 * 4 + 8 * 6 + 1) - 4 * 8 * 4  # the input was there before, y and the sum are new


@CASES
def test_work_is_three_times_the_forward_passs(options):
    done = traced(options)
    work = done.products + done.others
    assert work[: done.forward].sum() == 2 * 4 * count_macs(DiCoConfig(**options), (1, 4, 32, 32))
    assert 2.9 < work.sum() / work[: done.forward].sum() < 3.1  # attention's backward does its first product again


def test_convolutions_channel_by_channel_are_counted_apart():
    pixels_and_channels = 32 * 32 * (32 + 64) + 16 * 16 * (64 + 64) + 8 * 8 * 128
    assert traced(SMALL).others.sum() == 3 * 4 * 2 * 9 * pixels_and_channels
    assert traced(TEXT).others.sum() == 3 * 4 * 2 * (9 + 81) * pixels_and_channels


@pytest.mark.parametrize("options", [SMALL, TEXT], ids=["class", "dwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_keeps(options, dtype):
    config = DiCoConfig(**options)
    network, arguments = DiCo(config).to(dtype).train(), inputs(config, 4, dtype)
    assert traced(options, dtype=dtype).activations == pytest.approx(kept_for_backward(network, arguments), rel=0.02)


@pytest.mark.parametrize(("options", "rel"), [(SMALL, 0.02), (TEXT, 0.06)], ids=["class", "dwc"])
def test_autocast_keeps_what_it_keeps_on_cuda(options, rel):
    """torch's own rules for CUDA, on tensors that only say that they are there."""
    config = DiCoConfig(**options)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            expected = kept_for_backward(DiCo(config).train(), inputs(config, 4))
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.clear_autocast_cache()
    assert traced(options, autocast=True).activations == pytest.approx(expected, rel=rel)
    assert traced(options).activations > 1.2 * expected


def test_attention_keeps_no_matrix_of_pixels_and_tokens():
    a, b = (traced({**CROSS, "text_tokens": tokens}).activations for tokens in (77, 770))
    assert (
        b - a < 4 * 693 * 4 * 5 * 2 * 128 + 4 * 693 * 16 * 4
    )  # keys and values of five stages, at most 128 wide; text


@CASES
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_keeps_less_and_works_more(options, autocast):
    plain, recomputed = (traced({**options, "checkpoint_stages": s}, autocast=autocast) for s in ((), STAGES))
    assert recomputed.activations < 0.4 * plain.activations
    assert 1.1 < recomputed.products.sum() / plain.products.sum() < 1.4  # 4/3, but for what is between the stages


def test_memory_is_given_back_and_gradients_are_all_counted():
    done = traced(TEXT)
    parameters = sum(p.numel() for p in DiCo(DiCoConfig(**TEXT)).parameters())
    assert 0 <= parameters - done.gradients[-1] <= 256 * 32 + 32  # the last operation's are complete after it
    assert done.live[-1] < 0.01 * done.live.max()
    assert traced(TEXT, batch=8).activations == pytest.approx(2 * done.activations, rel=0.01)


def test_torch_is_left_as_it_was():
    before = (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.cat)
    traced(SMALL, autocast=True)
    assert before == (F.linear, F.conv2d, F.scaled_dot_product_attention, torch.cat)
