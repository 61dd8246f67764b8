"""The prompts of the sets of real pictures, and which class a prompt asks for."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.real.shards import read_images

_BEGINNINGS = (
    "a photo of a ",
    "",
    "a ",
    "the ",
    "one ",
    "a photo of the ",
    "a picture of a ",
    "an image of one ",
    "there is a ",
    "this is the ",
    "here is our ",
    "show me a ",
    "they own a ",
    "everyone likes the ",
    "he draws another ",
    "do you know her ",
)
_ENDS = (
    "",
    " outside",
    " at noon",
    " near the house",
    " in the rain",
    " again",
    " and nothing else",
    " which I like",
    " from last summer",
    ", a small photo",
)
# Many sentences, so that a network that knows ten words does not take the rest of a sentence for something to draw.
CIFAR10_TEMPLATES = tuple(f"{beginning}{{class}}{end}" for end in _ENDS for beginning in _BEGINNINGS)
EMOJI_TEMPLATES = ("a {style} emoji of {caption}", "{caption}, {style} style", "a {style} drawing of {caption}")

# Words for the classes of CIFAR-10 that no caption has.
SYNONYMS = {
    "airplane": "jet",
    "automobile": "sedan",
    "bird": "sparrow",
    "cat": "kitten",
    "deer": "stag",
    "dog": "puppy",
    "frog": "toad",
    "horse": "pony",
    "ship": "boat",
    "truck": "lorry",
}
FREE_TEMPLATES = ("a picture of a {class}", "my {class}", "look at this {class}", "the {class} that we saw yesterday")


def class_prompts(count: int, words: Sequence[str], templates: Sequence[str] = CIFAR10_TEMPLATES) -> list[str]:
    """``count`` prompts, in turns over the words, and for each of these over the templates."""
    prompts = []
    for number in range(count):
        template = templates[number // len(words) % len(templates)]
        text = template.replace("{class}", words[number % len(words)])
        prompts.append(re.sub(r"\ba (?=[aeiou])", "an ", text))
    return prompts


def class_asked(prompt: str, names: Sequence[str], synonyms: Mapping[str, str] = SYNONYMS) -> int:
    """The class that a prompt names by its name, a synonym or its number. Raises ValueError if there is none."""
    for number, name in enumerate(names):
        known = "|".join(re.escape(word) for word in {name, synonyms.get(name, name), str(number)})
        if re.search(rf"\b(?:{known})\b", prompt, re.IGNORECASE):
            return number
    raise ValueError(f"the prompt {prompt!r} names none of {', '.join(names)}")


def held_out_prompts(shards: Path, count: int) -> list[str]:
    """The first caption of each sample of some shards, in turns until there are ``count``."""
    captions = [entry["captions"][0] for entry in read_images(shards, 8).about]
    return [captions[number % len(captions)] for number in range(count)]
