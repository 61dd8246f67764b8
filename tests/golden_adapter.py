"""The adapter that the golden numbers' check.py drives: the release's names on this package's parts."""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from golden_adapter_diffusion import *  # noqa: F403

from dico_t2i.diffusion import guided
from dico_t2i.models import DiCo, DiCoConfig, count_macs, count_parameters
from dico_t2i.models.blocks import Block, Downsample, Head, Upsample
from dico_t2i.models.conditioning import TimestepEmbedding
from dico_t2i.models.conditioning import sinusoid as sinusoid
from dico_t2i.models.official import BLOCK_NAMES, load_official_state_dict, official_key, official_shape
from dico_t2i.ops import norm_modulate, text_dwconv


def dico_config(config):
    return DiCoConfig(
        hidden_size=config["hidden_size"],
        depths=config["depth"],
        mlp_ratio=config["mlp_ratio"],
        in_channels=config["in_channels"],
        learn_sigma=config["learn_sigma"],
        num_classes=config["num_classes"],
        dropout_prob=config["class_dropout_prob"],
    )


def make_model(config, params, dtype):
    model = DiCo(dico_config(config))
    load_official_state_dict(model, {key: torch.from_numpy(value) for key, value in params.items()})
    return model.to(dtype).train(bool(config.get("_train")))


def forward_with_cfg(model, x, t, y, scale):
    """The release's: both halves carry the guided channels 0..2, and their own values in all others."""
    half = len(x) // 2
    guide = guided(model, {"cond": y[:half]}, {"cond": y[half:]}, scale, "three")
    conditional = guide(x[:half], t[:half])
    unconditional = model(x[:half], t[half:], y[half:])
    return torch.cat((conditional, torch.cat((conditional[:, :3], unconditional[:, 3:]), dim=1)))


def get_param(model, key):
    return {official_key(name): p for name, p in model.named_parameters()}[key]


def state_shapes(config):
    with torch.device("meta"):
        model = DiCo(dico_config(config))
    return {official_key(n): official_shape(n, p.shape) for n, p in model.named_parameters()}


def param_count(config):
    return count_parameters(dico_config(config))


def macs(config, input_shape):
    return count_macs(dico_config(config), input_shape)


def t2i_dwconv(x, context):
    return text_dwconv(x, context)


def _load(module, names, params):
    """Fill a single module; names: ours -> the release's."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            owner, _, leaf = name.rpartition(".")
            value = torch.from_numpy(params[f"{names[owner]}.{leaf}"])
            parameter.copy_(value.reshape(parameter.shape))
    return module.double()


def _nhwc(module, x, *args):
    return module(x.permute(0, 2, 3, 1), *args).permute(0, 3, 1, 2)


def block(config, params, x, c):
    module = _load(Block(config["channels"], config["mlp_ratio"]), BLOCK_NAMES, params)
    return _nhwc(module, x, nn.functional.silu(c))


def final_layer(config, params, x, c):
    names = {"modulation": "adaLN_modulation.1", "out": "out_proj"}
    module = _load(Head(config["channels"], config["out_channels"]), names, params)
    return _nhwc(module, x, nn.functional.silu(c))


def temb(params, t, width):
    return _load(TimestepEmbedding(width), {"hidden": "mlp.0", "out": "mlp.2"}, params)(t)


def downsample(channels, params, x):
    return _nhwc(_load(Downsample(channels), {"conv": "body.0"}, params), x)


def upsample(channels, params, x):
    return _nhwc(_load(Upsample(channels), {"conv": "body.0"}, params), x)


def layernorm2d(x):
    return norm_modulate(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def init_state(config, seed):
    torch.manual_seed(seed)
    model = DiCo(dico_config(config))
    return {
        official_key(n): np.asarray(p.detach()).reshape(official_shape(n, p.shape)) for n, p in model.named_parameters()
    }
