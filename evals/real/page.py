"""Writes the page of a run on real pictures: samples, nearest training pictures, curves, and the judges' table."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from dico_t2i.files import write_atomically
from dico_t2i.runs.log import json_lines
from evals.real.results import COLUMNS, read_verdicts, row
from evals.real.stages import PICTURES

_STYLE = (
    "body { font: 15px sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }"
    " img { max-width: 100% } td, th { text-align: left; padding: 0.2rem 0.8rem; border-bottom: 1px solid #ccc }"
)


def write_page(run: Path) -> Path:
    """Write real.html into the run's folder; it holds its pictures, and needs no network. Returns its path."""
    pictures = {
        "Samples": run / PICTURES / "grid.png",
        "Words that were never trained": run / "free" / "grid.png",
        "Samples beside their nearest training pictures": run / "judged.neighbours.png",
    }
    parts = [f"<h1>{html.escape(run.name)}</h1>", "<h2>Judges</h2>", _table(run / "judged.json")]
    parts += [f"<h2>Curves</h2>{_picture(_curves(run), 'training and held-out loss')}"]
    for title, file in pictures.items():
        if file.exists():
            parts.append(f"<h2>{title}</h2>{_picture(file.read_bytes(), title)}")
    text = f"<!doctype html><meta charset=utf-8><title>{html.escape(run.name)}</title><style>{_STYLE}</style>"
    path = run / "real.html"
    write_atomically(path, (text + "".join(parts) + "\n").encode())
    return path


def _table(file: Path) -> str:
    rows = [_cells(COLUMNS, "th"), *(_cells(row(verdict), "td") for verdict in read_verdicts(file))]
    return f"<table>{''.join(rows)}</table>"


def _cells(texts: Sequence[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


def _picture(data: bytes, words: str) -> str:
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _curves(run: Path) -> bytes:
    """The training loss and the held-out loss over the steps, as a PNG."""
    from matplotlib.figure import Figure

    lines = list(json_lines(run / "metrics.jsonl"))
    figure, buffer = Figure(figsize=(8, 3.5), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot()
    for key, name in (("loss", "training"), ("val_loss", "held out")):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axes.plot([step for step, _ in points], [value for _, value in points], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
