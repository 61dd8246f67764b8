"""The 1,000 classes of ImageNet by name."""

import difflib
from functools import cache

CLASSES = 1000

# WordNet gives these names to two classes each; torchvision sets one of the two apart by a further word.
_SHARED = {"crane": [134, 517], "maillot": [638, 639]}


@cache
def class_names() -> list[str]:
    """In the order of their numbers, one name each, as torchvision ships them with its classifiers."""
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def class_number(text: str) -> int:
    """The class that a number or a name stands for, upper and lower case alike.

    Raises ValueError, with the nearest names and their numbers, for one that is unknown or that several classes have.
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
        f"{text!r} is {'the name of several classes' if found else 'no class of ImageNet'}; "
        + (f"did you mean {shown}?" if near else "give its number, 0 to 999")
    )


def _similar(wanted: str, names: list[str]) -> list[int]:
    """Classes whose names hold the word, then those that are spelt nearly so; at most 8."""
    within = [number for number, name in enumerate(names) if wanted in name.split() or wanted in name.split("-")]
    close = [names.index(name) for name in difflib.get_close_matches(wanted, names, n=5)]
    return list(dict.fromkeys(within + close))[:8]
