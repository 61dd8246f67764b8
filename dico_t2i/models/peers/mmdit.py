"""MMDiT (Esser et al. 2024): text and image attend to each other. It wraps diffusers' network of Stable Diffusion 3."""

from diffusers import SD3Transformer2DModel
from torch import Tensor

from dico_t2i.config import MMDiTConfig
from dico_t2i.models.peers.of_diffusers import OfDiffusers, sizes


class MMDiT(OfDiffusers):
    """MMDiT with text tokens and pooled text. A fresh model returns 0: adaLN and the head start at 0, as in DiT."""

    def __init__(self, config: MMDiTConfig) -> None:
        transformer = SD3Transformer2DModel(
            **sizes(config),
            joint_attention_dim=config.text_dim,
            caption_projection_dim=config.hidden_size,
            pooled_projection_dim=config.pooled_dim,
            pos_embed_max_size=None,  # compute the positions instead of storing them with the weights
        )
        zero = ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")
        super().__init__(config, transformer, small=("time_text_embed",), zero=zero)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: Tensor | None = None) -> Tensor:
        if pooled is None:
            raise ValueError("this model also needs the pooled text (pooled_text): pass pooled=(N, pooled_dim)")
        dtype = self.transformer.proj_out.weight.dtype
        return self.transformer(
            x.to(dtype), encoder_hidden_states=cond, pooled_projections=pooled, timestep=t, return_dict=False
        )[0]


NETWORK = MMDiT
