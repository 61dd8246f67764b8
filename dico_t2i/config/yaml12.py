"""Reads YAML by the core rules of YAML 1.2: configs, cluster profiles, sweeps and values on the command line.

A plain word is a number, true, false, null or text. Numbers are decimal: 010, 0x1F, 1_000, 1:30 and dates are text, and
so are on, off, yes and no. Numbers keep their spelling for keys that take text (``Text``).
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, StrictBool

ENVIRONMENT = "env"  # all entries of this key are text as typed, even true and null


class WrittenInt(int):
    """An integer that keeps its spelling."""

    text: str

    def __new__(cls, text: str) -> WrittenInt:
        number = super().__new__(cls, text)
        number.text = str(text)
        return number

    def __str__(self) -> str:
        return self.text


class WrittenFloat(float):
    """A float that keeps its spelling."""

    text: str

    def __new__(cls, text: str) -> WrittenFloat:
        number = super().__new__(cls, str(text).replace(".inf", "inf").replace(".nan", "nan"))
        number.text = str(text)
        return number

    def __str__(self) -> str:
        return self.text


def _as_written(value: Any) -> Any:
    return value.text if isinstance(value, WrittenInt | WrittenFloat) else value


def _number_as_text(value: Any) -> Any:
    """Convert any number to text, even one that does not come from YAML."""
    value = _as_written(value)
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


_WORDS = {"on": True, "yes": True, "off": False, "no": False}


def _flag(value: Any) -> Any:
    return _WORDS.get(value.lower(), value) if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_as_written)]  # text, in which a number keeps its spelling: 0123, 1.50
AnyText = Annotated[str, BeforeValidator(_number_as_text)]
Flag = Annotated[StrictBool, BeforeValidator(_flag)]  # true or false, which may be written as on or yes, off or no


class _Core(yaml.SafeLoader):
    """A loader with YAML 1.2's rules, for which a key that is given twice is an error."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = str(self.construct_object(key_node, deep=True))
            line = key_node.start_mark.line + 1
            if key != "<<" and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice, first in line {seen[key]}", key_node.start_mark
                )
            seen[key] = line
            if key == ENVIRONMENT and isinstance(value_node, yaml.MappingNode):
                _keep_as_typed(value_node)
        return super().construct_mapping(node, deep)


def _keep_as_typed(node: yaml.MappingNode) -> None:
    for _, value in node.value:
        if isinstance(value, yaml.ScalarNode):
            value.tag = "tag:yaml.org,2002:str"


_DECIMAL = "(?:0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", f"[-+]?{_DECIMAL}", "-+0123456789"),
    (
        "float",
        rf"[-+]?(?:\.[0-9]+|{_DECIMAL}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
):
    _Core.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
_Core.add_constructor("tag:yaml.org,2002:int", lambda loader, node: WrittenInt(node.value))
_Core.add_constructor("tag:yaml.org,2002:float", lambda loader, node: WrittenFloat(node.value))


def read_yaml(text: str) -> Any:
    """The content of a YAML text. Raises yaml.YAMLError, which names the line."""
    return yaml.load(text, _Core)


def read_value(text: str, raw: bool = False) -> Any:
    """A value from the command line, where " #" does not start a comment. Raises yaml.YAMLError.

    raw: return the text unchanged, except for the quotes of a quoted string.
    """
    try:
        node: Any = yaml.compose(text, _Core)
    except yaml.YAMLError:
        if raw:
            return text
        raise
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if raw and (plain or not isinstance(node, yaml.ScalarNode)):
        return text
    if plain and node.tag.endswith(":str"):
        return text.strip()
    return read_yaml(text)
