"""PixArt-alpha (Chen et al. 2023), as in diffusers: DiT with cross-attention to text and one adaLN for all blocks."""

from diffusers import PixArtTransformer2DModel
from torch import Tensor

from dico_t2i.config import PixArtConfig
from dico_t2i.models.conditioning import padding_bias
from dico_t2i.models.peers.of_diffusers import OfDiffusers, sizes


class PixArt(OfDiffusers):
    """PixArt-alpha without its conditioning on resolution. A fresh model returns 0, and text has no effect on it."""

    def __init__(self, config: PixArtConfig) -> None:
        transformer = PixArtTransformer2DModel(
            **sizes(config),
            cross_attention_dim=config.hidden_size,
            caption_channels=config.text_dim,
            use_additional_conditions=False,
        )
        small, zero = ("adaln_single", "caption_projection"), ("attn2.to_out", "proj_out")
        super().__init__(config, transformer, small, zero)
        self.masked = config.text_mask

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: None = None) -> Tensor:
        dtype = self.transformer.proj_out.weight.dtype
        return self.transformer(
            x.to(dtype),
            encoder_hidden_states=cond,
            encoder_attention_mask=padding_bias(cond)[:, None] if self.masked else None,
            timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]


NETWORK = PixArt
