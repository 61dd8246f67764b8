"""The ``dico`` command. Heavy imports happen inside the commands, so that --help answers at once."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dico_t2i.command import non_negative, positive, run


def main(arguments: list[str] | None = None) -> None:
    """Parse and run; exits with 0, 2 (something to correct, said in one message), 130 or a command's own code."""
    parsed = _parser().parse_args(arguments)
    sys.exit(run(lambda: parsed.run(parsed), f"dico {parsed.command}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dico", description="Plan, train, sample and export DiCo.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (says, add_options, start) in _COMMANDS.items():
        command = commands.add_parser(name, help=says)
        add_options(command)
        command.set_defaults(run=start)
    return parser


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="a YAML file; see configs/")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")


def _train(arguments: argparse.Namespace) -> int:
    from dico_t2i.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from dico_t2i.training.ranks.distributed import leave_world
    from dico_t2i.training.trainer import train

    code = train(config, arguments.runs)
    leave_world()
    return code


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path)
    parser.add_argument("--cluster", type=Path, help="a profile; see configs/cluster/")
    parser.add_argument("--nodes", type=positive)
    parser.add_argument("--gpus-per-node", type=non_negative)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")


def _plan(arguments: argparse.Namespace) -> int:
    from dico_t2i.config import load_config, read_cluster

    config = load_config(arguments.config, arguments.overrides)
    changes = {
        key: getattr(arguments, key) for key in ("nodes", "gpus_per_node") if getattr(arguments, key) is not None
    }
    config = config.model_copy(update={"cluster": read_cluster(arguments.cluster, changes, config.cluster)})
    import json
    from dataclasses import asdict

    from rich.console import Console

    from dico_t2i.plan.plan import make_plan
    from dico_t2i.plan.text import refusal, render

    plan = make_plan(config)
    Console().print(render(plan), highlight=False)
    if arguments.json:
        content = {**asdict(plan), "hardware": plan.hardware.model_dump()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if not plan.estimate.fits:
        raise ValueError(refusal(plan))
    return 0


def _sampler_name(text: str) -> str:
    """The name of a sampler; the config, which knows them, is imported only when one is given."""
    from dico_t2i.config import SAMPLER_NAMES

    if text not in SAMPLER_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SAMPLER_NAMES)}")
    return text


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run, one of its checkpoints, or an export")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a text; may be given several times")
    what.add_argument("--prompts", type=Path, help="a file with a prompt on each line")
    what.add_argument("--labels", nargs="+", help='class numbers, or ImageNet names such as "golden retriever"')
    parser.add_argument("--out", required=True, type=Path, help="a folder for PNGs; new, empty, or of the same command")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the others count up from it")
    parser.add_argument("--per-prompt", type=positive, default=1, help="images of each prompt or label")
    parser.add_argument("--sampler", type=_sampler_name, metavar="NAME", help="default: the config's sampler.kind")
    parser.add_argument("--steps", type=positive)
    parser.add_argument(
        "--fast", action="store_true", help="dpm++ with 20 steps, unless --sampler or --steps say other"
    )
    parser.add_argument("--guidance", type=float, help="w of uncond + w (cond - uncond); 1 is none")
    parser.add_argument("--weights", help="weight, or an average such as ema_0.9999 (default: the first average)")
    parser.add_argument("--batch", type=positive, default=16, help="images sampled at a time (default: 16)")
    parser.add_argument("--decode-batch", type=positive, default=16, help="images decoded at a time (default: 16)")
    parser.add_argument(
        "--exact", action="store_true", help="through torch alone: in fp32, the bytes that diffusers gives"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")


def _sample(arguments: argparse.Namespace) -> int:
    from dico_t2i.commands import sample

    return sample.run(arguments)


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run or one of its checkpoints")
    parser.add_argument("--weights", help="weight, or an average such as ema_0.9999 (default: the first average)")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument(
        "--no-encoders", action="store_true", help="leave autoencoder and text encoder out of the folder"
    )


def _export(arguments: argparse.Namespace) -> int:
    from dico_t2i.export.folder import export

    export(arguments.checkpoint, arguments.weights, arguments.out, not arguments.no_encoders)
    print(f"exported to {arguments.out}")
    return 0


def _import_official_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a torch file or safetensors; nothing in it is executed")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--image-size", type=int, default=256, help="pixels it was trained on (default: 256)")
    parser.add_argument("--autoencoder", help="a folder or hub id (default: stabilityai/sd-vae-ft-ema)")
    parser.add_argument("--no-encoders", action="store_true", help="leave the autoencoder out of the folder")


def _import_official(arguments: argparse.Namespace) -> int:
    from dico_t2i.export.released import import_official

    name = import_official(
        arguments.file, arguments.out, arguments.image_size, arguments.autoencoder, not arguments.no_encoders
    )
    print(f"{name} in {arguments.out}")
    return 0


def _prefetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="a YAML file; with --check it may be left out")
    parser.add_argument("--out", required=True, type=Path, help="the folder; use it with DICO_WEIGHTS=FOLDER")
    parser.add_argument("--also", action="append", default=[], metavar="URL", help="a further file, to FOLDER/files")
    parser.add_argument("--check", action="store_true", help="verify the folder's hashes, and get nothing")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")


def _prefetch(arguments: argparse.Namespace) -> int:
    from dico_t2i.config import load_config

    if arguments.config is None and not arguments.check:
        raise ValueError("--config: give the config whose files are wanted")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if not arguments.check:
        os.environ["DICO_ALLOW_DOWNLOAD"] = "1"  # before huggingface_hub is imported: this command is the permission
    from dico_t2i.commands.prefetch import check, prefetch

    if config is not None and not arguments.check:
        prefetch(config, arguments.out, arguments.also)
        print(f"use it with: export DICO_WEIGHTS={arguments.out.absolute()}")
    print(f"{check(arguments.out, config)} files in {arguments.out}, all as they should be")
    return 0


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="look as well at the weights, data and disk space it needs")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")


def _doctor(arguments: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from dico_t2i.commands.doctor import examine
    from dico_t2i.config import load_config

    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    findings = []
    for finding in examine(config, arguments.runs):
        findings.append(finding)
        if not arguments.json:
            below = f"\n{'':21}"
            remedy = f"{below}-> {finding.remedy}" if finding.remedy else ""
            found = finding.found.replace("\n", below)
            print(f"{finding.state:<5} {finding.topic:<14} {found}{remedy}", flush=True)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return int(any(finding.state == "fail" for finding in findings))


def _completion_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    parser = _parser()
    for command in parser._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE
    print(shtab.complete(parser, arguments.shell))
    return 0


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="a run, one of its checkpoints, or an export")
    parser.add_argument("--compare", type=Path, help="a second one, sampled with the same seeds")
    parser.add_argument("--weights", help="weight, or an average such as ema_0.9999 (default: the first average)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: for others too (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)


def _demo(arguments: argparse.Namespace) -> int:
    from dico_t2i.commands.demo import check_gradio, serve

    check_gradio()
    from dico_t2i.commands.sample import choose_device

    checkpoints = [path for path in (arguments.checkpoint, arguments.compare) if path]
    serve(checkpoints, arguments.weights, *choose_device(arguments.dtype), arguments.host, arguments.port)
    return 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")


def _report(arguments: argparse.Namespace) -> int:
    from dico_t2i.report import write_report

    write_report(arguments.runs, arguments.out)
    print(f"report: {arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "train": ("train a run, or go on with it where it stopped", _train_options, _train),
    "plan": ("what a run will need: memory, time, communication, data; no GPU needed", _plan_options, _plan),
    "sample": ("make images from prompts or class labels", _sample_options, _sample),
    "export": ("write averaged weights, config and a diffusers pipeline into one folder", _export_options, _export),
    "import-official": ("make an exported folder of a released checkpoint", _import_official_options, _import_official),
    "prefetch": ("get every pretrained file a config needs into one folder", _prefetch_options, _prefetch),
    "doctor": ("look at this machine, and say what to change before training", _doctor_options, _doctor),
    "completion": ("print a script that completes commands and options with TAB", _completion_options, _completion),
    "demo": ("a web page to try a checkpoint on, or to compare two", _demo_options, _demo),
    "report": ("one HTML page about one run or several, to read off line", _report_options, _report),
}
