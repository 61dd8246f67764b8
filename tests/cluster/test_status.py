"""Listing runs: one that cannot be read is a row, names and steps are never cut; options that are refused at once."""

import fcntl
import json
from pathlib import Path

import pytest

from cluster import launch, prepare, status
from cluster.options import add_cluster_options
from cluster.state import holder
from dico_t2i.command import script_parser
from dico_t2i.runs.log import append

LONG = "a-run-with-a-rather-long-name-of-seventy-characters-as-sweeps-make-them"


@pytest.fixture
def runs(tmp_path, monkeypatch):
    for name in ("short", LONG, "broken", "locked"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("name: x\n")
        (folder / ".lock").write_text("process 1 on n1")
        append(folder / "metrics.jsonl", {"step": 0, "time": 0.0, "event": "start", "total_steps": 1234567})
        append(folder / "metrics.jsonl", {"step": 123456, "time": 1.0, "loss": 0.5, "images_per_s": 12.0, "eta_s": 9e5})
    append(tmp_path / "broken" / "metrics.jsonl", {"loss": 1})
    original = Path.open

    def refuse(self, mode="r", *arguments, **options):
        if self.parent.name == "locked" and self.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied")
        assert "+" not in mode, "to list runs needs no right to write"
        return original(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    return tmp_path


@pytest.mark.parametrize("width", [60, 80, 120])
def test_one_run_that_cannot_be_read_is_a_row_and_nothing_that_matters_is_cut(runs, monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", str(width))
    assert status.main(["--folder", str(runs)]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert "123456/1234567" in shown
    assert all(len(line) <= width for line in lines if line[:1] in "┏┃│└┡├")
    name = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert LONG in name
    assert "unreadable" in shown
    assert "locked: last failure at step ?: Permission denied" in shown
    assert "not shown in this narrow terminal" in shown


def test_without_a_terminal_all_columns_are_there(runs, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert status.main(["--folder", str(runs)]) == 0
    assert "restarts" in capsys.readouterr().out


def test_a_run_that_is_not_there_does_not_hide_the_others(runs, capsys):
    assert status.main(["--json", str(runs / "short"), str(runs / "absent"), str(runs / "broken")]) == 2
    out, err = capsys.readouterr()
    assert [(run["name"], run["word"]) for run in json.loads(out)] == [("short", "cut off"), ("broken", "unreadable")]
    assert "absent: no such run" in err


def test_the_holder_of_a_lock_is_seen_without_the_right_to_write(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on n1")
    assert holder(tmp_path) == ""
    (tmp_path / ".lock").chmod(0o444)
    assert holder(tmp_path) == ""
    with (tmp_path / ".lock").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)


@pytest.mark.parametrize("main", [launch.main, prepare.main])
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_of_parallel_runs_is_at_least_one(main, value, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--config", "x.yaml", "--tasks", "1", "--parallel", value, "script.py"])
    assert ended.value.code == 2
    assert "--parallel: " in capsys.readouterr().err


def test_every_cluster_option_has_help():
    parser = script_parser("")
    add_cluster_options(parser)
    assert [action.dest for action in parser._actions if not action.help] == []
