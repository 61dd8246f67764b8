"""One page about one run or several: curves, samples, evaluations, configs, events. See docs/tracking.md."""

from collections.abc import Sequence
from pathlib import Path

from dico_t2i.files import write_atomically
from dico_t2i.report.page import make_page
from dico_t2i.report.record import read_record


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one HTML file that needs nothing else. Raises ValueError if a folder is not one of a run."""
    page = make_page([read_record(run) for run in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, page.encode())
