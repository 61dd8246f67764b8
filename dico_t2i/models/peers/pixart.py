"""PixArt-alpha (Chen et al. 2023), diffusers' own: DiT with cross-attention to text and one adaLN for all blocks."""

from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from dico_t2i.config import PixArtConfig
from dico_t2i.models.network import Network
from dico_t2i.models.peers.layers import initialize


class PixArt(Network):
    """PixArt-alpha without its conditions on resolution. A fresh model returns 0, and its text has no effect."""

    def __init__(self, config: PixArtConfig) -> None:
        super().__init__(config)
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.hidden_size // config.num_heads,
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_layers=config.depth,
            cross_attention_dim=config.hidden_size,
            caption_channels=config.text_dim,
            sample_size=config.latent_size,
            patch_size=config.patch_size,
            use_additional_conditions=False,
        )
        if config.checkpoint_stages:
            self.transformer.enable_gradient_checkpointing()
        initialize(
            self.transformer,
            small=("adaln_single", "caption_projection"),
            zero=("attn2.to_out", "proj_out"),
        )

    def blocks(self) -> nn.ModuleList:
        return self.transformer.transformer_blocks

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, pooled: None = None) -> Tensor:
        dtype = self.transformer.proj_out.weight.dtype
        conditions = {"resolution": None, "aspect_ratio": None}
        return self.transformer(
            x.to(dtype), encoder_hidden_states=cond, timestep=t, added_cond_kwargs=conditions, return_dict=False
        )[0]
