"""The base class of all config sections, the error they raise, and durations."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    model_validator,
)

Positive = Annotated[StrictInt, Field(gt=0)]


NonNegative = Annotated[StrictInt, Field(ge=0)]


Seed = Annotated[StrictInt, Field(ge=0, lt=1 << 63)]


Probability = Annotated[float, Field(ge=0, le=1)]


BelowOne = Annotated[float, Field(ge=0, lt=1)]


PositiveFloat = Annotated[float, Field(gt=0)]


NonNegativeFloat = Annotated[float, Field(ge=0)]


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key and what to change."""


class Section(BaseModel):
    """Base class of all sections: they are immutable and refuse unknown keys and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


AnySection = TypeVar("AnySection", bound=Section)


class Span(Section):
    """A duration or an interval, given in exactly one unit."""

    steps: Positive | None = None  # Counts optimizer steps.
    images: Positive | None = None  # Counts training images.
    epochs: PositiveFloat | None = None  # Counts passes over the data set; fractions are allowed.
    minutes: PositiveFloat | None = None  # Counts minutes of wall-clock time; only checkpoint.every takes them.

    @model_validator(mode="after")
    def _one_unit(self) -> Span:
        if sum(v is not None for v in (self.steps, self.images, self.epochs, self.minutes)) != 1:
            raise ValueError("give exactly one of steps, images, epochs, minutes")
        return self

    def in_steps(self, batch: int, samples_per_epoch: int) -> int | None:
        """Return the span in optimizer steps, at least 1, or None if it is given in minutes."""
        if self.minutes is not None:
            return None
        if self.steps is not None:
            return self.steps
        images = self.images if self.images is not None else (self.epochs or 0) * samples_per_epoch
        return max(1, round(images / batch))
