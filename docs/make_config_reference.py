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
    "str": "text",
    "None": "none",
}
_HEAD = """\
# Config reference

Made from `dico_t2i/config/` by `python docs/make_config_reference.py`; change it there.

A config is a YAML file; `extends: other.yaml` takes another's keys first. `key.path=value` on the command line changes
any key. An unknown key, a wrong type or an impossible combination is an error that names it, before anything starts.
A key without a default must be given. `model.kind` chooses the network (docs/networks.md): DiCo where it is left out.
`model.variant: DiCo-S` (or B, L, XL, H) stands for width, depths and FFN ratio, `DiT-XL/2` and the like for a peer's.

## How values are read

Files, `key.path=value`, cluster profiles and sweeps are read by the rules of YAML 1.2, in UTF-8 (or as a byte-order
mark says), and a key that is given twice is an error.

| written | what it is |
| --- | --- |
| `12`, `-3`, `1.5`, `1e-4`, `.inf` | a number; numbers are decimal |
| `010`, `0x1F`, `1_000`, `1:30`, `2026-12-01` | text; an error where a key takes a whole number |
| `true`, `false` (also `True`, `TRUE`, ...) | true, false |
| `on`, `off`, `yes`, `no` | text: `train.compile=off`; where a key takes true or false they mean these |
| `null`, `~`, nothing | none |

A key that takes text keeps a number as it is written: `name=0123`, `cluster.time=90`, `data.path=1e5`. The entries of
`cluster.env` are text whatever they look like. What SLURM gets is what you typed: the value of `--sbatch KEY=VALUE`
is not read as YAML at all; in a profile's `sbatch:`, `true` is an option without a value and `false` leaves one out.
On the command line ` #` begins no comment.

Files of prompts, captions, labels and names, and the demo's fields, have one reader (`dico_t2i/text_lines.py`):
UTF-8, or what a byte-order mark says; marks are no part of the text; a line ends at `\\n`, `\\r\\n` or `\\r` alone,
so U+2028, vertical tabs and form feeds stay in their line; bytes that are no text are an error with the line and the
character.

## What may change within a run

The network, the diffusion process, the frozen encoders, the seed, the batch and the order of the data stay as they
are once a run has a checkpoint; before that, and for all other keys, a new start may bring another config, and says
what has changed. A start that is refused writes nothing. A run folder that is copied or renamed goes on under its new
name (`name=NEW`). Each checkpoint keeps hashes of the encoders' weights: training, sampling, export, demo and
evaluations refuse to use others; checkpoints without them, of older versions, are used with a note.
"""


def reference() -> str:
    """The page, as Markdown."""
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
        """Sections in depth-first order, each once, with the keys it stands under; spans last."""
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
        """The sections in a type, through aliases."""
        names = (part for part in ast.walk(annotation) if isinstance(part, ast.Name))
        for part in sorted(names, key=lambda name: (name.lineno, name.col_offset)):
            if part.id in self._classes:
                yield part.id
            elif part.id in self._aliases:
                yield from self._sections(self._aliases[part.id])

    def _bases(self, name: str) -> list[str]:
        """The section whose keys a section has as well."""
        bases = [base.id for base in self._classes[name].bases if isinstance(base, ast.Name)]
        return [base for base in bases if base in self._classes and base != "Section"]

    def _kind(self, name: str) -> str:
        """Of a section that is chosen by it, from others that share a base."""
        kinds = [f.value for f in self._fields(name) if isinstance(f.target, ast.Name) and f.target.id == "kind"]
        value = next(iter(kinds), None)
        return str(ast.literal_eval(value)) if value is not None and self._bases(name) else ""

    def section(self, name: str, title: str) -> str:
        node = self._classes[name]
        text = ast.get_docstring(node)
        rows = "".join(self._row(field) for field in self._fields(name))
        also = "".join(f" With the keys of [{base}](#{base.lower()})." for base in self._bases(name))
        intro = f"{text}{also}\n\n" if text else ""
        head = f'\n<a id="{name.lower()}"></a>\n\n## {title}\n\n'
        return f"{head}{intro}| key | type | default | |\n| --- | --- | --- | --- |\n{rows}"

    def _fields(self, name: str) -> list[ast.AnnAssign]:
        fields = (node for node in self._classes[name].body if isinstance(node, ast.AnnAssign))
        return [field for field in fields if "ClassVar" not in ast.unparse(field.annotation)]

    def _row(self, field: ast.AnnAssign) -> str:
        assert isinstance(field.target, ast.Name)
        cells = (f"`{field.target.id}`", self._type(field.annotation), self._default(field), self._comment(field))
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
            case ast.Call(keywords=keywords):
                inner = ", ".join(f"{k.arg}: {_yaml(k.value)}" for k in keywords)
                return f"`{{{inner}}}`" if inner else "its defaults"
            case value:
                return f"`{_yaml(value)}`"

    def _comment(self, field: ast.AnnAssign) -> str:
        """What stands behind the field, or above it, in the source."""
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
    """A default as it is written in YAML."""
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
