"""Where weights come from: the record in checkpoints and exports, and where it is shown."""

import json

import pytest

from dico_t2i.export.folder import export
from dico_t2i.report import write_report
from dico_t2i.runs.checkpoint import manifest_hash, newest_checkpoint
from dico_t2i.runs.lineage import KEY, ancestor, descended, lineage_table, read_lineage, with_stage
from tests.faults.harness import Run, write_data

FIRST = ancestor("init", "DiCo-XL-256.pt", "ab" * 32, None)
STAGE = ancestor("stage", "512 px", "cd" * 32, 12_000)


def test_the_record_of_a_source_comes_before_its_name():
    assert descended({}, FIRST) == [FIRST]
    second = ancestor("init", "runs/coco", "ef" * 32, 2000)
    assert descended({KEY: [FIRST, STAGE]}, second) == [FIRST, STAGE, second]


def test_a_stage_that_goes_on_after_a_resume_is_not_recorded_again():
    once = with_stage([FIRST], STAGE)
    assert once == with_stage(once, STAGE) == [FIRST, STAGE]


def test_hashes_are_shortened_and_steps_are_readable():
    assert lineage_table([FIRST, STAGE]) == [
        ["init", "DiCo-XL-256.pt", "", "abababababab"],
        ["stage", "512 px", "12,000", "cdcdcdcdcdcd"],
    ]


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_run_without_a_readable_record_has_none(tmp_path, content):
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "manifest.json").write_text(content)
    assert read_lineage(tmp_path) == []


def write_record(manifest, lineage):
    """Put a record into a checkpoint, as a run that has one does."""
    content = {**json.loads(manifest.read_text()), KEY: lineage}
    del content["sha256"]
    manifest.write_text(json.dumps({**content, "sha256": manifest_hash(content)}))


def test_a_run_keeps_its_record_and_shows_it(tmp_path):
    """Through a save, a resume, an export, the report and the card."""
    run = Run(tmp_path, write_data(tmp_path / "data"), "run", "train.duration.steps=2")
    run.train(ranks=1)
    assert read_lineage(run.path) == []
    write_record(newest_checkpoint(run.checkpoints).path / "manifest.json", [FIRST, STAGE])
    run.train("train.duration.steps=3", ranks=1)  # another save, by another process
    checkpoint = newest_checkpoint(run.checkpoints)
    assert checkpoint.step == 3
    assert checkpoint.state[KEY] == read_lineage(run.path) == [FIRST, STAGE]
    assert len(checkpoint.sha256) == 64
    export(run.path, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "export.json").read_text())[KEY] == [FIRST, STAGE]
    assert "## Lineage\n\n| what | from | step | sha256 |" in (tmp_path / "out" / "README.md").read_text()
    write_report([run.path], tmp_path / "report.html")
    assert "<td>DiCo-XL-256.pt</td>" in (tmp_path / "report.html").read_text()
