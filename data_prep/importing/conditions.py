"""Captions from templates such as "a photo of a {class}", filled with the values of a table's columns, and classes."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import numpy as np

from data_prep.importing.filters import Dropped

# "a" before a vowel letter, except where it is spoken as a consonant, as in "unicorn" and "European".
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u(?!ni|s[eu]|k))(?!eu|one\b|once\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Templates:
    """Templates with columns in braces. count: how many of them caption a sample, drawn by the seed; 0 for all."""

    texts: tuple[str, ...]
    count: int = 0
    seed: int = 0

    def captions(self, number: int, row: Mapping[str, Any]) -> list[str]:
        """The captions of row ``number``; templates whose columns are not text or numbers there are left out."""
        filled = [text for template in self.texts if (text := _filled(template, row)) is not None]
        if not 0 < self.count < len(filled):
            return filled
        chosen = np.random.default_rng((self.seed, number)).permutation(len(filled))[: self.count]
        return [filled[place] for place in sorted(chosen.tolist())]

    def describe(self) -> dict[str, Any]:
        """The meta data, without what does not matter."""
        drawn = {"templates_per_sample": self.count, "template_seed": self.seed} if self.count else {}
        return {"templates": list(self.texts), **drawn} if self.texts else {}


@dataclass(frozen=True)
class Conditions:
    """What samples get besides captions from columns: captions from templates, and a class from a column."""

    templates: Templates = field(default_factory=lambda: Templates(()))
    label_column: str | None = None

    def describe(self) -> dict[str, Any]:
        """The meta data; empty without templates and classes."""
        return {**self.templates.describe(), **({"label": self.label_column} if self.label_column else {})}

    def label(self, row: Mapping[str, Any], name: str) -> int | None:
        """The row's class; None without a column of classes. Raises Dropped."""
        if self.label_column is None:
            return None
        value = row.get(self.label_column)
        if isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise Dropped("rows without a class number", f"{name}: {value!r}")
        return value


def add_condition_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--label-column", metavar="NAME", help="column of class numbers")
    add("--templates", nargs="+", metavar="TEXT", help='captions such as "a photo of a {class}", of columns in braces')
    add("--templates-per-sample", type=int, default=0, metavar="N", help="draw N of them for a sample (default: all)")
    add("--template-seed", type=int, default=0, metavar="N", help="seed of that draw (default: 0)")


def conditions_of(args: argparse.Namespace, there: Sequence[str]) -> Conditions:
    """The conditions of a command line. Raises ValueError for columns that a table does not have, ``there``."""
    if args.label_column and args.label_column not in there:
        raise ValueError(f"--label-column: the table has no {args.label_column}; its columns are {', '.join(there)}")
    return Conditions(_templates_of(args, there), args.label_column)


def _templates_of(args: argparse.Namespace, there: Sequence[str]) -> Templates:
    if min(args.templates_per_sample, args.template_seed) < 0:
        raise ValueError("--templates-per-sample, --template-seed: at least 0")
    for template in args.templates or ():
        names = _columns(template)
        unknown = [name for name in names if name not in there]
        if unknown or not names:
            what = f"the table has no {', '.join(unknown)}" if unknown else "it names no column in braces"
            raise ValueError(f"--templates {template!r}: {what}; the columns are {', '.join(there)}")
    return Templates(tuple(args.templates or ()), args.templates_per_sample, args.template_seed)


def _columns(template: str) -> list[str]:
    """The columns in braces. Raises ValueError for braces that do not pair."""
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"--templates {template!r}: {error}") from None


def _filled(template: str, row: Mapping[str, Any]) -> str | None:
    parts = []
    for text, name, _, _ in Formatter().parse(template):
        parts.append(text)
        if name is not None:
            value = row.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value or value == "":
                return None
            parts.append(str(value))
    return _ARTICLE.sub(r"\1n ", "".join(parts))
