"""The adapter that the peers' check.py drives: DiG, DiS and DiM, and their operators, in float64."""

import torch

from dico_t2i import ops
from dico_t2i.config.networks import DIM_VARIANTS, DIS_VARIANTS, DiGConfig, DiMConfig, DiSConfig
from dico_t2i.diffusion import guided
from dico_t2i.models import build_network

SECTIONS = {"dig": DiGConfig, "dis": DiSConfig, "dim": DiMConfig}


def section(network, config):
    fields = {key: value for key, value in config.items() if key not in ("input_size", "skip")}
    fields["latent_size"] = config["input_size"]
    if network == "dig":
        fields["skips"] = "xavier" if config["skip"] else "none"
    if network == "dim":
        fields["first_timestep"] = 0  # the timesteps are given as the network takes them
    return SECTIONS[network](**fields)


class Callable(torch.nn.Module):
    """A network that is called as check.py does it, with the state dict of the network alone."""

    def __init__(self, network):
        super().__init__()
        self.__dict__["network"] = network

    def forward(self, x, t, y):
        return self.network(x, t, torch.zeros_like(t) if y is None else y)

    def forward_with_cfg(self, x, t, y, scale):
        half = len(x) // 2
        guide = guided(self.network, {"cond": y[:half]}, {"cond": y[half:]}, scale, "three")
        conditional = guide(x[:half], t[:half])
        unconditional = self.network(x[:half], t[half:], y[half:])
        return torch.cat((conditional, torch.cat((conditional[:, :3], unconditional[:, 3:]), dim=1)))

    def state_dict(self, *args, **kwargs):
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.network.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args, **kwargs):
        return self.network.named_parameters(*args, **kwargs)

    def train(self, mode=True):
        self.network.train(mode)
        return super().train(mode)


def build(network, config):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return Callable(build_network(section(network, config))).eval()
    finally:
        torch.set_default_dtype(before)


def block(network, module, index, x=None, c=None, residual=None, skip=None):
    one = list(module.network.residual_blocks())[index]
    if network == "dig":
        side = round(x.shape[1] ** 0.5)
        out = one(x.unflatten(1, (side, side)), c, *([] if skip is None else [skip]))
        return {"out": out.flatten(1, 2)}
    if network == "dim" and residual is not None and skip is None:
        # Alone, the original's blocks of the first half add the residual that they are given twice. In its network
        # it is added once, which the outputs of whole networks hold.
        x = x + residual
    out, residual = one(x, residual, skip) if network == "dis" else one(x, residual, c, skip)
    return {"out": out, "residual": residual}


def names(network, variant):
    """Of the published models: "DiG-S/2-bid-layer-dwconv-qdir-skipzero", "DiS-S/2", "DiM-S/2-cifar10"."""
    if network == "dig":
        skips = "identity" if variant.endswith("skipzero") else "xavier" if variant.endswith("skip") else "none"
        config = DiGConfig(variant=variant.split("-bid")[0], skips=skips)
    elif network == "dis":
        config = DiSConfig(**DIS_VARIANTS[variant])
    else:
        size, _, data = variant.rpartition("-")
        changes = {"cifar10": {"in_channels": 3, "num_classes": 10}, "512": {"latent_size": 64, "pad": "rho"}}
        config = DiMConfig(**DIM_VARIANTS[size], **changes.get(data, {}))
    with torch.device("meta"):
        return {name: list(value.shape) for name, value in build_network(config).state_dict().items()}


def gla(q, k, v, g):
    out, state = ops.gated_linear_attention(*(tensor.transpose(1, 2) for tensor in (q, k, v, g)))
    return out.transpose(1, 2), state


def selective_scan(u, delta, A, B, C, D, z, delta_bias):
    u, delta, B, C, z = (tensor.transpose(1, 2) for tensor in (u, delta, B, C, z))
    return ops.selective_scan(u, delta, A, B, C, D, z, delta_bias).transpose(1, 2)
