"""Makes one page about one or several runs: curves, samples, evaluations, configs, events. See docs/tracking.md."""

from collections.abc import Sequence
from pathlib import Path

from dico_t2i.files import write_atomically
from dico_t2i.report.page import make_page
from dico_t2i.report.record import read_record


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one self-contained HTML file. Raises ValueError if a folder is not a run folder."""
    page = make_page([read_record(run) for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode())
