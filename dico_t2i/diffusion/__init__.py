"""Diffusion processes (iDDPM and rectified flow) with their training losses, guidance and samplers.

Everything here works on tensors and on a callable that stands for the network, and depends on no particular network.
"""

from dico_t2i.config import DiffusionConfig
from dico_t2i.diffusion import iddpm
from dico_t2i.diffusion.flow import Flow, build_flow
from dico_t2i.diffusion.given import GivenLatents
from dico_t2i.diffusion.guidance import guided
from dico_t2i.diffusion.iddpm import IDDPM, StepDistribution
from dico_t2i.diffusion.process import ModelFn, Process
from dico_t2i.diffusion.samplers import sample
from dico_t2i.diffusion.schedule import Schedule, space_timesteps

__all__ = [
    "IDDPM",
    "Flow",
    "GivenLatents",
    "ModelFn",
    "Process",
    "Schedule",
    "StepDistribution",
    "build",
    "guided",
    "sample",
    "space_timesteps",
]


def build(config: DiffusionConfig, learn_sigma: bool) -> Process:
    """The process that a config describes. Raises ValueError for an impossible noise schedule."""
    return build_flow(config) if config.kind == "flow" else iddpm.build(config, learn_sigma)
