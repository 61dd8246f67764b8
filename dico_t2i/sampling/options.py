"""What sampled images depend on besides their prompts, seeds and sampler."""

from dataclasses import dataclass

from PIL import Image

from dico_t2i.config import Config, ConfigError, SizedConfig
from dico_t2i.sampling.given import IMAGE_STRENGTH, MASK_STRENGTH, check_strength


@dataclass(frozen=True)
class Options:
    """The same for all images of a call.

    negative_prompt: the text that guidance leads away from, in place of the empty one. height, width: in pixels; the
    default is the size of training. image: the image to begin with, cropped and resized to that size. strength: how far
    results may depart from it, more than 0 and at most 1; the default is 0.8, or 1 with a mask. mask: white where the
    image is made anew; all other pixels stay as they are. Raises ValueError for a strength or mask that does not fit.
    """

    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    image: Image.Image | None = None
    strength: float | None = None
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        if self.image is None and (self.strength is not None or self.mask is not None):
            raise ValueError(
                f"{'strength' if self.mask is None else 'mask'}: it needs an image; give one, or leave it out"
            )
        check_strength(self.chosen_strength)

    @property
    def chosen_strength(self) -> float:
        if self.strength is None:
            return IMAGE_STRENGTH if self.mask is None else MASK_STRENGTH
        return self.strength


def image_size(config: Config, options: Options) -> tuple[int, int]:
    """Height and width of the images in pixels. Raises ConfigError if the model cannot make images of this size."""
    trained = config.data.image_size
    height, width = options.height or trained, options.width or trained
    unit = config.model.latent_divisor * config.downscale
    if height % unit or width % unit:
        raise ConfigError(f"height and width: {height}x{width} pixels must be divisible by {unit}")
    fixed = isinstance(config.model, SizedConfig) and config.model.learned_positions
    if fixed and (height, width) != (trained, trained):
        raise ConfigError(
            f"height and width: {height}x{width} pixels, but {config.model.kind} learned positions for"
            f" {trained}x{trained} only; leave them out"
        )
    return height, width
