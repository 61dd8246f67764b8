"""Data flows one way: no module imports one of a higher layer."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    {"config", "evaluations", "files", "imagenet", "randomness", "safetensors_writer"},
    {"inline"},
    {"data", "ops"},
    {"models", "encoders", "diffusion"},
    {"training.checkpoint", "training.optimizer"},
    {"portable", "prefetch", "sampling"},
    {"card"},
    {"export", "pipeline", "training"},
    {"doctor", "released"},
    {"demo", "plan", "report"},
    {"plan_text"},
    {"cli"},
    {"__main__"},
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module):
    """The layer of a dotted name inside the package: that of its longest known prefix."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, names in enumerate(LAYERS):
            if ".".join(parts[:length]) in names:
                return number
    return 0


def modules():
    for path in sorted((ROOT / "dico_t2i").rglob("*.py")):
        yield path, ".".join(path.relative_to(ROOT / "dico_t2i").with_suffix("").parts).removesuffix(".__init__")


def test_lower_layers_do_not_import_upper_ones():
    upward = [
        f"{module} imports {name}"
        for path, module in modules()
        for name in imports(path)
        if name.startswith("dico_t2i.") and layer(name.removeprefix("dico_t2i.")) > layer(module)
    ]
    assert upward == []


def test_the_package_does_not_import_the_scripts():
    outside = {"cluster", "data_prep", "evals", "tests"}
    assert [(m, n) for p, m in modules() for n in imports(p) if n.split(".")[0] in outside] == []


def test_deepspeed_and_submitit_have_one_importer():
    assert {m for p, m in modules() for n in imports(p) if n.split(".")[0] == "deepspeed"} == {"training.engine"}
    assert [m for p, m in modules() for n in imports(p) if n.split(".")[0] == "submitit"] == []
