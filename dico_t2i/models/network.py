"""The interface of all networks, which training, sampling and planning use."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dico_t2i.config import NetworkConfig


class Network(nn.Module):
    """A denoiser: ``model(x, t, cond, pooled=None)``.

    x is (N, C, H, W), with H and W divisible by ``config.latent_divisor``. t is (N,) in 0..999 and may be fractional.
    cond holds class ids (N,), where ``num_classes`` is the null class, or text tokens (N, T, text_dim), or the result
    of ``text_kernels``. pooled is (N, pooled_dim) and needed only with ``pooled_text``. Returns (N, C or 2C, H, W) in
    the weights' dtype: the prediction and, with ``learn_sigma``, the fraction that interpolates the log variance.
    """

    config: NetworkConfig

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    def text_kernels(self, tokens: Tensor) -> Any:
        """Everything that depends only on the text tokens (N, T, text_dim), to be passed as ``cond``.

        Most networks return the tokens themselves. Raises ValueError for a class-conditional model.
        """
        if self.config.condition != "text":
            raise ValueError("text_kernels: this model is conditioned on classes")
        return tokens

    def residual_blocks(self) -> Iterable[nn.Module]:
        """The residual blocks in their order; they do most of the work."""
        return ()

    def compile_blocks(self) -> None:
        """Compile each kind of block with torch.compile; blocks of the same kind share the compiled code.

        Compiling the blocks takes seconds, while compiling the whole network takes minutes. It does not work with
        ZeRO-3, which gathers weights inside a block.
        """
        for block in self.residual_blocks():
            block.compile(dynamic=False)
