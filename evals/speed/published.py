"""Numbers that the paper of DiCo (tables 1 to 3) published for networks; none of them was measured here."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.table import Table

CAPTION = (
    "Published, not measured here: A100, fp32, batch 64, one pass; FID at 256 px after 400K steps without guidance,"
    " at 512 px after the whole training with guidance"
)


class Published(NamedTuple):
    """A row of the paper. gmacs: of one image; images_per_s: of one pass; None if the paper does not say it."""

    network: str
    pixels: int
    gmacs: float | None
    images_per_s: float
    fid: float


PUBLISHED = (
    Published("DiCo-S", 256, 4.25, 1695.73, 49.97),
    Published("DiT-S/2", 256, 6.06, 1234.01, 68.40),
    Published("DiG-S/2", 256, 4.30, 961.24, 62.06),
    Published("DiCo-B", 256, 16.88, 822.97, 27.20),
    Published("DiT-B/2", 256, 23.02, 380.11, 43.47),
    Published("DiG-B/2", 256, 17.07, 345.89, 39.50),
    Published("DiCo-L", 256, 60.24, 288.32, 13.66),
    Published("DiT-L/2", 256, 80.73, 114.63, 23.33),
    Published("DiG-L/2", 256, 61.66, 109.01, 22.90),
    Published("DiCo-XL", 256, 87.30, 208.47, 11.67),
    Published("DiT-XL/2", 256, 118.66, 76.90, 19.47),
    Published("DiG-XL/2", 256, 89.40, 71.74, 18.53),
    Published("DiCo-XL", 512, 349.78, 57.45, 2.53),
    Published("DiT-XL/2", 512, 524.70, 18.58, 3.04),
    Published("DiS-H/2", 512, None, 8.59, 2.88),
    Published("DiM-H/2", 512, None, 7.39, 3.78),
)
_COLUMNS = ("network", "pixels", "GMACs", "images/s", "FID")
_ALWAYS = ("DiG", "DiS", "DiM")  # the paper's state-space and linear-attention networks


def published_rows(names: Sequence[str]) -> list[Published]:
    """The published numbers of these networks, and of those that the paper always compares them with."""
    return [row for row in PUBLISHED if row.network in names or row.network.startswith(_ALWAYS)]


def published_table(rows: Sequence[Published]) -> Table:
    table = Table(*_COLUMNS, title=CAPTION)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def published_markdown(rows: Sequence[Published]) -> str:
    lines = ["", f"{CAPTION}:", ""]
    for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(row: Published) -> tuple[str, ...]:
    gmacs = "" if row.gmacs is None else f"{row.gmacs:.2f}"
    return row.network, str(row.pixels), gmacs, f"{row.images_per_s:.2f}", f"{row.fid:.2f}"
