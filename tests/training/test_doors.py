"""What a run leaves behind, what it accepts again, and what is checked wherever its weights are used."""

import json
import os
import shutil
import sys

import pytest
import torch
import yaml

from dico_t2i.cli import main
from dico_t2i.config import ConfigError, load_config
from dico_t2i.export.folder import export
from dico_t2i.report import write_report
from dico_t2i.runs.checkpoint import manifest_hash, newest_checkpoint
from dico_t2i.runs.folder import RunFolder
from dico_t2i.runs.log import LogWriter, append, json_lines
from dico_t2i.sampling.pipeline import load_pipeline
from dico_t2i.training.observers.memory_report import memory_report
from tests import forkserver
from tests.ports import free_port
from tests.small_models import save_autoencoder

CPU = torch.device("cpu")
LATENTS = ("model.in_channels=4", "data.image_size=32")


def load(path):
    return load_pipeline(path, None, CPU, torch.float32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes_data):
    """Two steps of a run with an autoencoder, which lies beside it."""
    from tests.training.conftest import TINY, Runs

    folder = tmp_path_factory.mktemp("doors")
    runs = Runs(folder, shapes_data)
    tree = yaml.safe_load(runs.config.read_text())
    assert tree["model"] == TINY["model"]
    tree["autoencoder"] = {"path": str(save_autoencoder(folder / "vae"))}
    tree["model"] = {**TINY["model"], "in_channels": 4}
    tree["data"]["image_size"] = 32
    tree["train"]["duration"] = {"steps": 2}
    runs.config.write_text(yaml.safe_dump(tree))
    runs.train("run")
    return runs


def other_autoencoder(folder):
    """The same files with other weights."""
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        model.decoder.conv_out.bias += 0.5
    model.save_pretrained(folder)


def copied(runs, tmp_path):
    """The run in a folder of its own, with a copy of its autoencoder."""
    shutil.copytree(runs.folder / "run", tmp_path / "run")
    shutil.copytree(runs.folder / "vae", tmp_path / "vae")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(runs.folder / "vae"), str(tmp_path / "vae")))
    return tmp_path / "run"


def test_another_autoencoder_is_refused_at_every_door(trained, tmp_path):
    run = copied(trained, tmp_path)
    load(run)  # the same weights in another place
    export(run, None, tmp_path / "good")
    other_autoencoder(tmp_path / "vae")
    for door in (lambda: load(run), lambda: export(run, None, tmp_path / "bad")):
        with pytest.raises(ConfigError, match="was trained with a different autoencoder: weights was"):
            door()
    load(tmp_path / "good")  # which has the first one with it
    other_autoencoder(tmp_path / "good" / "vae")
    with pytest.raises(ConfigError, match="different autoencoder"):
        load(tmp_path / "good")
    command = [sys.executable, "-m", "dico_t2i", "train", "--config", str(run / "config.yaml")]
    done = forkserver.run(
        [*command, "--runs", str(tmp_path), "train.duration.steps=4"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "was trained with a different autoencoder" in done.stderr
    assert "steps: 2" in (run / "config.yaml").read_text()  # nothing was written


def test_another_text_encoder_is_refused(trained, tmp_path):
    run = copied(trained, tmp_path)
    config = run / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["text_encoder"]["seeded"]["seed"] = 1
    config.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="different text_encoder: weights was"):
        load(run)


def test_a_checkpoint_that_names_no_encoders_is_accepted_with_a_note(trained, tmp_path, capsys):
    run = copied(trained, tmp_path)
    path = newest_checkpoint(run / "checkpoints").path / "manifest.json"
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("encoders", "sha256")}
    path.write_text(json.dumps({**manifest, "sha256": manifest_hash(manifest)}))
    other_autoencoder(tmp_path / "vae")
    load(run)
    assert "does not say which encoders it was trained with" in capsys.readouterr().err


def test_an_export_copied_without_its_link(trained, tmp_path):
    export(trained.folder / "run", None, tmp_path / "export")
    files = [path for path in (tmp_path / "export").rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {(tmp_path / "export/config.yaml").stat().st_mode & 0o777}
    whole = load(tmp_path / "export")
    (tmp_path / "export" / "model.safetensors").unlink()
    same = load(tmp_path / "export")
    for ours, theirs in zip(whole.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (tmp_path / "export" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="this exported folder lacks its weights"):
        load(tmp_path / "export")


def sample(run, out, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["sample", "--checkpoint", str(run), "--out", str(out), "--fast", *arguments])
    return ended.value.code


def test_sampling_goes_on_where_it_was_stopped(trained, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("a red circle\na\u2028b\r\n\na blue square\x0bc\rlast".encode("utf-8-sig"))
    options = ["--prompts", str(prompts), "--batch", "2"]
    assert sample(trained.folder / "run", tmp_path / "whole", *options) == 0
    names = [f"0000{number}.png" for number in range(4)]
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in names}
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [*names, "grid.png", "sample.json"]
    for gone in (names[2:], [names[1]], names):
        shutil.copytree(tmp_path / "whole", tmp_path / gone[0])
        for name in (*gone, "grid.png"):
            (tmp_path / gone[0] / name).unlink()
        (tmp_path / gone[0] / f".{gone[0]}.0.part").write_bytes(b"half")
        assert sample(trained.folder / "run", tmp_path / gone[0], *options) == 0
        assert {name: (tmp_path / gone[0] / name).read_bytes() for name in names} == whole
    capsys.readouterr()
    assert sample(trained.folder / "run", tmp_path / "whole", *options, "--seed", "3") == 2
    assert "holds images of a different command (first seed differ" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert sample(trained.folder / "run", tmp_path / "other", *options) == 2
    assert "it is not empty, and nothing is overwritten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "caf\udce9"], "--prompt 1: character 4: 0xe9 is not UTF-8 text"),
        (["--prompt", "a", "--seed", str(1 << 63)], "must lie between -2^63 and 2^63 - 1"),
        (["--prompt", "a", "--per-prompt", "2", "--seed", str((1 << 63) - 1)], "must lie between -2^63 and 2^63 - 1"),
        (["--prompt", "a", "--guidance", "nan"], "guidance: Input should be a finite number"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(trained, tmp_path, capsys, arguments, message):
    assert sample(trained.folder / "run", tmp_path / "out", *arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_a_first_start_that_failed_leaves_nothing_in_the_way(runs):
    output = runs.train("first", "autoencoder={kind: kl, path: /nowhere}", *LATENTS, code=2)
    assert "/nowhere" in output
    assert not (runs.folder / "first").exists()
    runs.train("first", "train.duration.steps=1")


def test_a_run_without_a_checkpoint_may_be_reconfigured(runs):
    folder = RunFolder(runs.folder, "early")
    folder.write_config(load_config(runs.config, ["name=early", "seed=1", "model.mlp_ratio=4"]))
    assert len(folder.changes(load_config(runs.config, ["name=early"]))) == 2
    (folder.checkpoints / "step-00000001").mkdir(parents=True)
    assert folder.changes(load_config(runs.config, ["name=early"]))  # one that was never completed
    (folder.checkpoints / "step-00000001" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.mlp_ratio") as error:
        folder.changes(load_config(runs.config, ["name=early"]))
    assert "remove" not in str(error.value)


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_run_goes_on_under_a_new_name(runs, how):
    runs.train("old", "train.duration.steps=2")
    how(str(runs.folder / "old"), str(runs.folder / "new"))
    output = runs.train("new", "train.duration.steps=3")
    assert "name: 'old' -> 'new'" in output
    assert runs.losses("new").keys() == {1, 2, 3}


def test_a_duration_in_the_past_is_told_at_once(runs):
    runs.train("past", "train.duration.steps=4")
    output = runs.train("past", "train.duration.steps=3")
    assert "[done] already at 4 of 3 steps, nothing to do" in output
    assert "steps 4 to 3" not in output
    write_report([runs.folder / "past"], runs.folder / "report.html")
    page = (runs.folder / "report.html").read_text()
    assert "4 of 3, nothing to do" in page
    assert "already at 4 of 3 steps" in page
    export(runs.folder / "past", None, runs.folder / "export", encoders=False)
    assert "4; the config's duration was set to 3 steps afterwards" in (runs.folder / "export/README.md").read_text()


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', '{"step": 3}', ""])
def test_a_torn_line_swallows_no_other(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    writer = LogWriter(path)
    writer.write({"step": 4})
    writer.write({"step": 5})
    writer.close()
    append(path, {"step": 6})
    assert [line["step"] for line in json_lines(path)] == [1, 2, *([3] if torn.endswith("}") else []), 4, 5, 6]


def test_a_line_that_did_not_fit_on_the_disk_leaves_nothing(tmp_path):
    writer = LogWriter(tmp_path / "log.jsonl")
    original = writer._file
    writer._file = type(
        "Full",
        (),
        {"write": lambda _, data: original.write(data[:5]), "seek": original.seek, "truncate": original.truncate},
    )()
    with pytest.raises(OSError, match="only 5 of"):
        writer.write({"step": 1})
    writer._file = original
    writer.write({"step": 2})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n'


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR=no-such-host.invalid: cannot be resolved"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999: not a port"),
        ({}, "in use on"),
    ],
)
def test_a_meeting_that_cannot_be_is_one_line(runs, environment, message):
    import socket

    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        meeting = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = forkserver.run(
            [sys.executable, *runs.command("meeting")],
            env={**os.environ, **meeting, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert message in line
    assert free_port()


def test_bf16_on_a_cpu_that_is_slow_at_it_is_told(runs):
    from dico_t2i.plan.cost import product_rate

    slow = product_rate(CPU, torch.float32) > 2 * product_rate(CPU, torch.bfloat16)
    output = runs.train("bf16", "train.precision=bf16", "train.duration.steps=2")
    assert not slow or "set train.precision=fp32" in output
    assert all(m["flops_utilization"] <= 1 for m in runs.metrics("bf16") if "loss" in m)


@pytest.mark.parametrize(("size", "text"), [(3e9, "3.00 GB"), (4.2e7, "42.00 MB"), (5e4, "50.00 kB"), (0, "0.00 kB")])
def test_memory_in_a_unit_that_tells_something(size, text):
    assert memory_report({"weights": size}, 5e9, None).startswith(f"weights {text}, ")


def test_expected_memory_in_another_unit():
    assert memory_report({"weights": 1e6}, 2e6, {"weights": 2e9}).startswith("weights 1.00 MB (2.00 GB)")
