"""Reads configs from YAML files with ``extends:`` and from dotted overrides, and writes them as YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dico_t2i.config.base import AnySection, ConfigError
from dico_t2i.config.cluster import ClusterConfig
from dico_t2i.config.errors import explain
from dico_t2i.config.merge import SPAN_KEYS, is_span, merged
from dico_t2i.config.tree import Config
from dico_t2i.config.yaml12 import ENVIRONMENT, read_value, read_yaml
from dico_t2i.text_lines import check_text, read_text


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, follow ``extends:``, apply ``key.path=value`` overrides, and validate the config.

    Raises ConfigError with the file, the key's path and the remedy.
    """
    return load_section(Path(path), Config, overrides)


def read_cluster(profile: Path | None, changes: Mapping[str, Any], below: ClusterConfig | None = None) -> ClusterConfig:
    """A cluster from a profile file; the keys that ``below`` sets replace its own, and ``changes`` replace both.

    Raises ConfigError with the file and the key.
    """
    own = below.model_dump(include=below.model_fields_set) if below else {}
    tree = {**(_read_tree(profile, ()) if profile else {}), **own, **changes}
    return parse_section(tree, ClusterConfig, str(profile or "cluster"))


def load_section(path: Path, section: type[AnySection], overrides: Iterable[str] = ()) -> AnySection:
    """A section of any kind from its own file, with ``extends:`` and overrides as in ``load_config``.

    Raises ConfigError with the file, the key's path and the remedy.
    """
    tree = _read_tree(path, ())
    for override in overrides:
        _apply_override(tree, override)
    return parse_section(tree, section, str(path))


def parse_section(tree: Mapping[str, Any], section: type[AnySection], source: str) -> AnySection:
    """Validate a tree of plain values as a section of any kind; errors name ``source``."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n{explain(error, section)}") from None


def parse_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a tree of plain values as a config; errors name ``source``."""
    return parse_section(tree, Config, source)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree of sections, and of lists of sections, to {"key.path": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
            value = {str(number): entry for number, entry in enumerate(value)}
        flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def dump_config(config: Config) -> str:
    """The resolved config as YAML, which ``load_config`` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_none=True), sort_keys=False)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends itself, through {' -> '.join(map(str, seen))}")
    try:
        tree = read_yaml(read_text(path))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a config file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ValueError as error:  # bytes that are not text
        raise ConfigError(str(error)) from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, found {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    return merged(_read_tree(path.parent / str(base), (*seen, path.resolve())), tree)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = check_text(override, "override").partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"override {override!r}: expected key.path=value")
    *parents, last = key.split(".")
    try:
        value = read_value(text, raw=parents[-1:] == [ENVIRONMENT])
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node: Any = tree
    for part in parents:
        child = node.setdefault(part, {}) if isinstance(node, dict) else _entry(node, part, override)
        if not isinstance(child, dict | list):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
        node = child
    if not isinstance(node, dict):
        raise ConfigError(f"override {override!r}: {parents[-1]} is a list; name an entry of it, or give all of it")
    if last in SPAN_KEYS and is_span(node):
        node.clear()
    node[last] = value


def _entry(entries: list[Any], part: str, override: str) -> Any:
    """The entry of a list of sections with this name, such as a stage or a data set of a mixture."""
    for entry in entries:
        if isinstance(entry, dict) and str(entry.get("name")) == part:
            return entry
    raise ConfigError(f"override {override!r}: no entry has the name {part}")
