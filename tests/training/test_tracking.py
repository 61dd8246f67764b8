import json
import struct
import sys
import time

import pytest

from dico_t2i.config import load_config
from dico_t2i.training.observers.tracking import Tracking, log_evaluation
from tests import forkserver

SETTINGS = ("log.wandb=offline", "log.tensorboard=true", "log.wandb_artifacts=true", "train.duration.steps=12")
PREVIEW = ("preview.every.steps=6", "preview.prompts=[a red circle]", "preview.sampler.steps=2")


def wandb_records(file):
    """The records of an offline run: after 7 bytes of header, a log of LevelDB's in blocks of 32 KiB.

    The last part of a file that is still written may be cut off; it is not read.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, parts = file.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        if at + 7 + length > len(content):
            return
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def offline_runs(folder):
    """What each start sent, in the order of time; files are complete a moment after the run has finished."""
    deadline = time.monotonic() + 60
    while True:
        files = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)
        runs = [list(wandb_records(file)) for file in files]
        if all(of_kind(records, "exit") for records in runs):
            return runs
        assert time.monotonic() < deadline, files
        time.sleep(0.1)


def history(records):
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def of_kind(records, kind):
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def configs(records):
    """Values set by any update, at first or later."""
    found = {}
    for update in [*(run.config for run in of_kind(records, "run")), *of_kind(records, "config")]:
        for item in update.update:
            found[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return found


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, shapes_data):
    from tests.training.conftest import Runs

    runs = Runs(tmp_path_factory.mktemp("tracked"), shapes_data)
    runs.stop_at(5, "tiny", *SETTINGS, *PREVIEW)
    runs.train("tiny", *SETTINGS, *PREVIEW, "optimizer.lr=5e-4")
    return runs


def test_wandb_gets_one_run_with_config_code_numbers_and_pictures(tracked):
    folder = tracked.folder / "tiny"
    first, second = offline_runs(folder)
    identity = (folder / "wandb_id").read_text()
    assert {run.run_id for records in (first, second) for run in of_kind(records, "run")} == {identity}
    config = configs(second)
    assert config["optimizer"]["lr"] == 5e-4
    assert config["parameters"] > 0
    started = json.loads((folder / "starts" / "0001.json").read_text())
    assert (config["start"]["commit"], config["start"]["command"]) == (started["commit"], started["command"])
    losses = {row["_step"]: row["loss"] for records in (first, second) for row in history(records) if "loss" in row}
    assert losses == tracked.losses("tiny")
    pictures = [
        row for records in (first, second) for row in history(records) if "samples._type" in row or "samples" in row
    ]
    assert [row["_step"] for row in pictures] == [6, 12]
    assert list(folder.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    assert list(folder.glob("wandb/offline-run-*/files/starts/0001.json"))


def test_wandb_is_told_how_a_start_ended_and_what_the_checkpoint_is(tracked):
    first, second = offline_runs(tracked.folder / "tiny")
    assert [e.exit_code for e in of_kind(first, "exit")] == [75]
    assert [e.exit_code for e in of_kind(second, "exit")] == [0]
    assert of_kind(first, "preempting")
    assert not of_kind(second, "preempting")
    for records, step in ((first, 5), (second, 12)):
        (artifact,) = of_kind(records, "artifact")
        assert (artifact.name, artifact.type) == ("tiny-checkpoint", "checkpoint")
        assert sorted(entry.path for entry in artifact.manifest.contents) == ["config.yaml", "manifest.json"]
        assert json.loads(artifact.metadata)["step"] >= step


def test_wandb_alerts_when_a_run_goes_back(runs):
    config = load_config(runs.config, ["log.wandb=offline", f"name={'long' * 30}"])
    folder = runs.folder / "alerts"
    folder.mkdir()
    tracking = Tracking(config, folder)
    tracking.event(8, "rollback", "back from step 8 to step 4", {})
    tracking.event(9, "samples", "a grid", {})
    tracking.event(9, "failed", "TrainingError: it did not help", {})
    tracking.finish()
    (records,) = offline_runs(folder)
    alerts = [(alert.title, alert.level) for alert in of_kind(records, "alert")]
    assert alerts == [("rollback at step 8", "ERROR"), ("failed at step 9", "ERROR")]
    assert [e.exit_code for e in of_kind(records, "exit")] == [1]


def test_evaluations_get_a_run_beside_it_with_a_table(tracked, capsys):
    folder = tracked.folder / "tiny"
    config = load_config(folder / "config.yaml")
    result = {"step": 6, "protocol": {"name": "coco"}, "protocol_hash": "ab", "comparable": True}
    for step, fid in ((6, 9.0), (12, 8.0)):
        file = folder / "evals" / "coco" / f"{step:08d}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**result, "step": step, "numbers": {"fid": fid}}))
    log_evaluation(config, folder, json.loads(file.read_text()), None)
    assert capsys.readouterr().err == ""
    records = offline_runs(folder)[-1]
    assert of_kind(records, "run")[0].run_id == (folder / "wandb_id").read_text() + "-evals"
    (row,) = [row for row in history(records) if "coco/fid" in row]
    assert (row["checkpoint_step"], row["coco/fid"]) == (12, 8.0)
    (table,) = folder.glob("wandb/offline-run-*-evals/files/media/table/evaluations_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "protocol", "hash", "comparable", "fid"]
    assert content["data"] == [[6, "coco", "ab", True, 9.0], [12, "coco", "ab", True, 8.0]]


def test_tensorboard_reads_back_what_metrics_say(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked.folder / "tiny" / "tensorboard"), {"images": 0, "scalars": 0, "tensors": 0})
    events.Reload()
    shown = {event.step: event.value for event in events.Scalars("loss")}
    assert shown == pytest.approx(tracked.losses("tiny"), rel=1e-6)
    assert [image.step for image in events.Images("samples")] == [6, 12]
    tags = events.Tags()["tensors"]
    assert {"config/text_summary", "event/start/text_summary", "event/stop/text_summary"} <= set(tags)


def test_tensorboard_forgets_what_a_run_that_went_back_had_logged(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(runs.config, ["log.tensorboard=true"])
    tracking = Tracking(config, runs.folder)
    for step in (1, 2, 3, 4):
        tracking.log(step, {"loss": float(step)})
    tracking.event(2, "rollback", "back from step 4 to step 2", {})
    tracking.log(3, {"loss": 30.0})
    tracking.finish()
    events = EventAccumulator(str(runs.folder / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_tracker_that_fails_is_turned_off_and_the_others_go_on(runs, capsys):
    config = load_config(runs.config, ["log.tensorboard=true", "log.wandb=offline"])
    tracking = Tracking(config, runs.folder)
    tracking.image(1, runs.folder / "no-such.png")
    tracking.log(1, {"loss": 1.0})
    tracking.finish()
    said = capsys.readouterr().err
    assert "wandb failed and is turned off" in said
    assert "tensorboard failed and is turned off" in said


def test_tensorboard_missing_is_an_error_before_anything_else(runs):
    code = "import sys; sys.modules['tensorboard'] = None; from dico_t2i.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *runs.command("tiny", "log.tensorboard=true")[2:]]
    ended = forkserver.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "pip install 'dico_t2i[tensorboard]'" in ended.stderr
    assert not (runs.folder / "tiny").exists()
