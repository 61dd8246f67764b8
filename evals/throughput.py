"""Measures how fast the network trains and samples, compared with plain ones: images/s, MFU, bandwidth, memory.

    python evals/throughput.py --quick                      # DiCo-S on a CPU, five minutes
    python evals/throughput.py --preset xl-64 text-dwconv   # on a GPU
    python evals/throughput.py --all --profile              # every row of docs/performance.md for this device
    python evals/throughput.py --networks DiCo-S DiT-S/2    # networks by name, beside their published numbers
    python evals/throughput.py --predict                    # the time of each operator on GPUs, computed; on a GPU
                                                            # also measured

The contenders of a case take turns, round by round, on the same inputs, after a warm-up; medians and ranges are shown.
"plain" is evals/speed/plain_dico.py, in the usual style of such code. Networks by name are all trained like DiCo. MFU
is the rate of useful counted operations, those of channel-by-channel convolutions included, divided by the rate of a
large matrix product that is measured in the same run (bf16 on a GPU, fp32 on a CPU). GB/s counts the bytes that the
operations read and write, where these are known. Results go to --out as table.md, throughput.png and throughput.json.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from dico_t2i.command import run, script_parser
from dico_t2i.files import write_atomically
from dico_t2i.models import VARIANTS, DiCoConfig, NetworkConfig
from dico_t2i.plan.cost import product_rate
from evals.speed.measure import SHAPES, Contender, compare, free_memory
from evals.speed.networks import (
    Condition,
    Setting,
    contender,
    named_config,
    samplers,
    takes_text,
    text_convolutions,
)
from evals.speed.published import Published, published_markdown, published_rows, published_table
from evals.speed.tables import Finding, Goal, as_json, markdown, operator_table, plot, table

_NO_GOAL = Goal({})
_TABLE_WIDTH = 160


@dataclass(frozen=True)
class Case:
    """A row of the goals: a title, the contenders, and the goal."""

    title: str
    contenders: Callable[[torch.device], Iterable[Contender]]
    goal: Goal = _NO_GOAL


def _config(variant: str, condition: Condition) -> DiCoConfig:
    return DiCoConfig(**VARIANTS[variant], condition=condition)


def _step(variant: str, condition: Condition, batch: int, *others: str, size: int = 32) -> Callable[..., Any]:
    """A training step of our network and of others, which are named "kind" or "kind, how"."""
    config, names = _config(variant, condition), ("ours", *others)
    return lambda device: _contenders("step", config, batch, size, device, names)


def _pass(variant: str, condition: Condition, batch: int, *others: str, size: int = 32) -> Callable[..., Any]:
    config, names = _config(variant, condition), ("ours", *others)
    return lambda device: _contenders("pass", config, batch, size, device, names)


def _contenders(
    work: Any, config: NetworkConfig, batch: int, size: int, device: torch.device, names: Sequence[str]
) -> list[Contender]:
    setting = Setting(config, batch, size, device)
    pairs: list[Any] = [name.partition(", ")[::2] for name in names]
    return [contender(kind, setting, work, how) for kind, how in pairs]


def by_name(names: Sequence[str], batch: int, size: int = 32) -> dict[str, Case]:
    """One pass and a training step of networks by name; the others are compared with the first.

    Raises ValueError for an unknown name, and for networks for classes together with networks for text.
    """
    condition: Condition = "text" if any(map(takes_text, names)) else "class"
    config, *_ = (named_config(name, condition, size) for name in names)
    works = {"pass": "one pass", "step": "training step"}
    return {
        work: Case(
            f"{condition}, {title}, batch {batch}",
            lambda device, work=work: _contenders(work, config, batch, size, device, names),  # type: ignore[misc]
        )
        for work, title in works.items()
    }


def _text_and_class(device: torch.device) -> list[Contender]:
    """The text step comes first, so that the other column says how much of the class step's speed text costs."""
    both = []
    for condition in ("text", "class"):
        one = contender("ours", Setting(_config("DiCo-XL", condition), 64, 32, device), "step")
        one.name = f"ours, {condition}"
        both.append(one)
    return both


def _sampling(variant: str, batch: int) -> Callable[[torch.device], Iterable[Contender]]:
    return lambda device: samplers(Setting(_config(variant, "text"), batch, 32, device), steps=50, guidance=3.0)


def _convolution(batch: int, channels: int, size: int) -> Callable[[torch.device], Iterable[Contender]]:
    return lambda device: text_convolutions((batch, channels, size), device)


_SAMPLING_GOAL = Goal({"ours, kernels at each step": 1.3})
QUICK = {
    "s-class-step": Case(
        "DiCo-S class, training step, batch 8", _step("DiCo-S", "class", 8, "plain"), Goal({"plain": 1.4})
    ),
    "s-text-step": Case("DiCo-S text, training step, batch 8", _step("DiCo-S", "text", 8, "plain"), Goal({"plain": 2})),
    "s-class-pass": Case("DiCo-S class, one pass, batch 8", _pass("DiCo-S", "class", 8, "plain", "DiT-S/2")),
    "s-text-pass": Case("DiCo-S text, one pass, batch 8", _pass("DiCo-S", "text", 8, "plain"), Goal({"plain": 1.3})),
    "s-sampling": Case("DiCo-S text, 50 guided steps, batch 1", _sampling("DiCo-S", 1), _SAMPLING_GOAL),
    **{
        f"text-dwconv-{C}": Case(f"text_dwconv both ways, {C}@{H}, batch 8", _convolution(8, C, H), Goal({"plain": 4}))
        for C, H in SHAPES
    },
}
GPU = {
    "xl-64": Case(
        "DiCo-XL class, training step, batch 64",
        _step("DiCo-XL", "class", 64, "plain", "plain, autocast", "plain, compiled", "ours, compiled"),
        Goal({"plain": 3, "plain, autocast": 1.9, "plain, compiled": 1.2}, images_per_s=700),
    ),
    "xl-256": Case("DiCo-XL class, training step, batch 256", _step("DiCo-XL", "class", 256), Goal({}, 770)),
    "h-32": Case("DiCo-H class, training step, batch 32", _step("DiCo-H", "class", 32, "plain"), Goal({"plain": 2.6})),
    "h-128": Case("DiCo-H class, training step, batch 128", _step("DiCo-H", "class", 128), Goal({}, 360)),
    # 1.20 in time: the class step is at most 1.2 times faster.
    "xl-text": Case(
        "DiCo-XL training step, batch 64, text over class", _text_and_class, Goal({"ours, class": 1 / 1.2})
    ),
    "xl-text-64": Case(
        "DiCo-XL text, training step, batch 64", _step("DiCo-XL", "text", 64, "plain, autocast", "ours, compiled")
    ),
    "s-256": Case(
        "DiCo-S class, training step, batch 256",
        _step(
            "DiCo-S", "class", 256, "plain", "plain, autocast", "plain, compiled", "ours, compiled", "DiT-S/2, autocast"
        ),
    ),
    "xl-pass": Case(
        "DiCo-XL class, one pass, batch 64", _pass("DiCo-XL", "class", 64, "plain", "DiT-XL/2"), Goal({"DiT-XL/2": 3})
    ),
    "s-pass": Case("DiCo-S class, one pass, batch 64", _pass("DiCo-S", "class", 64, "plain", "DiT-S/2")),
    "s-sampling": Case("DiCo-S text, 50 guided steps, batch 4", _sampling("DiCo-S", 4), _SAMPLING_GOAL),
    "xl-sampling": Case("DiCo-XL text, 50 guided steps, batch 4", _sampling("DiCo-XL", 4)),
    **{
        f"text-dwconv-{C}": Case(
            f"text_dwconv both ways, {C}@{H}, batch 64", _convolution(64, C, H), Goal({"plain": 15}, tflops=20)
        )
        for C, H in SHAPES
    },
}


def measure(cases: dict[str, Case], rounds: int, device: torch.device, console: Console) -> Iterator[list[Finding]]:
    """Yield all findings so far, after each case; its networks are deleted before the next ones are made."""
    findings: list[Finding] = []
    for number, (name, case) in enumerate(cases.items()):
        started = time.monotonic()
        results = compare(list(case.contenders(device)), rounds, device)
        findings.append(Finding(case.title, case.goal, results))
        free_memory(device)
        times = ", ".join(f"{result.name} {1e3 * result.median:.3g} ms" for result in results)
        console.print(
            f"{number + 1}/{len(cases)} {name}: {times} ({time.monotonic() - started:.0f} s)", highlight=False
        )
        yield findings


def describe(device: torch.device, rounds: int, peak: float) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "peak": f"{peak / 1e12:.3g} TFLOP/s of {'bf16' if cuda else 'fp32'} products, measured in the same run",
        "rounds": rounds,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _chosen(args: argparse.Namespace, known: dict[str, Case]) -> dict[str, Case]:
    """The requested cases; a preset may be the beginning of several names."""
    if args.all or args.quick:
        return known
    chosen = {name: case for name, case in known.items() if any(name.startswith(preset) for preset in args.preset)}
    unknown = [preset for preset in args.preset if not any(name.startswith(preset) for name in known)]
    if unknown:
        raise ValueError(f"--preset {' '.join(unknown)}: unknown; known on this device: {', '.join(known)}")
    return chosen


PREDICTED: dict[str, tuple[str, Condition, int]] = {
    "DiCo-XL class": ("DiCo-XL", "class", 256),
    "DiCo-XL text": ("DiCo-XL", "text", 256),
    "DiCo-S class": ("DiCo-S", "class", 256),
    "DiCo-H class": ("DiCo-H", "class", 128),
}


def predict_steps(
    device: torch.device, folder: Path, console: Console, names: Sequence[str] = tuple(PREDICTED)
) -> None:
    """Print and write a table of each network's training step at 32x32; with a GPU, the measured times as well."""
    from evals.speed import aims, predict  # they need Triton

    text, steps, gpus = "", {}, tuple(predict.MACHINES)
    for name in names:
        variant, condition, batch = PREDICTED[name]
        config = _config(variant, condition)
        steps[name] = step = predict.predict(config, batch, 32)
        if device.type == "cuda":
            predict.measure_step(config, batch, 32, device, step.rows)
            free_memory(device)
        title = f"{name}, training step, batch {batch}, bf16"
        console.print(predict.table(title, step.rows, gpus))
        text += predict.markdown(title, step.rows, gpus) + "\n"
        write_atomically(folder / "predicted.md", text.encode())
    if {"DiCo-XL class", "DiCo-XL text"} <= steps.keys():
        found = list(aims.aims(steps["DiCo-XL class"], steps["DiCo-XL text"]))
        console.print(aims.table(found))
        write_atomically(folder / "predicted.md", (text + aims.markdown(found)).encode())


def _write(
    folder: Path,
    setting: dict[str, Any],
    findings: Sequence[Finding],
    peak: float,
    profiled: bool,
    published: Sequence[Published],
) -> None:
    """Write the results again after each case, so that an interrupted run keeps its measurements."""
    text = markdown(setting, findings, peak, profiled) + (published_markdown(published) if published else "")
    write_atomically(folder / "table.md", text.encode())
    content = json.dumps({**as_json(setting, findings, peak), "published": published}, indent=1) + "\n"
    write_atomically(folder / "throughput.json", content.encode())
    plot(findings, setting["device"], folder / "throughput.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--quick", action="store_true", help="DiCo-S at small batches, for CPUs; also runs on a GPU")
    which.add_argument("--preset", nargs="+", metavar="NAME", help="some cases, by the beginnings of their names")
    which.add_argument("--all", action="store_true", help="all cases of this kind of device")
    which.add_argument(
        "--networks",
        nargs="+",
        metavar="NAME",
        help="sizes by name; the others are compared with the first: DiCo-S DiT-S/2",
    )
    which.add_argument(
        "--predict",
        nargs="*",
        choices=PREDICTED,
        metavar="NAME",
        help=f"compute each operator's time on GPUs; no GPU is needed. Default: {', '.join(PREDICTED)}",
    )
    parser.add_argument("--batch", type=int, help="batch size of --networks (default: 64 on a GPU, 8 on a CPU)")
    parser.add_argument("--device", type=torch.device, help="default: the GPU if there is one")
    parser.add_argument("--rounds", type=int, help="rounds of each case (default: 10 on a GPU, 3 on a CPU)")
    parser.add_argument("--profile", action="store_true", help="print the ten largest operators of each contender")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="default: runs/throughput")
    args = parser.parse_args(argv)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    rounds = args.rounds or (10 if cuda else 3)
    if args.predict is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        console = Console(width=max(_TABLE_WIDTH, Console().width))
        predict_steps(device, args.out, console, args.predict or tuple(PREDICTED))
        return 0
    if args.networks:
        cases, published = by_name(args.networks, args.batch or (64 if cuda else 8)), published_rows(args.networks)
    else:
        cases, published = _chosen(args, GPU if cuda and not args.quick else QUICK), []
    console = Console(width=max(_TABLE_WIDTH, Console().width))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # the same for all products in fp32
    peak = product_rate(device, torch.bfloat16 if cuda else torch.float32)
    setting = describe(device, rounds, peak)
    args.out.mkdir(parents=True, exist_ok=True)
    for findings in measure(cases, rounds, device, console):
        _write(args.out, setting, findings, peak, args.profile, published)
    console.print(table(findings, peak))
    if published:
        console.print(published_table(published))
    for finding in findings if args.profile else ():
        console.print(operator_table(finding))
    console.print(", ".join(f"{key} {value}" for key, value in setting.items()), highlight=False)
    console.print(f"table.md, throughput.json and throughput.png in {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
