"""Makes one source file of some classes and everything they use from this package, so that it runs without it.

The definitions are copied from the modules unchanged, with their comments and in their order. Config sections become
dataclasses with the same fields, because pydantic may not be installed.
"""

import ast
import builtins
import importlib.util
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dico_t2i.config import Section

PACKAGE = "dico_t2i"
_CONFIG = f"{PACKAGE}.config"
# The copy uses operators in plain torch: they need no compiler, and do not register an operator of this package again.
_OPERATORS = {f"{PACKAGE}.ops": f"{PACKAGE}.export.portable.operators"}


class InlineError(ValueError):
    """Raised if source cannot be copied; the message gives the reason and the module."""


def standalone(names: Sequence[str], docstring: str) -> str:
    """The source of ``names``, such as "dico_t2i.models.dico.DiCo", and of everything that they use.

    Raises InlineError if two definitions have the same name, or if an import has a form that cannot be followed.
    """
    collected = _Collected()
    for name in names:
        collected.require(*name.rsplit(".", 1))
    head = f'"""{docstring}"""\n\nfrom __future__ import annotations\n\n{collected.imports()}'
    parts = [head, *collected.bodies()]
    return "\n\n\n".join(parts) + "\n"


@dataclass
class _Module:
    """The definitions of a module, and the origins of its imported names."""

    name: str
    lines: list[str]
    docstring: str
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    ours: dict[str, tuple[str, str]] = field(default_factory=dict)  # local name -> module, name
    # Local name -> module, name; the module "" stands for `import name`.
    others: dict[str, tuple[str, str]] = field(default_factory=dict)

    @staticmethod
    def read(name: str) -> "_Module":
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise InlineError(f"{name}: there is no such module")
        source = Path(spec.origin).read_text(encoding="utf-8")
        tree = ast.parse(source)
        module = _Module(name, source.splitlines(), ast.get_docstring(tree) or "")
        for statement in tree.body:
            module._take(statement)
        return module

    def _take(self, statement: ast.stmt) -> None:
        match statement:
            case ast.ImportFrom(module=str(source)) if source.split(".")[0] == PACKAGE:
                for alias in statement.names:
                    if alias.asname not in (None, alias.name):
                        raise InlineError(f"{self.name}: {alias.name} is imported under a different name")
                    self.ours[alias.name] = (source, alias.name)
            case ast.ImportFrom(module=str(source)) if source != "__future__":
                for alias in statement.names:
                    self.others[alias.asname or alias.name] = (source, _as(alias))
            case ast.Import():
                for alias in statement.names:
                    self.others[alias.asname or alias.name.split(".")[0]] = ("", _as(alias))
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                self.definitions[name] = statement
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                self.definitions[name] = statement

    def source(self, name: str) -> str:
        """The source of a definition, with its decorators and the comment above it."""
        statement = self.definitions[name]
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first - 1 : statement.end_lineno])


class _Collected:
    """Collects the definitions that are needed, by module."""

    def __init__(self) -> None:
        self._modules: dict[str, _Module] = {}
        self._needed: dict[str, set[str]] = {}  # module -> names
        self._before: dict[str, set[str]] = {}  # module -> modules that must come before it
        self._externals: set[tuple[str, str]] = set()
        self._owner: dict[str, str] = {}  # name in the file -> module

    def require(self, module: str, name: str) -> str:
        """Collect a definition and everything it uses. Returns the module that defines it."""
        if name in self._read(_OPERATORS.get(module, module)).definitions:
            module = _OPERATORS.get(module, module)
        source = self._read(module)
        if name in source.ours:
            return self.require(*source.ours[name])
        if name not in source.definitions:
            raise InlineError(f"{module}: it does not define {name}")
        if self._owner.setdefault(name, module) != module:
            raise InlineError(f"{name} is defined in {self._owner[name]} and in {module}; rename one of them")
        needed = self._needed.setdefault(module, set())
        if name not in needed:
            needed.add(name)
            self._follow(source, name)
        return module

    def _read(self, name: str) -> _Module:
        if name not in self._modules:
            self._modules[name] = _Module.read(name)
        return self._modules[name]

    def _follow(self, module: _Module, name: str) -> None:
        before = self._before.setdefault(module.name, set())
        if _is_section(module, name):
            self._externals |= {("dataclasses", "dataclass"), ("typing", "Literal")}
            return
        for used in _names(module, module.definitions[name]):
            if used in module.definitions:
                self.require(module.name, used)
            elif used in module.ours:
                before.add(self.require(*module.ours[used]))
            elif used in module.others:
                self._externals.add(module.others[used])

    def imports(self) -> str:
        plain = [f"import {name}" for source, name in sorted(self._externals) if not source]
        by_source: dict[str, list[str]] = {}
        for source, name in sorted(self._externals):
            if source:
                by_source.setdefault(source, []).append(name)
        return "\n".join([*plain, *(f"from {source} import {', '.join(n)}" for source, n in by_source.items())])

    def bodies(self) -> Iterator[str]:
        """Yield the part of each module, after those that it needs."""
        done: set[str] = set()

        def emit(name: str) -> Iterator[str]:
            if name in done:
                return
            done.add(name)
            for other in sorted(self._before[name] - {name}):
                yield from emit(other)
            module, needed = self._modules[name], self._needed[name]
            title = module.docstring.splitlines()[0] if module.docstring else ""
            yield f"# --- {name}: {title}"
            for definition in module.definitions:
                if definition in needed:
                    yield (
                        _dataclass(module, definition) if _is_section(module, definition) else module.source(definition)
                    )

        for name in sorted(self._needed):
            yield from emit(name)


def _as(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def _names(module: _Module, statement: ast.stmt) -> list[str]:
    """The global names that a definition may use, in their order."""
    inside = [n for n in ast.walk(statement) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(PACKAGE)]
    if inside:
        raise InlineError(f"{module.name}: line {inside[0].lineno} imports {inside[0].module} inside a function")
    found = dict.fromkeys(n.id for n in ast.walk(statement) if isinstance(n, ast.Name))
    return [name for name in found if not hasattr(builtins, name)]


def _is_section(module: _Module, name: str) -> bool:
    if not module.name.startswith(_CONFIG):
        return False
    made = getattr(importlib.import_module(module.name), name)
    return isinstance(made, type) and issubclass(made, Section)


def _dataclass(module: _Module, name: str) -> str:
    """A config section as a dataclass with its fields, defaults and properties, but without validation."""
    section: type[Section] = getattr(importlib.import_module(module.name), name)
    hints = typing.get_type_hints(section)
    lines = ["@dataclass(frozen=True, kw_only=True)", f"class {name}:"]
    if section.__doc__:
        lines += [f'    """{section.__doc__}"""', ""]
    for key, info in section.model_fields.items():
        default = "" if info.is_required() else f" = {info.default!r}"
        lines.append(f"    {key}: {_hint(hints[key])}{default}")
    for text in _properties(section):
        lines += ["", text]
    return "\n".join(lines)


def _properties(section: type[Section]) -> list[str]:
    """The source of the properties of a section and of its base sections, with overrides applied."""
    found: dict[str, str] = {}
    for parent in section.__mro__:
        if not issubclass(parent, Section):
            continue
        module = _Module.read(parent.__module__)
        for statement in getattr(module.definitions.get(parent.__name__), "body", ()):
            decorators = map(ast.unparse, getattr(statement, "decorator_list", ()))
            if isinstance(statement, ast.FunctionDef) and "property" in decorators:
                text = "\n".join(module.lines[statement.decorator_list[0].lineno - 1 : statement.end_lineno])
                found.setdefault(statement.name, text)
    return list(found.values())


def _hint(hint: typing.Any) -> str:
    return hint.__name__ if type(hint) is type else str(hint).replace("typing.", "")
