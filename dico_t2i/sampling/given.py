"""Prepares the images and masks that sampling begins with, and puts the kept pixels back into the results."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

# The default strengths: an image changes, but stays recognisable; a masked region does not depend on what was there.
IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0
_WHITE = 128  # the least grey level that counts as white in a mask


def fit_image(image: Image.Image, height: int, width: int) -> Tensor:
    """The middle of an image, resized by Lanczos to uint8 (3, height, width); transparent parts become white.

    The pixels of an image that has this size stay as they are. Raises ValueError for an image of more than 8 bits.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"image: its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    return _pixels(_fitted(image.convert("RGB"), height, width, Image.Resampling.LANCZOS)).movedim(-1, 0).contiguous()


def fit_mask(mask: Image.Image, height: int, width: int) -> Tensor:
    """A mask, cropped like its image, as bool (height, width): true where it is white. Raises ValueError if none is."""
    mask = ImageOps.exif_transpose(mask).convert("L")
    white = _pixels(_fitted(mask, height, width, Image.Resampling.NEAREST)) >= _WHITE
    if not white.any():
        raise ValueError("mask: it is black everywhere, so nothing would be made; white marks what is made anew")
    return white


def latent_mask(masks: Tensor, downscale: int) -> Tensor:
    """Masks of pixels (N, H, W) bool as masks of latents (N, 1, h, w) bool.

    A latent is made anew if any of its pixels is.
    """
    return F.max_pool2d(masks[:, None].float(), downscale) > 0


def keep_pixels(images: Tensor, given: Tensor, masks: Tensor) -> Tensor:
    """The images with the pixels of the given ones outside of the masks.

    images (N, 3, H, W) uint8; given (N or 1, 3, H, W) uint8; masks (N or 1, H, W) bool.
    """
    return torch.where(masks[:, None], images, given)


def check_strength(strength: float) -> None:
    """Raise ValueError for a strength that is not more than 0 and at most 1."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength: {strength} must be more than 0 and at most 1; 1 begins with noise alone")


def _fitted(image: Image.Image, height: int, width: int, by: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), by)


def _pixels(image: Image.Image) -> Tensor:
    """(H, W, 3) or (H, W) uint8."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, *([len(image.getbands())] if image.mode == "RGB" else []))
