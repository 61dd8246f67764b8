"""The pages of the package's classes and functions."""

import ast
import sys
from pathlib import Path

import pytest

from tests import forkserver

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_every_module_has_a_page_with_its_docstrings(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_api.py"), str(tmp_path / "site")]
    done = forkserver.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = [file.relative_to(ROOT / "dico_t2i").with_suffix("") for file in (ROOT / "dico_t2i").rglob("*.py")]
    modules = [file.parent if file.name == "__init__" else file for file in files if file.name != "__main__"]
    pages = {module: tmp_path / "site" / "dico_t2i" / f"{module}.html" for module in modules if module.name}
    assert [module for module, page in pages.items() if not page.is_file()] == []
    for module in ("config/tree", "randomness", "models/dico"):
        docstring = ast.get_docstring(ast.parse((ROOT / "dico_t2i" / f"{module}.py").read_text())) or ""
        assert " ".join(docstring.split()[:4]) in pages[Path(module)].read_text(), module
    assert (tmp_path / "site/index.html").is_file()
