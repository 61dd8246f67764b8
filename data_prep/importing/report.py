"""Reports a preparation: counts by reason, distributions, and pictures of both."""

from __future__ import annotations

import json
import textwrap
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.importing.filters import Dropped
from dico_t2i.data.decode import IMAGE_EXTENSIONS, decode_image
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import DatasetIndex
from dico_t2i.data.reader import ShardReader
from dico_t2i.files import write_atomically

EXAMPLES = 5  # for each reason
EDGES: dict[str, np.ndarray] = {
    "smaller side (pixels)": np.arange(0, 2112, 64),
    "width by height": 2.0 ** np.linspace(-2, 2, 33),
    "caption (characters)": np.arange(0, 410, 10),
}
_LONGEST = 200  # most characters of an example
_EDGES = {name: edges.tolist() for name, edges in EDGES.items()}
_SHEET = (4, 6)  # rows and columns of the contact sheet
_THUMBNAIL = 192  # pixels
_LEGEND = 40  # pixels below a thumbnail


@dataclass
class Report:
    """Counts samples seen and kept, and what was skipped by reason, with the first examples, and fills histograms.

    Every file, row or member seen is either kept or skipped, so the numbers add up. Only reasons that begin with
    "captions" or "members" are not part of this sum, because they concern parts of samples.

    histograms: int64 (2, bins) each, with the bins of ``EDGES``, of the samples seen and of those kept; values outside
    the bins count in the first or last one.
    """

    seen: int = 0
    kept: int = 0
    bytes: int = 0  # of the images kept
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(
        default_factory=lambda: {name: np.zeros((2, len(edges) - 1), np.int64) for name, edges in EDGES.items()}
    )

    def count(self, reason: str, example: str) -> None:
        """Count something that was skipped."""
        self.counts[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:  # no control characters, because examples are printed
            examples.append("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in example[:_LONGEST]))

    def note(self, dropped: Dropped) -> None:
        """Count something that was skipped; unless it is only part of a sample, it also counts as seen."""
        self.seen += not dropped.part
        self.count(dropped.reason, dropped.what)

    def measure(self, width: int, height: int, captions: list[str], kept: bool) -> None:
        """Add a sample to the histograms of samples seen, or of samples kept."""
        values: tuple[Iterable[float], ...] = ([min(width, height)], [width / height], map(len, captions))
        for (name, edges), numbers in zip(_EDGES.items(), values, strict=True):
            for number in numbers:
                place = min(max(bisect_right(edges, number) - 1, 0), len(edges) - 2)
                self.histograms[name][int(kept), place] += 1

    def add(self, other: Report) -> None:
        """Add the numbers of another report to this one."""
        self.seen, self.kept, self.bytes = self.seen + other.seen, self.kept + other.kept, self.bytes + other.bytes
        self.counts.update(other.counts)
        for reason, examples in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + examples)[:EXAMPLES]
        for name, bins in other.histograms.items():
            self.histograms[name] += bins

    def lines(self) -> list[str]:
        """One line for each reason, the most frequent first, with the count and the first examples."""
        return [
            f"{reason}: {n} ({', '.join(self.examples[reason])}{', ...' if n > len(self.examples[reason]) else ''})"
            for reason, n in self.counts.most_common()
        ]

    def save(self, path: Path, extra: Mapping[str, Any]) -> None:
        """Write the report as JSON, atomically, with the keys of ``extra``."""
        content = {
            **extra,
            "seen": self.seen,
            "kept": self.kept,
            "bytes": self.bytes,
            "left out": dict(self.counts.most_common()),
            "examples": self.examples,
            "histograms": {
                name: {"seen": bins[0].tolist(), "kept": bins[1].tolist()} for name, bins in self.histograms.items()
            },
        }
        write_atomically(path, (json.dumps(content, ensure_ascii=True) + "\n").encode())

    @staticmethod
    def load(path: Path) -> tuple[Report, dict[str, Any]]:
        """Read a report, and everything else that its file contains. Raises DataError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content["histograms"]
            bins = {name: np.array([found[name]["seen"], found[name]["kept"]], np.int64) for name in EDGES}
            numbers = (content["seen"], content["kept"], content["bytes"])
            return Report(*numbers, Counter(content["left out"]), content["examples"], bins), content
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: it is not a readable report ({error!r}); delete its shard and start again"
            ) from None


def draw_histograms(report: Report, path: Path) -> None:
    """Draw a PNG of the distributions: samples seen in grey, samples kept in blue."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.6))
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.16, top=0.88, wspace=0.25)
    for axes, (name, edges) in zip(figure.subplots(1, len(EDGES)), EDGES.items(), strict=True):
        for bins, colour, label in zip(report.histograms[name], ("0.75", "tab:blue"), ("seen", "kept"), strict=True):
            axes.stairs(bins, edges, fill=True, color=colour, label=label)
        used = np.flatnonzero(report.histograms[name][0])
        if used.size:
            axes.set_xlim(edges[used[0]], edges[used[-1] + 1])
        if name == "width by height":
            axes.set_xscale("log", base=2)
            axes.set_xticks(
                (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4), ("1:4", "1:2", "3:4", "1:1", "3:2", "2:1", "3:1", "4:1")
            )
        axes.set_xlabel(name)
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("images")
    figure.axes[0].legend(frameon=False)
    figure.axes[-1].set_ylabel("captions")
    figure.suptitle(f"{report.kept:,} kept of {report.seen:,} samples")
    figure.savefig(path, dpi=100)


def draw_samples(index: DatasetIndex, path: Path) -> None:
    """Draw a PNG of a few samples from the whole image data set, with the first caption or the label of each."""
    from matplotlib.figure import Figure

    rows, columns = _SHEET
    chosen = sorted(_spread(len(index), min(rows * columns, len(index))))
    ends, reader = np.cumsum(index.samples), ShardReader(index)
    canvas = np.full((rows * (_THUMBNAIL + _LEGEND), columns * _THUMBNAIL, 3), 255, np.uint8)
    height, width, _ = canvas.shape
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for cell, number in enumerate(chosen):
        shard = int(np.searchsorted(ends, number, side="right"))
        sample = reader.read(shard, number - int(ends[shard] - index.samples[shard]))
        data = next(sample[name] for name in IMAGE_EXTENSIONS if name in sample)
        y, x = (cell // columns) * (_THUMBNAIL + _LEGEND), (cell % columns) * _THUMBNAIL
        canvas[y : y + _THUMBNAIL, x : x + _THUMBNAIL] = decode_image(data, _THUMBNAIL, "resize").permute(1, 2, 0)
        words = textwrap.fill(textwrap.shorten(_words(sample), 90, placeholder=" ..."), 36)
        axes.text(x + 4, y + _THUMBNAIL + 4, words, fontsize=7, va="top", parse_math=False)
    reader.close()
    axes.imshow(canvas)
    figure.savefig(path)


def _spread(samples: int, count: int) -> list[int]:
    """``count`` of the numbers below ``samples``, one from each of as many equal ranges."""
    import torch

    from dico_t2i import randomness

    bounds = np.linspace(0, samples, count + 1).astype(np.int64)
    draws = randomness.uniform(0, "contact sheet", torch.arange(count)).numpy()
    return (bounds[:-1] + draws * (bounds[1:] - bounds[:-1])).astype(np.int64).tolist()


def _words(sample: Mapping[str, Any]) -> str:
    about = json.loads(sample.get("json", b"{}"))
    captions = about.get("captions") or [about.get("name", "")]
    return f"{sample['cls'].decode()} {captions[0]}" if "cls" in sample else captions[0]
