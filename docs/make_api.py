"""Makes pages of the package's public classes and functions: ``python docs/make_api.py [FOLDER]`` (default: site).

A warning ends it: a module that cannot be imported, or a public name that is not there, would leave a gap.
"""

import importlib
import sys
import warnings
from pathlib import Path

import pdoc

PACKAGE = "dico_t2i"


def make_pages(folder: Path) -> None:
    """Write index.html and a page for each module."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\.")
        # pdoc looks for the types of a dataclass in the package that exports it as well; it then shows their names.
        warnings.filterwarnings("ignore", "Error parsing type annotation", module=r"pdoc\.")
        pdoc.pdoc(*_specifications(), output_directory=folder)


def _specifications() -> list[str]:
    """From which pdoc reaches every module: one below a folder without __init__.py, or below a package that lists its
    public names, it does not find by itself.
    """
    specifications, reached = [PACKAGE], set(pdoc.extract.walk_specs([PACKAGE]))
    root = Path(importlib.import_module(PACKAGE).__path__[0])
    for file in sorted(root.rglob("[!_]*.py")):
        name = ".".join(file.relative_to(root.parent).with_suffix("").parts)
        if name not in reached:
            specifications.append(name)
            reached.add(name)
    return specifications


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("site")
    make_pages(folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main()
