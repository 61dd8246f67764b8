"""Data flows one way: the rooms of the package stand on floors, and each imports only from floors below its own.

docs/architecture.md draws the same floors and has a paragraph on each room.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"command", "files", "memory", "randomness", "remote", "text_lines"},
    {"config", "ops"},
    {"data", "diffusion", "models", "runs"},
    {"encoders", "report"},
    {"plan", "sampling"},
    {"commands", "export", "training"},
    {"cli", "pipeline"},
    {"__main__"},
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module):
    """The room of a dotted name inside the package: its first part."""
    return module.split(".")[0]


def floor(name):
    """The floor of a room."""
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


def modules():
    for path in sorted((ROOT / "dico_t2i").rglob("*.py")):
        yield path, ".".join(path.relative_to(ROOT / "dico_t2i").with_suffix("").parts).removesuffix(".__init__")


def arrows():
    """Each pair of rooms of which the first imports the second."""
    for path, module in modules():
        for name in imports(path):
            if name.startswith("dico_t2i.") and module != "__init__":
                used = room(name.removeprefix("dico_t2i."))
                if used != room(module):
                    yield room(module), used


def test_a_room_imports_only_from_lower_floors():
    assert {(user, used) for user, used in arrows() if floor(used) >= floor(user)} == set()


def test_every_room_stands_on_a_floor_of_the_picture():
    rooms = {room(module) for _, module in modules() if module != "__init__"}
    assert rooms == set().union(*FLOORS)
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.search(r"```\n(\d: .*?)```", page, re.DOTALL).group(1).splitlines()
    lines = [set(line.split(":", 1)[1].split()) for line in drawn if re.match(r"\s*\d+:", line)]
    assert lines == [set(rooms) for rooms in reversed(FLOORS)]
    assert [name for name in rooms if f"**{name}" not in page] == []


def test_the_package_does_not_import_the_scripts():
    outside = {"cluster", "data_prep", "evals", "tests"}
    assert [(m, n) for p, m in modules() for n in imports(p) if n.split(".")[0] in outside] == []


def test_deepspeed_and_submitit_have_one_importer():
    assert {m for p, m in modules() for n in imports(p) if n.split(".")[0] == "deepspeed"} == {"training.engine"}
    assert [m for p, m in modules() for n in imports(p) if n.split(".")[0] == "submitit"] == []
