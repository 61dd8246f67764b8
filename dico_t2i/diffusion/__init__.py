"""The diffusion process: noise schedule, training losses, guidance and samplers.

Everything here works on tensors and a callable that stands for the network, and knows nothing of either.
"""

from dico_t2i.diffusion.guidance import guided
from dico_t2i.diffusion.iddpm import IDDPM, ModelFn, StepDistribution, build
from dico_t2i.diffusion.samplers import sample
from dico_t2i.diffusion.schedule import Schedule, space_timesteps

__all__ = ["IDDPM", "ModelFn", "Schedule", "StepDistribution", "build", "guided", "sample", "space_timesteps"]
