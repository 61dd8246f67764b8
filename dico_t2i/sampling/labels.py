"""What a model is asked for: prompts, or classes by their numbers or by ImageNet's 1,000 names."""

import difflib
from collections.abc import Sequence
from functools import cache

from dico_t2i.config import NetworkConfig
from dico_t2i.text_lines import check_text

CLASSES = 1000

# Two classes share each of these names in WordNet; torchvision adds a word to one of the two.
_SHARED = {"crane": [134, 517], "maillot": [638, 639]}


@cache
def class_names() -> list[str]:
    """One name for each class, in the order of their numbers, from torchvision."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def class_number(text: str) -> int:
    """The class that a number or a name stands for; case does not matter.

    Raises ValueError, with similar names and their numbers, if the name is unknown or several classes have it.
    """
    if text.strip().isdecimal():
        return int(text)
    wanted = text.strip().lower().replace("_", " ")
    names = [name.lower() for name in class_names()]
    found = _SHARED.get(wanted) or [number for number, name in enumerate(names) if name == wanted]
    if len(found) == 1:
        return found[0]
    near = found or _similar(wanted, names)
    shown = ", ".join(f"{class_names()[n]} ({n})" for n in near)
    raise ValueError(
        f"{text!r} is {'the name of several classes' if found else 'not a class of ImageNet'}; "
        + (f"did you mean {shown}?" if near else "give its number, 0 to 999")
    )


def conditions_of(given: Sequence[str | int], model: NetworkConfig) -> list[str | int]:
    """Prompts as they are, or the numbers of classes, by what the model takes.

    Raises ValueError for anything else, and for classes that the model does not have.
    """
    if model.condition == "text":
        return [_prompt(one) for one in given]
    names = [one for one in map(str, given) if not one.strip().isdecimal()]
    if names and model.num_classes != CLASSES:
        raise ValueError(f"{names[0]!r}: this model has {model.num_classes} classes, not ImageNet's; give numbers")
    numbers = [class_number(str(one)) for one in given]
    highest = max(numbers, default=0)
    if highest >= max(1, model.num_classes):
        raise ValueError(f"{highest}: this model's classes are 0 to {max(1, model.num_classes) - 1}")
    return list(numbers)


def _prompt(given: str | int) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{given!r} is not a prompt; this model takes text")
    return check_text(given, "prompt")


def _similar(wanted: str, names: list[str]) -> list[int]:
    """At most 8 classes: those whose names contain the word, then those with a similar spelling."""
    within = [number for number, name in enumerate(names) if wanted in name.split() or wanted in name.split("-")]
    close = [names.index(name) for name in difflib.get_close_matches(wanted, names, n=5)]
    return list(dict.fromkeys(within + close))[:8]
