"""Writes docs/config.md from the types, defaults and comments of dico_t2i/config/.

python docs/make_config_reference.py           write it
python docs/make_config_reference.py --check   exit with 1 if it is not up to date
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "dico_t2i" / "config"
TARGET = ROOT / "docs" / "config.md"

_WORDS = {
    "Positive": "integer > 0",
    "Seed": "integer >= 0, < 2^63",
    "NonNegative": "integer >= 0",
    "Probability": "0 to 1",
    "BelowOne": "0 to less than 1",
    "PositiveFloat": "number > 0",
    "NonNegativeFloat": "number >= 0",
    "StrictBool": "true or false",
    "StrictInt": "integer",
    "StrictStr": "text",
    "Text": "text",
    "AnyText": "text",
    "Flag": "true or false",
    "Changes": "mapping to keys of that section",
    "str": "text",
    "None": "none",
}
_HEAD = """\
# Config reference

This page is generated from `dico_t2i/config/` by `python docs/make_config_reference.py`; edit the comments there.

A config is a YAML file. With `extends: other.yaml` it starts from the keys of that file. `key.path=value` on the
command line changes any key. An unknown key, a wrong type or an impossible combination is an error that names the key,
before anything starts. A key without a default is required. `model.kind` selects the network (docs/networks.md); the
default is DiCo. `model.variant: DiCo-S` (or B, L, XL, H) stands for hidden size, depths and FFN ratio; `DiT-XL/2` and
the like stand for the sizes of a peer.

## How values are read

Files, `key.path=value`, cluster profiles and sweeps follow the rules of YAML 1.2. Files are in UTF-8 unless a byte-
order mark says otherwise. A key that is given twice is an error.

| written | meaning |
| --- | --- |
| `12`, `-3`, `1.5`, `1e-4`, `.inf` | a number; numbers are decimal |
| `010`, `0x1F`, `1_000`, `1:30`, `2026-12-01` | text; an error for a key that takes an integer |
| `true`, `false` (also `True`, `TRUE`, ...) | true, false |
| `on`, `off`, `yes`, `no` | text, as in `train.compile=off`; true or false for a key that takes these |
| `null`, `~`, nothing | none |

A key that takes text keeps a number unchanged: `name=0123`, `cluster.time=90`, `data.path=1e5`. The entries of
`cluster.env` are always text. `--sbatch KEY=VALUE` passes the value to SLURM unchanged, without reading it as YAML. In
a profile's `sbatch:`, `true` is an option without a value and `false` leaves the option out. On the command line ` #`
does not start a comment.

Files of prompts, captions, labels and names, and the demo's fields, have one reader (`dico_t2i/text_lines.py`). It
reads UTF-8, or what a byte-order mark says; the mark is not part of the text. A line ends only at `\\n`, `\\r\\n` or
`\\r`, so that U+2028, vertical tabs and form feeds stay inside their line. Bytes that are not text are an error that
names the line and the character.

## What may change within a run

The network, the diffusion process, the frozen encoders, the seed, the batch and the order of the data stay the same
once a run has a checkpoint. Before that, and for all other keys, a new start may bring a different config, and
reports what has changed; so do stages that have not begun. A start that is refused writes nothing. A run folder that
is copied or renamed resumes under its new name (`name=NEW`). Each checkpoint keeps hashes of the encoders' weights:
training, sampling, export, demo and evaluations refuse to use different ones; checkpoints of older versions, which
have no hashes, are used with a note.
"""


def reference() -> str:
    """The whole page as Markdown."""
    source = "\n".join(file.read_text(encoding="utf-8") for file in sorted(SOURCE.glob("*.py")))
    tree = ast.parse(source)
    page = _Page(tree, source.splitlines())
    return _HEAD + "".join(page.section(name, title) for name, title in page.order())


class _Page:
    def __init__(self, tree: ast.Module, lines: list[str]) -> None:
        self._lines = lines
        self._classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self._aliases = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

    def order(self) -> Iterator[tuple[str, str]]:
        """Yield each section once, in depth-first order, with the keys that hold it; spans come last."""
        keys: dict[str, list[str]] = {}

        def visit(name: str, key: str) -> None:
            keys.setdefault(name, []).append(f"{key}, kind: {kind}" if (kind := self._kind(name)) else key)
            for base in self._bases(name):
                if base not in keys:
                    visit(base, f"{key.partition(',')[0]}, any {base.removesuffix('Config').lower()}")
            for field in self._fields(name):
                assert isinstance(field.target, ast.Name)
                for section in self._sections(field.annotation):
                    visit(section, f"{key}.{field.target.id}".lstrip("."))

        visit("Config", "")
        spans = keys.pop("Span")
        yield from ((name, ", ".join(under) or "A run") for name, under in keys.items())
        yield "Span", f"A span, such as {spans[0]}"

    def _sections(self, annotation: ast.expr) -> Iterator[str]:
        """Yield the sections in a type, and in the aliases that it uses."""
        names = (part for part in ast.walk(annotation) if isinstance(part, ast.Name))
        for part in sorted(names, key=lambda name: (name.lineno, name.col_offset)):
            if part.id in self._classes:
                yield part.id
            elif part.id in self._aliases:
                yield from self._sections(self._aliases[part.id])

    def _bases(self, name: str) -> list[str]:
        """The sections that a section inherits keys from."""
        bases = [base.id for base in self._classes[name].bases if isinstance(base, ast.Name)]
        return [base for base in bases if base in self._classes and base != "Section"]

    def _kind(self, name: str) -> str:
        """The ``kind`` of a section that is selected by it; empty for other sections."""
        kinds = [f.value for f in self._fields(name) if isinstance(f.target, ast.Name) and f.target.id == "kind"]
        value = next(iter(kinds), None)
        return str(ast.literal_eval(value)) if value is not None and self._bases(name) else ""

    def section(self, name: str, title: str) -> str:
        node = self._classes[name]
        text = ast.get_docstring(node)
        rows = "".join(self._row(field) for field in self._fields(name))
        also = "".join(f" It also has the keys of [{base}](#{base.lower()})." for base in self._bases(name))
        intro = f"{text}{also}\n\n" if text else ""
        head = f'\n<a id="{name.lower()}"></a>\n\n## {title}\n\n'
        return f"{head}{intro}| key | type | default | |\n| --- | --- | --- | --- |\n{rows}"

    def _fields(self, name: str) -> list[ast.AnnAssign]:
        fields = (node for node in self._classes[name].body if isinstance(node, ast.AnnAssign))
        return [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]

    def _row(self, field: ast.AnnAssign) -> str:
        assert isinstance(field.target, ast.Name)
        cells = (
            f"`{field.target.id.rstrip('_')}`",
            self._type(field.annotation),
            self._default(field),
            self._comment(field),
        )
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"

    def _type(self, node: ast.expr) -> str:
        match node:
            case ast.BinOp(left=left, right=right):
                return f"{self._type(left)} or {self._type(right)}"
            case ast.Constant(value=None):
                return "none"
            case ast.Name(id=name) if name in _WORDS:
                return _WORDS[name]
            case ast.Name(id=name) if name in self._classes:
                return f"[section](#{name.lower()})" if name != "Span" else "[span](#span)"
            case ast.Name(id=name) if name in self._aliases:
                return self._type(self._aliases[name])
            case ast.Subscript(value=ast.Name(id="Literal"), slice=choice):
                options = choice.elts if isinstance(choice, ast.Tuple) else [choice]
                return ", ".join(f"`{_yaml(option)}`" for option in options)
            case ast.Subscript(slice=ast.Tuple(elts=[inner, ast.Call(func=ast.Name(id="Discriminator"))])):
                return self._type(inner)
            case ast.Subscript(
                slice=ast.Tuple(elts=[ast.Name(id=name), ast.Call(func=ast.Name(id="Tag"), args=[tag])])
            ):
                return f"[{ast.literal_eval(tag)}](#{name.lower()})"
            case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, ast.Call() as limits])):
                bounds = {k.arg: ast.unparse(k.value) for k in limits.keywords}
                if "pattern" in bounds:
                    return f"{self._type(inner)} of the form `{ast.literal_eval(bounds['pattern'])}`"
                return f"{self._type(inner)}, {bounds['ge']} to {bounds['le']}"
            case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=parts)):
                several = isinstance(parts[-1], ast.Constant)
                return f"list of {self._type(parts[0])}" if several else f"{len(parts)} of: {self._type(parts[0])}"
            case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, inner])):
                return f"mapping to {self._type(inner)}"
        return f"`{ast.unparse(node)}`"

    def _default(self, field: ast.AnnAssign) -> str:
        if field.value is None:
            return ""
        match field.value:
            case ast.Call(func=ast.Name(id="Field")):  # which gives the key its name
                return ""
            case ast.Call(keywords=keywords):
                inner = ", ".join(f"{k.arg}: {_yaml(k.value)}" for k in keywords)
                return f"`{{{inner}}}`" if inner else "its defaults"
            case value:
                return f"`{_yaml(value)}`"

    def _comment(self, field: ast.AnnAssign) -> str:
        """The comment behind the field in the source, or above it."""
        assert field.end_lineno is not None
        assert field.end_col_offset is not None
        behind = self._lines[field.end_lineno - 1].encode()[field.end_col_offset :].decode().strip()
        if behind.startswith("#"):
            return behind.removeprefix("#").strip()
        above: list[str] = []
        for line in reversed(self._lines[: field.lineno - 1]):
            if not re.match(r"\s*#", line):
                break
            above.insert(0, line.strip().removeprefix("#").strip())
        return " ".join(above)


def _yaml(node: ast.expr) -> str:
    """A default in YAML syntax."""
    try:
        value = ast.literal_eval(node)
    except ValueError:  # an expression
        return ast.unparse(node)
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f'"{value}"' if isinstance(value, str) and ":" in value else str(value)


def main() -> None:
    text = reference()
    if "--check" in sys.argv[1:]:
        sys.exit(0 if TARGET.exists() and TARGET.read_text(encoding="utf-8") == text else 1)
    TARGET.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
