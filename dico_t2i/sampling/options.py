"""What sampled images depend on besides their prompts, seeds and sampler."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dico_t2i.config import Config, ConfigError, SamplerConfig, SizedConfig, parse_section
from dico_t2i.sampling.given import check_image_given, chosen_strength


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
        check_image_given(self.image, self.strength, self.mask)
        chosen_strength(self.strength, self.mask is not None)


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


def changed_sampler(sampler: SamplerConfig, changes: Mapping[str, Any]) -> SamplerConfig:
    """A sampler with those of the changes that are not None. Raises ConfigError for values that are out of range."""
    asked = {key: value for key, value in changes.items() if value is not None}
    return parse_section({**sampler.model_dump(), **asked}, SamplerConfig, "options")
