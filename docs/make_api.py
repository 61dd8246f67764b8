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
        warnings.filterwarnings("ignore", "The module specification", module=r"pdoc\.")  # is part of one before
        warnings.filterwarnings("ignore", "Cannot determine where", module=r"pdoc\.")  # of a TypedDict's keys
        pdoc.pdoc(*_modules(), output_directory=folder)


def _modules() -> list[str]:
    """All of them by name: pdoc by itself leaves out those below a package that lists its public names."""
    root = Path(importlib.import_module(PACKAGE).__path__[0])
    files = (file for file in sorted(root.rglob("*.py")) if file.stem != "__main__")
    return [".".join(f.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__") for f in files]


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("site")
    make_pages(folder)
    print(folder / "index.html")


if __name__ == "__main__":
    main()
