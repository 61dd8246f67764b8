"""Prepares the images and masks that sampling begins with, and puts the kept pixels back into the results."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from dico_t2i.diffusion.given import GivenLatents

Kept = tuple[Tensor, Tensor]  # the pixels (1, 3, H, W) uint8 of an image, and its mask (1, H, W) bool

# The default strengths: an image changes, but stays recognisable; a masked region does not depend on what was there.
_IMAGE_STRENGTH = 0.8
_MASK_STRENGTH = 1.0
_WHITE = 128  # the least grey level that counts as white in a mask


def begin_with(
    image: Image.Image | None,
    strength: float | None,
    mask: Image.Image | None,
    size: tuple[int, int],
    downscale: int,
    encode: Callable[[Tensor], Tensor],
) -> tuple[GivenLatents | None, Kept | None]:
    """The latents that sampling begins with, and the pixels to keep; None without an image or a mask.

    size: height and width in pixels. encode: from pixels (1, 3, H, W) uint8 to scaled latents. Raises ValueError for an
    image, a mask or a strength that cannot be used.
    """
    check_image_given(image, strength, mask)
    if image is None:
        return None, None
    chosen = chosen_strength(strength, mask is not None)
    pixels = fit_image(image, *size)[None]
    masks = None if mask is None else fit_mask(mask, *size)[None]
    latents = encode(pixels)
    if masks is None:
        return GivenLatents(latents, chosen), None
    return GivenLatents(latents, chosen, latent_mask(masks, downscale).to(latents.device)), (pixels, masks)


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


def keep_pixels(images: Tensor, kept: Kept | None) -> Tensor:
    """The images (N, 3, H, W) uint8 with the kept pixels outside of the mask."""
    return torch.where(kept[1][:, None], images, kept[0]) if kept else images


def chosen_strength(strength: float | None, masked: bool) -> float:
    """The strength, or its default if it is None. Raises ValueError if it is not more than 0 and at most 1."""
    if strength is None:
        return _MASK_STRENGTH if masked else _IMAGE_STRENGTH
    if not 0 < strength <= 1:
        raise ValueError(f"strength: {strength} must be more than 0 and at most 1; 1 begins with noise alone")
    return strength


def check_image_given(image: object, strength: object, mask: object) -> None:
    """Raise ValueError for a strength or a mask without an image."""
    if image is None and (strength is not None or mask is not None):
        raise ValueError(f"{'strength' if mask is None else 'mask'}: it needs an image to begin with")


def _fitted(image: Image.Image, height: int, width: int, by: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else ImageOps.fit(image, (width, height), by)


def _pixels(image: Image.Image) -> Tensor:
    """(H, W, 3) or (H, W) uint8."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, *([len(image.getbands())] if image.mode == "RGB" else []))
