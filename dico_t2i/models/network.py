"""What training, sampling and planning know of a network, whichever it is."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dico_t2i.config import NetworkConfig


class Network(nn.Module):
    """A denoiser: ``model(x, t, cond, pooled=None)``.

    x (N, C, H, W), H and W divisible by ``config.latent_divisor``; t (N,) in 0..999, possibly fractional; cond class
    ids (N,), the null class being ``num_classes``, or text tokens (N, T, text_dim), or what ``text_kernels`` made of
    them; pooled (N, pooled_dim) with ``pooled_text`` only. Returns (N, C or 2C, H, W) in the weights' dtype: the
    prediction and, with ``learn_sigma``, the fraction that interpolates the log variance.
    """

    config: NetworkConfig

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    def text_kernels(self, tokens: Tensor) -> Any:
        """What does not depend on the timestep, to pass as ``cond``: of most networks the tokens (N, T, text_dim).

        Raises ValueError for a model of classes.
        """
        if self.config.condition != "text":
            raise ValueError("text_kernels: this model is conditioned on classes")
        return tokens

    def blocks(self) -> Iterable[nn.Module]:
        """The residual blocks, most of the work, in order."""
        return ()

    def compile_blocks(self) -> None:
        """Have torch.compile make kernels for each kind of block; blocks that are alike share them.

        Compiling by block takes seconds where the whole network takes minutes. Not for weights that come and go inside
        a block, as ZeRO-3's do.
        """
        for block in self.blocks():
            block.compile(dynamic=False)
