"""Holds the simulator of long runs (`dico plan --simulate`) against a real run that is killed again and again.

    python evals/simulated_goodput.py --out runs/goodput        # 20 failures, about half an hour on two cores
    python evals/simulated_goodput.py --out runs/goodput --failures 5 --mtbf 30

A small network trains under the real supervisor of cluster/, on this machine. A rank is killed (SIGKILL) some time
after each start; the times are drawn from an exponential distribution. After the last kill the run saves once more and
is stopped. Its goodput, which is the part of all time that went into steps that count, is compared with two simulations
that get the times that the run itself has measured for a step, a save and a start: one with the same kills, and 1,000
with random ones.
"""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from cluster.state import complete_checkpoints
from cluster.supervisor import Supervisor, TrainJob
from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import Config, dump_config, parse_config
from dico_t2i.data.writer import ShardWriter
from dico_t2i.files import write_atomically
from dico_t2i.plan.job import job_of
from dico_t2i.plan.plan import make_plans
from dico_t2i.plan.simulate import SPENT, Interruption, Job, mean_goodput, simulate, simulate_run
from dico_t2i.runs.checkpoint import step_of
from dico_t2i.runs.log import json_lines

_POLL_S = 0.02
Rank = subprocess.Popen[bytes]


class Killer(threading.Thread):
    """Kills the rank of each start in turn, then waits for one more checkpoint, and stops the run."""

    def __init__(self, folder: Path, after_s: Sequence[float]) -> None:
        super().__init__(daemon=True)
        self.folder, self.after_s = folder, after_s
        self.supervisor: Supervisor | None = None  # of the current job
        self.kills: list[float] = []  # seconds from the beginning of a start to its kill
        self._victim: Rank | None = None

    def run(self) -> None:
        for seconds in self.after_s:
            rank, begun = self._next(), time.monotonic()
            self._wait(lambda: time.monotonic() >= begun + seconds)  # noqa: B023
            self.kills.append(time.monotonic() - begun)
            rank.kill()
        rank, before = self._next(), _newest(self.folder)
        self._wait(lambda: _newest(self.folder) > before)
        rank.send_signal(signal.SIGTERM)

    def _next(self) -> Rank:
        """The rank of the next start, as soon as there is one."""
        self._wait(lambda: bool(self.supervisor and self.supervisor.ranks[:1] not in ([], [self._victim])))
        assert self.supervisor
        self._victim = self.supervisor.ranks[0]
        return self._victim

    def _wait(self, until: Callable[[], bool]) -> None:
        while not until():
            time.sleep(_POLL_S)


def _newest(folder: Path) -> int:
    """The step of the newest complete checkpoint; 0 if there is none."""
    return max((step_of(path) for path in complete_checkpoints(folder)), default=0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for data, the run and the results")
    parser.add_argument("--failures", type=positive, default=20, help="how often a rank is killed (default: 20)")
    parser.add_argument("--mtbf", type=float, default=60.0, help="mean seconds from a start to a kill (default: 60)")
    parser.add_argument("--every", type=positive, default=50, help="steps between saves (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills (default: 0)")
    options = parser.parse_args(argv)
    if options.out.exists():
        raise ValueError(f"--out {options.out}: exists; give a new folder")
    _write_data(options.out / "data")
    config = _config(options.out, options.every)
    kills = np.random.default_rng(options.seed).exponential(options.mtbf, options.failures).tolist()
    seconds, done = train_under_fire(config, options.out.resolve(), kills)
    return compare(config, options.out, options.mtbf, seconds, done)


def _write_data(folder: Path) -> None:
    """Images of noise with labels."""
    generator = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(256):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file, "png")
            writer.write({"__key__": f"{number:04d}", "png": file.getvalue(), "cls": str(number % 4).encode()})


def _config(out: Path, every: int) -> Config:
    """A small network that trains until it is stopped."""
    return parse_config(
        {
            "name": "killed",
            "model": {"hidden_size": 32, "depths": [1, 1, 1, 1, 1], "mlp_ratio": 2, "in_channels": 3, "num_classes": 4},
            "autoencoder": {"kind": "pixels"},
            "data": {"path": str(out / "data"), "image_size": 16, "streams": 8, "workers": 0},
            "train": {"duration": {"steps": 10**6}, "global_batch": 8, "micro_batch": 8, "precision": "fp32"},
            "checkpoint": {"every": {"steps": every}},
            "log": {"every": {"steps": 10}, "wandb": "disabled"},
            "cluster": {"gpus_per_node": 0, "cpus_per_task": 1, "reliability": {"relaunch_hours": 0}},
        },
        "simulated_goodput",
    )


def train_under_fire(config: Config, out: Path, kills: Sequence[float]) -> tuple[float, list[float]]:
    """Train under the real supervisor while ranks are killed; returns the seconds, and when each kill really came.

    A job that gives up is launched again at once.
    """
    killer = Killer(out / config.name, kills)
    killer.start()
    begun = time.monotonic()
    for number in itertools.count(1):
        os.environ["SUBMITIT_LOCAL_JOB_ID"] = str(number)
        killer.supervisor = Supervisor(TrainJob(config.name, dump_config(config), str(out), "simulated_goodput.py"))
        try:
            killer.supervisor.run()
        except SystemExit:
            if not killer.is_alive():
                break
    return time.monotonic() - begun, killer.kills


def compare(config: Config, out: Path, mtbf_s: float, seconds: float, kills: Sequence[float]) -> int:
    """Compare the real run with simulated ones, and write goodput.json. Returns 1 if they differ by more than 10 %."""
    folder = out / config.name
    job = _job(config, folder, mtbf_s)
    failures = list(json_lines(folder / "failures.jsonl"))
    real = job.steps * job.step_s / seconds
    interruptions = iter([Interruption(after, "rank crashed") for after in kills])
    same = simulate_run(job, np.random.default_rng(0), interruptions)
    random = simulate(job, 1000)
    low, high = np.percentile([one.goodput for one in random], (10, 90)).tolist()
    result = {
        "kills": kills,
        "failures": len(failures),
        "jobs": len({failure["job"] for failure in failures}),
        "steps": job.steps,
        "seconds": seconds,
        "goodput": real,
        "simulated with the same kills": same.goodput,
        "simulated with random kills": mean_goodput(random),
        "10 % to 90 %": [low, high],
        "spent": {part: same.spent[part] for part in SPENT},
        "measured": {key: getattr(job, key) for key in ("step_s", "pause_s", "save_s", "load_s")}
        | {"start_s": job.site.start_s},
    }
    write_atomically(out / "goodput.json", (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))
    return int(abs(same.goodput / real - 1) > 0.1)


def _job(config: Config, folder: Path, mtbf_s: float) -> Job:
    """The job of the simulation: on a machine where nothing waits, and ranks crash at the rate of the kills."""
    job, _ = job_of(config, make_plans(config), folder)
    quiet = {"rank_mtbf_hours": mtbf_s / 3600, "node_mtbf_hours": 1e12, "queue_minutes": 0.0, "requeue_s": 0.0}
    site = job.site.model_copy(update=quiet)
    return replace(job, steps=_newest(folder), limit_s=float("inf"), lead_s=0.0, site=site)


if __name__ == "__main__":
    sys.exit(run(main))
