"""Evaluate a run's checkpoints in a separate job, without delaying the training.

    python cluster/evaluate.py --run runs/NAME -- evals/coco_fid.py --checkpoint {checkpoint} --protocol ...
    python cluster/evaluate.py --run runs/NAME --follow -- ...        each new checkpoint, until the run is done
    python cluster/evaluate.py --run runs/NAME --after JOB -- ...     the newest one, after the job JOB
    ... -- -m torch.distributed.run --nproc-per-node 8 evals/coco_fid.py ...     on all GPUs of the node

{checkpoint} is replaced by the checkpoint's folder, and {out} by a folder for results, runs/NAME/evaluations/step-STEP,
which also gets the script's output. The scripts of evals/ need no {out}, since they write to runs/NAME/evals. Each
checkpoint is evaluated only once. Several different evaluations of a run need different names: --name replaces
"evaluations" in the folder.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from cluster import jobs
from cluster.options import add_cluster_options, chosen_cluster
from cluster.works import EvaluationJob
from dico_t2i.command import run, script_parser

_LEAD_S = 60


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a run folder")
    parser.add_argument("--follow", action="store_true", help="evaluate each new checkpoint until the run is done")
    parser.add_argument("--after", metavar="JOB", help="start after this job has ended successfully")
    parser.add_argument("--name", default="evaluations", help="folder in the run (default: evaluations)")
    parser.add_argument("script", nargs="+", help="after --: the script and its arguments")
    add_cluster_options(parser)
    arguments = parser.parse_args(argv)
    if not any("{checkpoint}" in part for part in arguments.script):
        raise ValueError("the script's arguments have no {checkpoint}, which stands for the folder to evaluate")
    script = next((part for part in arguments.script if part.endswith(".py")), arguments.script[0])
    if not Path(script).is_file():
        raise ValueError(f"{script}: no such script")
    folder = arguments.run.resolve()
    if not (arguments.after or arguments.follow or folder.is_dir()):
        raise ValueError(f"--run {arguments.run}: no such run")
    cluster = chosen_cluster(arguments)
    made = jobs.executor(
        cluster,
        f"evaluate-{folder.name}",
        folder / "jobs" / arguments.name,
        local=arguments.local,
        lead_s=_LEAD_S,
        ranks=False,
        after=arguments.after,
    )
    if not arguments.local:
        jobs.check(made, cluster, 1, folder / "jobs" / arguments.name / "checked.sh")
    work = EvaluationJob(str(folder), arguments.name, tuple(arguments.script), arguments.follow)
    (job,) = jobs.submit(made, [work])
    print(f"job {job.id}: log {job.log}\n  results: {folder / arguments.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
