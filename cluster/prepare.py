"""Prepare data as an array of jobs, each with its share of the shards.

    python cluster/prepare.py --tasks 16 --name latents -- data_prep/latents.py --data data/coco256 \\
        --out data/coco256_latents --autoencoder stabilityai/sd-vae-ft-ema

    python cluster/prepare.py --tasks 64 --name index -- -m dico_t2i.data data/laion

This works for every script that accepts --part K/N, writes shards atomically and makes only missing ones. After
failures, launch it again to make the rest. --after JOB starts it after a job; training can wait for it in the same way.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from cluster import jobs
from cluster.options import add_cluster_options, chosen_cluster
from cluster.works import ScriptJob
from dico_t2i.command import positive, run, script_parser

_LEAD_S = 60


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    parser.add_argument("--tasks", type=int, required=True, help="number of jobs in the array")
    parser.add_argument("--name", default="prepare", help="name of the jobs (default: prepare)")
    parser.add_argument("--parallel", type=positive, help="the most jobs at a time")
    parser.add_argument("--after", metavar="JOB", help="start after this job has ended successfully")
    parser.add_argument("--logs", type=Path, default=Path("runs/prepare"), help="for logs (default: runs/prepare)")
    parser.add_argument("script", nargs="+", help="after --: the script, or -m MODULE, and its arguments")
    add_cluster_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.tasks < 1:
        raise ValueError(f"--tasks {arguments.tasks}: must be at least 1")
    if arguments.script[0] != "-m" and not Path(arguments.script[0]).is_file():
        raise ValueError(f"{arguments.script[0]}: no such script")
    cluster = chosen_cluster(arguments)
    made = jobs.executor(
        cluster,
        arguments.name,
        arguments.logs,
        local=arguments.local,
        lead_s=_LEAD_S,
        ranks=False,
        after=arguments.after,
    )
    if not arguments.local:
        jobs.check(made, cluster, 1, arguments.logs.resolve() / "checked.sh")
    works = [ScriptJob((*arguments.script, "--part", f"{k}/{arguments.tasks}")) for k in range(arguments.tasks)]
    for job in jobs.submit(made, works, arguments.parallel):
        print(f"job {job.id}: log {job.log}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
