"""Small, randomly initialised models, saved in the formats of the real ones."""

from pathlib import Path

import torch


def save_autoencoder(folder: Path) -> Path:
    """An AutoencoderKL with the shape of Stable Diffusion's: 8 pixels a latent, 4 channels."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    )
    model.save_pretrained(folder)
    return folder
