"""Launch training on SLURM, or on this machine.

    python cluster/launch.py --config configs/dico_h_t2i.yaml --nodes 16
    python cluster/launch.py --config configs/dico_h_t2i.yaml --nodes 16 --dry-run     (the plan and the sbatch script)
    python cluster/launch.py --config configs/dico_s_t2i.yaml --local --gpus-per-node 1 --follow
    python cluster/launch.py --config configs/dico_s_t2i.yaml --nodes 1 --sweep sweep.yaml --parallel 4

After its time limit, preemption or the failure of a node, the job is requeued and resumes exactly in its run folder.
A sweep is a YAML file with names and lists of overrides, {lr1: [optimizer.lr=1e-4], lr2: [optimizer.lr=2e-4]}.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from submitit.core.core import Executor
from submitit.slurm.slurm import SlurmExecutor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from cluster import jobs, slurm
from cluster.follow import follow
from cluster.options import add_cluster_options, chosen_cluster
from cluster.preflight import problems
from cluster.state import holder, measured_pause
from cluster.supervisor import TrainJob
from dico_t2i.command import positive, run, script_parser
from dico_t2i.config import ClusterConfig, Config, dump_config, load_config, read_yaml
from dico_t2i.runs.decisions import minutes, signal_lead_s
from dico_t2i.text_lines import read_text


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if not arguments.local and not arguments.dry_run:
        slurm.require()
    configs = _configs(arguments)
    if arguments.local and (len(configs) > 1 or configs[0].cluster.nodes > 1):
        raise ValueError("--local: one run on one node; leave out --sweep, and use --nodes 1")
    _check_python(configs[0].cluster)
    for config in configs:
        for stage in config.stage_configs:
            stage.batching(stage.cluster.ranks)  # raises if the ranks do not fit
        if not arguments.dry_run:
            _check_inputs(config, arguments.runs, arguments.after)
    return _launch(arguments, configs)


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file; see configs/")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="folder of the run folders, shared by all nodes (default: runs)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and write the sbatch script, but submit nothing"
    )
    parser.add_argument("--follow", action="store_true", help="show the log of rank 0 and failures until the job ends")
    parser.add_argument("--after", metavar="JOB", help="start after this job has ended successfully")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="launch one run for each entry, as a job array")
    parser.add_argument("--parallel", type=positive, help="the most runs of a sweep at a time")
    parser.add_argument("--no-plan", action="store_true", help="launch even if the plan says that it cannot fit")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")
    add_cluster_options(parser)
    return parser


def _configs(arguments: argparse.Namespace) -> list[Config]:
    """The config of the run, or of each run of the sweep."""
    if arguments.sweep is None:
        return [_config(arguments, [])]
    base = load_config(arguments.config, arguments.overrides).name
    entries = _sweep(arguments.sweep)
    configs = [_config(arguments, [f"name={base}-{key}", *entry]) for key, entry in entries.items()]
    names = [config.name for config in configs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"--sweep {arguments.sweep}: two entries make the run {twice}; do not set name in them")
    return configs


def _sweep(file: Path) -> dict[str, list[str]]:
    """The overrides of each run, by name. Raises ValueError for anything else, and for an empty file."""
    try:
        entries = read_yaml(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"--sweep {file}: not valid YAML: {error}") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, list) for entry in entries.values()):
        raise ValueError(f"--sweep {file}: expected names, each with a list of key.path=value")
    if not entries:
        raise ValueError(f"--sweep {file}: no runs in it; expected names, each with a list of key.path=value")
    return {str(key): [str(change) for change in entry] for key, entry in entries.items()}


def _config(arguments: argparse.Namespace, more: list[str]) -> Config:
    config = load_config(arguments.config, [*arguments.overrides, *more])
    return config.model_copy(update={"cluster": chosen_cluster(arguments, config.cluster)})


def _check_inputs(config: Config, runs: Path, after: str | None) -> None:
    """Raise ValueError if data, a model or the weights to start from are missing.

    Data and weights that the job ``after`` makes are not checked.
    """
    from dico_t2i.data.checks import check_data
    from dico_t2i.data.sources import load_data
    from dico_t2i.encoders import find_autoencoder
    from dico_t2i.encoders.conditioner import find_fitting_text_encoder
    from dico_t2i.runs.folder import RunFolder
    from dico_t2i.training.initial import check_initial

    find_autoencoder(config.autoencoder)
    if config.model.condition == "text":
        find_fitting_text_encoder(config)
    if after is None:
        check_initial(config, RunFolder(runs, config.name))
        for stage in config.stage_configs:
            check_data(stage, load_data(stage.data))


def _check_python(cluster: ClusterConfig) -> None:
    """Raise ValueError if the job's Python is missing or lacks packages here; the job checks it on the nodes."""
    if cluster.container:
        return
    python = cluster.python or sys.executable
    command = [python, "-m", "cluster.preflight", str(jobs.ROOT), "0"]
    environment = {**os.environ, "PYTHONPATH": str(jobs.ROOT)}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise ValueError(f"cluster.python: {python}: {error.strerror}; give one that all nodes can use") from None
    if answer.returncode:
        last = (answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"])[-1]
        raise ValueError(f"cluster.python: {python} cannot run this package: {last}")
    found = problems([{**json.loads(answer.stdout), "sees_run": True}], 0)
    if found:
        raise ValueError(f"cluster.python: {python}: {found[0]}")


def _launch(arguments: argparse.Namespace, configs: list[Config]) -> int:
    first, runs = configs[0], arguments.runs.resolve()
    name = first.name if arguments.sweep is None else f"{arguments.sweep.stem}.sweep"
    folder = runs / name / "jobs"
    lead = _lead(first, runs / first.name)
    made = jobs.executor(
        first.cluster, name, folder, local=arguments.local, lead_s=lead, ranks=True, after=arguments.after
    )
    for config in configs:
        _plan(config, arguments.no_plan)
        print(_describe(config, lead, arguments))
    if arguments.dry_run:
        return _dry_run(made, first, folder / "dry-run.sh")
    for config in configs:
        _check_free(runs / config.name)
    if not arguments.local:
        jobs.check(made, first.cluster, first.cluster.nodes, folder / "checked.sh")
    command = shlex.join(["python", *sys.argv])
    works = [TrainJob(config.name, dump_config(config), str(runs), command) for config in configs]
    submitted = jobs.submit(made, works, arguments.parallel)
    for job, config in zip(submitted, configs, strict=True):
        own = runs / config.name / "jobs"
        jobs.note(own, job, command)
        print(f"job {job.id}: {config.name}")
        print(f"  run folder: {runs / config.name}\n  job's log:  {job.log}\n  ranks' logs: {own / job.id}/rank-*.log")
    return follow(submitted[0], runs / first.name / "jobs" / submitted[0].id / "rank-0.log") if arguments.follow else 0


def _dry_run(made: Executor, config: Config, path: Path) -> int:
    """Write the script, and have SLURM check it if there is one."""
    if isinstance(made, SlurmExecutor):
        print(f"sbatch script: {jobs.script(made, path)}")
        if slurm.answers():
            jobs.check(made, config.cluster, config.cluster.nodes, path)
            print("SLURM would accept it")
        else:
            why = "its controller does not answer" if slurm.present() else "sbatch is not on this machine"
            print(f"SLURM did not check it: {why}")
    print("nothing was submitted")
    return 0


def _lead(config: Config, run_folder: Path) -> int:
    """The time between SLURM's signal to save and the time limit, in seconds."""
    limit_s = 60 * minutes(config.cluster.time)
    return signal_lead_s(limit_s, config.cluster.signal_lead_s, measured_pause(run_folder))


def _check_free(run_folder: Path) -> None:
    """Raise ValueError if a job uses the run folder, or waits in the queue for it."""
    active = [job for job in slurm.jobs(jobs.known(run_folder / "jobs")) if job.active] if slurm.present() else []
    for job in active:
        raise ValueError(
            f"{run_folder}: job {job.id} ({job.state}{', ' + job.nodes if job.nodes else ''}) uses it;"
            f" scancel {job.id}, or give the new run a different name (name=...)"
        )
    other = holder(run_folder)
    if other:
        raise ValueError(f"{run_folder}: in use by {other}; stop it, or give this run a different name (name=...)")


def _plan(config: Config, allow: bool) -> None:
    """Print the plan of each stage on GPUs. Raises ValueError, with settings that fit, if memory does not suffice."""
    if not config.cluster.gpus_per_node:
        return
    from rich.console import Console

    from dico_t2i.plan.plan import make_plans
    from dico_t2i.plan.text import refusals, render

    plans = make_plans(config)
    Console().print(render(plans), highlight=False)
    if (refused := refusals(plans)) and not allow:
        raise ValueError(f"{refused}\n  or use --no-plan to launch it anyway")


def _describe(config: Config, lead: int, arguments: argparse.Namespace) -> str:
    """A description of the request to the scheduler."""
    cluster = config.cluster
    batches = []
    for number, stage in enumerate(config.stage_configs):
        micro, accumulation = stage.batching(cluster.ranks)
        batch = f"batch {stage.train.global_batch} = {cluster.ranks} ranks x {micro} x {accumulation} pass(es)"
        batches.append(f"\n  stage {config.stages[number].name}: {batch}" if config.stages else f" {batch}")
    devices = "GPUs" if cluster.gpus_per_node else "CPU processes"
    where = "this machine" if arguments.local else f"partition {cluster.partition or '(default)'}"
    return (
        f"{config.name}: {cluster.nodes} x {cluster.ranks_per_node} {devices} on {where};{''.join(batches)}\n"
        f"time limit {cluster.time}, ranks save {lead} s before it; at most {cluster.max_requeues} requeues"
    )


if __name__ == "__main__":
    sys.exit(run(main))
