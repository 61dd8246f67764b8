"""What the documentation shows: code blocks, and the commands in them and in running text."""

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAMS = ("dico", "python", "torchrun", "make", "sbatch", "pip", "wandb")  # what starts a command in running text

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_OPTIONAL = re.compile(r"(?<=\s)\[([^][]*)\](?=\s|$)")
_CONTROL = {"&&", "||", ";", "|", "&"}
_REDIRECTIONS = {">", ">>", "<", "2>", "2>&1"}


@dataclass(frozen=True)
class Block:
    """Fenced code."""

    place: str  # page:line
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """whole: written to be typed as it stands; else a mention of a command, perhaps with a few of its options."""

    place: str
    words: tuple[str, ...]
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        yield Block(_place(page, text, match.start()), match[1], match[2])


def spans(page: Path) -> Iterator[tuple[str, str]]:
    """Place and text of code inside running text and tables."""
    text = _FENCE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text(encoding="utf-8"))
    for match in _SPAN.finditer(text):
        yield _place(page, text, match.start()), " ".join(match[1].split())


def page_commands(page: Path) -> Iterator[Command]:
    """Of bash blocks every command; of others, of running text and of tables those that begin as one."""
    for block in blocks(page):
        lines = _logical_lines(block.text)
        yield from (
            command
            for line in (lines if block.language == "bash" else filter(_is_command, lines))
            for command in parse(line, block.place)
        )
    for place, span in spans(page):
        if _is_command(span):
            yield from parse(span, place, whole=False)


def header_commands(file: Path) -> Iterator[Command]:
    """Of a script's docstring, or of a config's comments. An explanation beside a command is no part of it."""
    text = file.read_text(encoding="utf-8")
    header = ast.get_docstring(ast.parse(text)) or "" if file.suffix == ".py" else re.sub(r"^#", "", text, flags=re.M)
    for line in _logical_lines(header):
        command = re.split(r"\s{2,}", line.strip())[0]
        if _is_command(command):
            yield from parse(command, str(file.relative_to(ROOT)), whole="..." not in command)


def parse(line: str, place: str, whole: bool = True) -> Iterator[Command]:
    """The commands of a line of shell, without assignments before them, redirections and optional parts' brackets."""
    line = _OPTIONAL.sub(r"\1", re.sub(r"<(\w+)>", r"\1", line))
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    tokens = iter([*lexer, ";"])
    for token in tokens:
        if token in _REDIRECTIONS:
            next(tokens)
        elif token not in _CONTROL:
            words.append(token)
        elif words:
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                yield Command(place, tuple(words), whole)
            words = []


def _logical_lines(text: str) -> list[str]:
    """Without empty lines and comments, continued lines as one."""
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _is_command(text: str) -> bool:
    words = re.sub(r"^(\w+=\S* )+", "", text.strip()).split()
    return len(words) > 1 and words[0] in PROGRAMS and not words[1].endswith(":")


def _place(page: Path, text: str, position: int) -> str:
    return f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, position) + 1}"
