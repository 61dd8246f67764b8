"""Arrays of data preparation, evaluation that follows a run, jobs after jobs, sweeps: on a real SLURM."""

import json
import re
import subprocess

import numpy as np
import yaml

from cluster import slurm as commands
from dico_t2i.data.index import load_index
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.writer import ShardWriter
from tests.small_models import save_autoencoder

from .workplace import Workplace, job_id, state_of, until

RECORD = """
import pathlib, sys
checkpoint, out = map(pathlib.Path, sys.argv[1:])
(out / "seen.txt").write_text(checkpoint.name)
with pathlib.Path("seen.txt").open("a") as file:
    file.write(checkpoint.name + "\\n")
"""


def ended(job: str) -> bool:
    return not next(iter(commands.jobs([job]))).active


def write_images(folder, count=24):
    import io

    from PIL import Image

    random = np.random.default_rng(0)
    with ShardWriter(folder, samples_per_shard=4) as writer:
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "png")
            writer.write({"__key__": f"{number:03d}", "png": file.getvalue(), "txt": f"number {number}"})


def test_data_then_training_then_evaluation(slurm, workplace):
    """Latents by an array, restarted after a kill; training after it; a follower evaluates each checkpoint once."""
    images, latents = workplace.folder / "images", workplace.folder / "latents"
    write_images(images)
    autoencoder = str(save_autoencoder(workplace.folder / "autoencoder"))
    script = ["data_prep/latents.py", "--data", str(images), "--out", str(latents), "--autoencoder", autoencoder]
    script[0] = str(workplace.root / script[0])
    options = ["--cluster", str(workplace.profile), "--nodes", "1", "--tasks", "2", "--sbatch", "hold"]
    prepared = workplace.call("prepare.py", *options, "--", *script, "--size", "32", "--device", "cpu")
    array = job_id(prepared).partition("_")[0]

    data = [f"data.path={latents}", "data.image_size=32", "model.in_channels=4"]
    kl = f"autoencoder={{kind: kl, path: {autoencoder}}}"
    steps = ["train.duration.steps=40", "name=chained"]
    training = job_id(workplace.launch("--after", array, kl, *data, *steps))
    (workplace.folder / "record.py").write_text(RECORD)
    follow = ["--cluster", str(workplace.profile), "--run", "runs/chained", "--follow"]
    until(lambda: (workplace.runs / "chained").exists(), "the run folder")
    follower = job_id(workplace.call("evaluate.py", *follow, "--", "record.py", "{checkpoint}", "{out}"))
    assert state_of(training) == "PENDING"
    subprocess.run(["scontrol", "release", array], check=True)

    task = f"{array}_1"
    until(lambda: state_of(task) == "RUNNING", "the second task")
    subprocess.run(["scontrol", "requeue", task], check=True)
    until(lambda: ended(training) and ended(follower), "the end of the chain")
    assert [state_of(job) for job in (f"{array}_0", task, training, follower)] == ["COMPLETED"] * 4
    index = load_index(latents)
    assert len(index) == 24
    assert sorted(ShardReader(index).read(s, m)["__key__"] for s in range(6) for m in range(4)) == [
        f"{number:03d}" for number in range(24)
    ]
    seen = (workplace.folder / "seen.txt").read_text().split()
    assert seen == sorted(set(seen))
    assert seen[-1] == "step-00000040"
    assert (workplace.runs / "chained/evaluations/step-00000040/seen.txt").read_text() == "step-00000040"


def test_a_sweep_is_an_array_with_a_run_for_each_entry(slurm, workplace):
    sweep = workplace.folder / "sweep.yaml"
    sweep.write_text(yaml.safe_dump({"low": ["optimizer.lr=1e-4"], "high": ["optimizer.lr=1e-3"]}, sort_keys=False))
    output = workplace.launch("--nodes", "1", "--sweep", str(sweep), "--parallel", "1", "train.duration.steps=4")
    jobs = re.findall(r"^job (\S+): (\S+)$", output, re.MULTILINE)
    assert [name for _, name in jobs] == ["tiny-low", "tiny-high"]
    until(lambda: all(ended(job) for job, _ in jobs), "the end of the sweep")
    rows = json.loads(workplace.call("status.py", "--folder", "runs", "--json"))
    assert {row["name"]: (row["word"], row["job_state"]) for row in rows} == {
        "tiny-high": ("done", "COMPLETED"),
        "tiny-low": ("done", "COMPLETED"),
    }


def test_what_cannot_be_prepared_or_evaluated_is_told(workplace: Workplace):
    profile = ["--cluster", str(workplace.profile)]
    output = workplace.call("prepare.py", *profile, "--tasks", "2", "--", "nope.py", code=2)
    assert "nope.py: no such script" in output
    output = workplace.call("evaluate.py", *profile, "--run", "runs/x", "--", "record.py", code=2)
    assert "no {checkpoint}" in output
    (workplace.folder / "record.py").write_text(RECORD)
    output = workplace.call("evaluate.py", *profile, "--run", "runs/x", "--", "record.py", "{checkpoint}", code=2)
    assert "runs/x: no such run" in output
