"""Every command of the documentation is one that its program takes, and the snippets of code and config hold.

A command is taken as far as the parser of the real program, with its configs, protocols and paths in the repository.
test_documented_commands.py and test_tutorial.py run those that can be run on small things.
"""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from dico_t2i.config import ClusterConfig, Config, load_config, parse_config, read_cluster
from tests.documents import PAGES, ROOT, Command, blocks, header_commands, page_commands, spans

EXECUTED = ROOT / "docs" / "tutorial.md"  # as a whole, by test_tutorial.py
FOLDERS = ("cluster", "configs", "data_prep", "docs", "evals", "tests")
STAND_INS = {"FILE": "configs/dico_s_t2i.yaml", "N": "2", "G": "8", "key.path=value": "seed=1", "...": ""}
CONFIG: dict[str, Any] = {
    "name": "snippet",
    "model": {"variant": "DiCo-S", "condition": "text"},
    "data": {"path": "data/snippet"},
    "train": {"duration": {"steps": 10}},
}


def _has_parser(file: Path) -> bool:
    """Whether it can be stopped where it parses its arguments; a config is no program."""
    return file.suffix != ".py" or "parse_args" in file.read_text(encoding="utf-8")


FILES = [
    file
    for pattern in ("configs/**/*.yaml", "data_prep/*.py", "evals/*.py", "cluster/*.py", "cluster/*.sh", "docs/*.py")
    for file in ROOT.glob(pattern)
]
COMMANDS = [
    *(command for page in PAGES if page != EXECUTED for command in page_commands(page)),
    *(command for file in sorted(FILES) if _has_parser(file) for command in header_commands(file)),
]
BLOCKS = [block for page in PAGES if page != EXECUTED for block in blocks(page)]


class Reached(BaseException):
    """A program has come to the parsing of its arguments."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: list[str]) -> None:
        self.parser, self.arguments = parser, arguments


class Parser:
    """Starts programs in this process, and stops them where they parse their arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._parse = argparse.ArgumentParser.parse_args

    def parse(self, run: Callable[[], Any], arguments: Sequence[str], whole: bool) -> argparse.Namespace | None:
        """What the program understands; None of a mention that lacks something, but whose options exist.

        Raises ValueError with the parser's words for what it does not take.
        """
        with self._monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["program", *arguments])
            patch.setattr(argparse.ArgumentParser, "parse_args", _stop)
            patch.setattr(argparse.ArgumentParser, "error", _refuse)
            try:
                run()
            except Reached as reached:
                parser, given = reached.parser, reached.arguments
            else:
                raise ValueError("ends before it parses its arguments")
            if not whole:
                _check_mention(parser, given)
            try:
                return self._parse(parser, given)
            except ValueError:
                if whole:
                    raise
                return None


def _stop(self: argparse.ArgumentParser, args: Sequence[str] | None = None, namespace: Any = None) -> None:
    raise Reached(self, list(sys.argv[1:] if args is None else args))


def _refuse(self: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(message)


def _check_mention(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Its subcommand and its options, up to another command's, exist. Raises ValueError."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            if words[0] not in action.choices:
                raise ValueError(f"no command {words[0]}")
            return _check_mention(action.choices[words[0]], words[1:])
    own = words[: words.index("--")] if "--" in words else words
    unknown = [word for word in own if word.startswith("--") and word not in parser._option_string_actions]
    if unknown:
        raise ValueError(f"no option {', '.join(unknown)}")
    return None


def check(command: Command, parser: Parser) -> None:
    """Raises ValueError for what is wrong with a command."""
    words = [stand_in for word in command.words if (stand_in := STAND_INS.get(word, word))]
    for word in words:
        if word.split("/")[0] in FOLDERS and "/" in word and not list(ROOT.glob(word)):
            raise ValueError(f"{word}: not there")
    program, *arguments = words
    whole = command.whole and "..." not in command.words
    if program in ("dico", "python", "torchrun"):
        _check_python(program, arguments, whole, parser)
    elif program == "make":
        _check_targets(arguments)
    elif program == "sbatch":
        given = words[next(i for i, word in enumerate(words) if word.endswith(".sh")) + 1 :]
        load_config(ROOT / given[0], given[1:])
    elif program == "pip":
        _check_extras(arguments)
    elif program == "wandb":
        _check_wandb(arguments)
    elif program not in ("source", "export", "tensorboard"):
        raise ValueError(f"nothing checks {program}")


def _check_python(program: str, arguments: list[str], whole: bool, parser: Parser) -> None:
    if program == "dico":
        arguments = ["-m", "dico_t2i", *arguments]
    elif program == "torchrun":
        arguments = ["-m", "torch.distributed.run", *arguments]
    if arguments[:2] == ["-m", "torch.distributed.run"]:
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(arguments[2:])
        arguments = [*(["-m"] if launch.module else []), launch.training_script, *launch.training_script_args]
    if arguments[0] == "-m":
        module, *arguments = arguments[1:]
        found = parser.parse(lambda: runpy.run_module(module, run_name="__main__"), arguments, whole)
    else:
        script, *arguments = arguments
        if not _has_parser(ROOT / script):
            return  # it would begin to work
        found = parser.parse(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"), arguments, whole)
    if found is not None:
        _check_values(found, whole, parser)


def _check_values(found: argparse.Namespace, whole: bool, parser: Parser) -> None:
    """Configs with their changes, protocols, and commands inside a command."""
    values = vars(found)
    if values.get("config"):
        load_config(ROOT / values["config"], values.get("overrides", ()))
    if (profile := values.get("cluster")) and profile.is_relative_to("configs"):
        read_cluster(ROOT / profile, {})
    if values.get("text_encoder"):
        load_config(ROOT / values["text_encoder"][0], values["text_encoder"][1:])
    if values.get("protocol"):
        from evals.quality.protocol import load_protocol

        load_protocol(values["protocol"], values["set"])
    if values.get("script"):
        _check_python("python", values["script"], whole, parser)


def _check_targets(arguments: list[str]) -> None:
    done = subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr)


def _check_extras(arguments: list[str]) -> None:
    """`pip install 'dico_t2i[extra]'`"""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [extra for word in arguments for group in re.findall(r"\[(.*)\]", word) for extra in group.split(",")]
    if arguments[0] != "install" or not set(wanted) <= set(known):
        raise ValueError(f"there are the extras {', '.join(known)}")


def _check_wandb(arguments: list[str]) -> None:
    """Paths stand for others, which are there."""
    import click
    from wandb.cli.cli import cli

    command, context = cli, click.Context(cli)
    words = ["/" if "/" in word else word for word in arguments]
    while isinstance(command, click.Group):
        name, *words = words
        command = command.get_command(context, name)
        if command is None:
            raise ValueError(f"wandb has no {name}")
    try:
        command.make_context(name, words)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> Parser:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Parser(monkeypatch)


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_programs_take_their_documented_arguments(command: Command, parser: Parser) -> None:
    check(command, parser)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.place)
def test_snippets_of_python_import_what_there_is(block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), block.place
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda block: block.place)
def test_snippets_of_yaml_are_configs_profiles_or_sweeps(block, tmp_path: Path) -> None:
    tree = yaml.safe_load(block.text)
    if set(tree) <= set(Config.model_fields):
        model = {**CONFIG["model"], **tree.get("model", {})}
        parse_config({**CONFIG, **tree, "model": model}, block.place)
    elif set(tree) <= set(ClusterConfig.model_fields):
        (tmp_path / "cluster.yaml").write_text(block.text)
        read_cluster(tmp_path / "cluster.yaml", {})
    else:
        for changes in tree.values():
            load_config(ROOT / "configs" / "coco_dwc.yaml", changes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    name = re.compile(rf"((?:dico_t2i|{'|'.join(FOLDERS)})/[\w./*-]*)(?:::(\w+))?")
    for place, span in spans(page):
        if match := name.fullmatch(span):
            found = list(ROOT.glob(match[1]))
            assert found, f"{place}: {span}"
            assert not match[2] or f"def {match[2]}(" in found[0].read_text(), f"{place}: {span}"


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} <= {"bash", "python", "yaml", ""}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("dico sample --checkpoint a --prompt b --out c --fastest", "unrecognized arguments: --fastest"),
        ("dico export --checkpoint a", "arguments are required: --out"),
        ("dico exprot --checkpoint a", "invalid choice: 'exprot'"),
        ("dico train --config configs/none.yaml", "none.yaml: not there"),
        ("dico train --config configs/coco_dwc.yaml train.zero=1", "train.zero"),
        ("torchrun --nproc-per-node 8 -m dico_t2i train", "arguments are required: --config"),
        ("python evals/fid.py a b", "evals/fid.py: not there"),
        ("python evals/coco_fid.py --checkpoint a --images b --captions c --protocol coco", "coco: unknown"),
        ("python cluster/prepare.py --tasks 2 -- data_prep/latents.py --data a", "arguments are required: --out"),
        ("make everything", "No rule to make target"),
        ("pip install 'dico_t2i[gpu]'", "there are the extras"),
        ("wandb sync --everything runs", "No such option"),
        ("rm -rf runs", "nothing checks rm"),
    ],
)
def test_a_wrong_command_is_noticed(words: str, problem: str, parser: Parser) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        check(Command("here", tuple(shlex.split(words))), parser)


def test_a_wrong_mention_is_noticed(parser: Parser) -> None:
    with pytest.raises(ValueError, match="no option --fastest"):
        check(Command("here", ("dico", "sample", "--fastest"), whole=False), parser)
