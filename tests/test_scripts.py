"""The scripts of cluster/, data_prep/ and evals/ are built alike."""

import ast

import pytest

from tests.test_structure import ROOT, imports

FOLDERS = ("cluster", "data_prep", "evals")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
BY_MODULE_NAME = {"cluster/preflight.py", "cluster/rank.py"}  # started with python -m, and with exit codes of their own
SCRIPTS = [
    path
    for path in FILES
    if "__main__" in path.read_text(encoding="utf-8") and str(path.relative_to(ROOT)) not in BY_MODULE_NAME
]
ON_THE_PATH = "sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed\n"


def names(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SCRIPTS, ids=names)
def test_a_script_ends_by_the_common_run(path):
    last = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert ast.unparse(last).endswith("sys.exit(run(main))")
    assert "dico_t2i.command.run" in set(imports(path))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_the_root_is_on_the_path_of_scripts_that_need_it_alone(path):
    tree, text = ast.parse(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")
    others = {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    } & set(FOLDERS)
    assert text.count(ON_THE_PATH) == text.count("sys.path") == int(path in SCRIPTS and bool(others))


def test_scripts_do_not_import_tests():
    assert [(names(p), n) for p in FILES for n in imports(p) if n.split(".")[0] == "tests"] == []
