"""Makes pages of the package's public classes and functions: ``python docs/make_api.py [FOLDER]`` (default: site).

Any warning ends it: a module that cannot be imported, or an annotation that does not resolve, would leave a gap.
"""

import sys
import warnings
from pathlib import Path

import pdoc
import pdoc.doc

PACKAGE = "dico_t2i"


def make_pages(folder: Path) -> int:
    """Write index.html and a page for each module. Returns the number of modules."""
    modules = list(pdoc.extract.walk_specs([PACKAGE]))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"pdoc\.")
        pdoc.render.configure(docformat="markdown", show_source=True, search=True)
        pdoc.pdoc(*modules, output_directory=folder)
    return len(modules)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("site")
    print(f"{make_pages(folder)} modules: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
