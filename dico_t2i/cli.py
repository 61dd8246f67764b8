"""The ``dico`` command. Slow imports are inside the commands, so that --help answers at once."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dico_t2i.command import non_negative, place, positive, run


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments and run the command; exits with 0, 2 (an error to correct), 130 or the command's own code."""
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
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the run folders (default: runs)")
    parser.add_argument("--stage", metavar="NAME", help="begin at this stage, and leave out those before it")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")


def _train(arguments: argparse.Namespace) -> int:
    from dico_t2i.config import load_config

    config = load_config(arguments.config, arguments.overrides)
    from dico_t2i.training.ranks.distributed import leave_world
    from dico_t2i.training.trainer import train

    code = train(config, arguments.runs, begin=arguments.stage)
    leave_world()
    return code


def _plan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=Path, help="a YAML file; see configs/")
    parser.add_argument("--cluster", type=Path, help="a cluster profile; see configs/cluster/")
    parser.add_argument("--nodes", type=positive, help="number of nodes (default: the config's)")
    parser.add_argument("--gpus-per-node", type=non_negative, help="GPUs of each node (default: the config's)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--simulate",
        action="store_true",
        help="simulate the run with failures, preemption and waits (cluster.reliability)",
    )
    what.add_argument(
        "--sweep-nodes", type=_counts, metavar="1,2,4", help="predict how the speed grows with the number of nodes"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="RUN", help="with --simulate: take the times of steps, saves, starts of a run"
    )
    parser.add_argument(
        "--times", type=positive, default=1000, metavar="N", help="with --simulate: how often (default: 1000)"
    )
    parser.add_argument("--seed", type=non_negative, default=0, help="with --simulate: seed of the draws (default: 0)")
    parser.add_argument(
        "--per-gpu",
        type=positive,
        metavar="N",
        help="with --sweep-nodes: samples of a GPU and step (default: train.micro_batch)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the simulation or the sweep, as a PNG")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")


def _counts(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    return [positive(part) for part in text.split(",")]


def _plan(arguments: argparse.Namespace) -> int:
    from dico_t2i.config import load_config, read_cluster

    config = load_config(arguments.config, arguments.overrides)
    changes = {
        key: getattr(arguments, key) for key in ("nodes", "gpus_per_node") if getattr(arguments, key) is not None
    }
    config = config.model_copy(update={"cluster": read_cluster(arguments.cluster, changes, config.cluster)})
    from dico_t2i.plan.command import print_plan, print_simulation, print_sweep

    if arguments.plot and not (arguments.simulate or arguments.sweep_nodes):
        raise ValueError("--plot: it draws what --simulate or --sweep-nodes computes; give one of them")
    if arguments.sweep_nodes:
        per_gpu = arguments.per_gpu or config.train.micro_batch
        print_sweep(config, arguments.sweep_nodes, per_gpu, arguments.plot, arguments.json)
    elif arguments.simulate:
        given = arguments.measured, arguments.times, arguments.seed
        print_simulation(config, *given, arguments.plot, arguments.json)
    else:
        print_plan(config, arguments.json)
    return 0


def _sampler_name(text: str) -> str:
    """The name of a sampler; the config, which lists the names, is imported only if one is given."""
    from dico_t2i.config import SAMPLER_NAMES

    if text not in SAMPLER_NAMES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(SAMPLER_NAMES)}")
    return text


def _sample_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=place, help="a run, one of its checkpoints, or an export")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="a prompt; this option may be repeated")
    what.add_argument("--prompts", type=Path, help="a file with a prompt on each line")
    what.add_argument("--labels", nargs="+", help='class numbers, or ImageNet names such as "golden retriever"')
    parser.add_argument("--out", required=True, type=Path, help="a folder for PNGs; new, empty, or of the same command")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image; the next ones count up from it")
    parser.add_argument("--per-prompt", type=positive, default=1, help="images for each prompt or label (default: 1)")
    parser.add_argument("--sampler", type=_sampler_name, metavar="NAME", help="default: the config's sampler.kind")
    parser.add_argument("--steps", type=positive, help="sampling steps (default: the config's sampler.steps)")
    parser.add_argument("--fast", action="store_true", help="dpm++ with 20 steps, unless --sampler or --steps is given")
    parser.add_argument("--guidance", type=float, help="the scale w in uncond + w (cond - uncond); 1: no guidance")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="a text that guidance leads away from")
    parser.add_argument("--height", type=positive, help="in pixels (default: the size of training)")
    parser.add_argument("--width", type=positive, help="in pixels (default: the size of training)")
    parser.add_argument("--init-image", type=Path, metavar="FILE", help="an image to begin with, cropped to the size")
    parser.add_argument(
        "--strength", type=float, help="how far results depart from --init-image, 0 to 1 (default: 0.8, with --mask 1)"
    )
    parser.add_argument(
        "--mask", type=Path, metavar="FILE", help="white where --init-image is made anew; all other pixels stay"
    )
    parser.add_argument("--weights", help="weight, or an average such as ema_0.9999 (default: the first average)")
    parser.add_argument("--adapter", type=Path, metavar="FILE", help="an adapter (LoRA) to add to the weights")
    parser.add_argument("--adapter-scale", type=float, default=1.0, help="the adapter's strength (default: 1)")
    parser.add_argument("--batch", type=positive, default=16, help="images sampled at a time (default: 16)")
    parser.add_argument("--decode-batch", type=positive, default=16, help="images decoded at a time (default: 16)")
    parser.add_argument(
        "--exact", action="store_true", help="use only plain torch operators: in fp32, the same bytes as diffusers"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")


def _sample(arguments: argparse.Namespace) -> int:
    from dico_t2i.commands import sample
    from dico_t2i.runs.copies import opened

    arguments.checkpoint = opened(arguments.checkpoint)
    return sample.run(arguments)


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=place, help="a run or one of its checkpoints")
    parser.add_argument("--weights", help="weight, or an average such as ema_0.9999 (default: the first average)")
    parser.add_argument(
        "--out", required=True, type=Path, help="the folder to write; of an adapter alone, a file (.safetensors)"
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="FILE",
        help="an adapter (LoRA) to add to the weights; with it --checkpoint may be an exported folder",
    )
    parser.add_argument("--adapter-scale", type=float, default=1.0, help="the adapter's strength (default: 1)")
    parser.add_argument(
        "--no-encoders", action="store_true", help="leave the autoencoder and the text encoder out of the folder"
    )


def _export(arguments: argparse.Namespace) -> int:
    from dico_t2i.export.adapter import export_adapter, export_merged, is_adapter
    from dico_t2i.export.folder import export
    from dico_t2i.runs.copies import opened

    arguments.checkpoint = opened(arguments.checkpoint)
    what = arguments.checkpoint, arguments.weights, arguments.out
    if arguments.out.suffix == ".safetensors" and not arguments.adapter:
        export_adapter(*what)
    elif arguments.adapter or is_adapter(arguments.checkpoint):
        export_merged(*what, not arguments.no_encoders, arguments.adapter, arguments.adapter_scale)
    else:
        export(*what, not arguments.no_encoders)
    print(f"exported to {arguments.out}")
    return 0


def _import_official_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a torch or safetensors file; no code in it is executed")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument(
        "--image-size", type=int, default=256, help="image size of its training, in pixels (default: 256)"
    )
    parser.add_argument("--autoencoder", help="its folder or hub id (default: stabilityai/sd-vae-ft-ema)")
    parser.add_argument("--no-encoders", action="store_true", help="leave the autoencoder out of the folder")


def _import_official(arguments: argparse.Namespace) -> int:
    from dico_t2i.export.released import import_official

    name = import_official(
        arguments.file, arguments.out, arguments.image_size, arguments.autoencoder, not arguments.no_encoders
    )
    print(f"{name} in {arguments.out}")
    return 0


def _prefetch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="a YAML file; optional with --check")
    parser.add_argument("--out", required=True, type=Path, help="the folder to fill; use it with DICO_WEIGHTS=FOLDER")
    parser.add_argument("--also", action="append", default=[], metavar="URL", help="a further file for FOLDER/files")
    parser.add_argument("--check", action="store_true", help="verify the folder's hashes, without any download")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="changes to the config")


def _prefetch(arguments: argparse.Namespace) -> int:
    from dico_t2i.config import load_config

    if arguments.config is None and not arguments.check:
        raise ValueError("--config: give the config whose files you want")
    config = load_config(arguments.config, arguments.overrides) if arguments.config else None
    if not arguments.check:
        os.environ["DICO_ALLOW_DOWNLOAD"] = "1"  # this command is the permission; huggingface_hub reads it on import
    from dico_t2i.commands.prefetch import check, prefetch

    if config is not None and not arguments.check:
        prefetch(config, arguments.out, arguments.also)
        print(f"use it with: export DICO_WEIGHTS={arguments.out.absolute()}")
    print(f"{check(arguments.out, config)} files in {arguments.out}, all verified")
    return 0


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="check the weights, data and disk space it needs, too")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the run folders (default: runs)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
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
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="the shell that will read the script")


def _completion(arguments: argparse.Namespace) -> int:
    import shtab

    parser = _parser()
    for command in parser._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]
        for action in command._actions:
            if action.type in (Path, place):
                action.complete = shtab.FILE
    print(shtab.complete(parser, arguments.shell))
    return 0


def _demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=place, help="a run, one of its checkpoints, or an export")
    parser.add_argument("--compare", type=place, help="a second checkpoint, sampled with the same seeds")
    parser.add_argument("--weights", help="weight, or an average such as ema_0.9999 (default: the first average)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="the port to listen on (default: 7860)")


def _demo(arguments: argparse.Namespace) -> int:
    from dico_t2i.commands.demo import check_gradio, serve

    check_gradio()
    from dico_t2i.runs.copies import opened
    from dico_t2i.sampling.pipeline import choose_device

    checkpoints = [opened(given) for given in (arguments.checkpoint, arguments.compare) if given]
    serve(checkpoints, arguments.weights, *choose_device(arguments.dtype), arguments.host, arguments.port)
    return 0


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the HTML file (default: report.html)")


def _report(arguments: argparse.Namespace) -> int:
    from dico_t2i.report import write_report

    write_report(arguments.runs, arguments.out)
    print(f"report: {arguments.out}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "train": ("train a run, or resume it where it stopped", _train_options, _train),
    "plan": ("predict what a run needs: memory, time, communication, data; needs no GPU", _plan_options, _plan),
    "sample": ("make images from prompts or class labels", _sample_options, _sample),
    "export": ("write averaged weights, config and a diffusers pipeline to one folder", _export_options, _export),
    "import-official": ("make an exported folder of a released checkpoint", _import_official_options, _import_official),
    "prefetch": ("download every pretrained file a config needs to one folder", _prefetch_options, _prefetch),
    "doctor": ("examine this machine, and report what to change before training", _doctor_options, _doctor),
    "completion": ("print a script that completes commands and options with TAB", _completion_options, _completion),
    "demo": ("serve a web page to try a checkpoint, or to compare two", _demo_options, _demo),
    "report": ("write an HTML page about one or more runs, for reading offline", _report_options, _report),
}
