"""What the doctor finds on this machine, and in configs with something missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dico_t2i import cli
from dico_t2i.commands.doctor import examine
from dico_t2i.config import parse_config
from tests.faults.harness import CONFIG, write_data

ROOT = Path(__file__).resolve().parents[1]


def doctor(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", *map(str, arguments)])
    return ended.value.code


def test_a_run_that_can_start_has_no_failures(tmp_path, capsys):
    data = write_data(tmp_path / "data")
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "path": str(data)}}))
    code = doctor("--config", config, "--runs", tmp_path / "runs", "--json")
    findings = {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert code == 0
    assert {"python", "packages", "torch", "gloo", "/dev/shm", "runs folder", "autoencoder"} <= findings.keys()
    assert "a checkpoint takes" in findings["runs folder"]["found"]
    assert "samples/s" in findings["reading"]["found"]
    assert all(finding["remedy"] for finding in findings.values() if finding["state"] != "ok")


def test_what_is_missing_fails_with_its_remedy(tmp_path, capsys):
    tree = {**CONFIG, "data": {**CONFIG["data"], "path": str(tmp_path / "none")}}
    tree["autoencoder"], tree["data"]["image_size"] = {"path": "nobody/no-such-vae"}, 32
    tree["model"] = {**CONFIG["model"], "in_channels": 4}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert doctor("--config", tmp_path / "config.yaml", "--runs", tmp_path) == 1
    text = capsys.readouterr().out
    assert "fail  autoencoder" in text
    assert "-> dico prefetch --config FILE" in text
    assert "fail  data" in text
    assert "no such data folder" in text


def test_an_unwritable_runs_folder_and_data_without_an_index(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    config = parse_config({**CONFIG, "data": {**CONFIG["data"], "path": str(data)}}, "test")
    findings = {finding.topic: finding for finding in examine(config, Path("/proc/runs"))}
    assert findings["data"].state == "warn"
    assert "python -m dico_t2i.data" in findings["data"].remedy
    assert findings["runs folder"].state == "fail"


def test_help_is_quick_and_completion_knows_the_commands(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-X", "importtime", "-m", "dico_t2i", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    helped = run("--help")
    loaded = {line.rpartition("|")[2].strip() for line in helped.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "pydantic", "yaml", "rich", "shtab"}
    script = tmp_path / "dico.bash"
    script.write_text(run("completion", "bash").stdout)
    shell = f"source {script}; COMP_WORDS=(dico imp); COMP_CWORD=1; _shtab_dico; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "import-official", done.stderr
