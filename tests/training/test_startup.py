"""A rank starts quickly and trains in little memory, because it imports nothing that it does not use."""

import ast
import os
import sys
from pathlib import Path

from tests import forkserver

ROOT = Path(__file__).resolve().parents[2]

# The compiler of torch, and what imports it; libraries of models that a run has only files of; what is used elsewhere.
NEVER = ("torch._dynamo", "torch._inductor", "sympy", "networkx", "transformers", "torchvision", "scipy")
NEVER += ("diffusers", "open_clip", "pandas", "matplotlib", "wandb", "submitit", "triton", "torch.utils.flop_counter")

LEAN = """
import sys
import torch

torch.manual_seed = torch.random.manual_seed  # the compiler, which a fork has already, wraps it
never = sys.argv.pop(1).split(",")
refused = lambda name: any(name == top or name.startswith(top + ".") for top in never)
for name in [name for name in sys.modules if refused(name) or "muon" in name]:  # a fork has them already
    parent, _, last = name.rpartition(".")
    vars(sys.modules.get(parent, sys)).pop(last, None)
    del sys.modules[name]

def refuse(event, arguments):
    if event == "import" and refused(arguments[0]):
        raise RuntimeError(f"a rank imports {arguments[0]}")

sys.addaudithook(refuse)
from dico_t2i import memory
from dico_t2i.cli import main
from dico_t2i.plan import cost

cost._trace.cache_clear()  # the fork server has traced the network
send = memory._send

def sent(*arguments):
    never.clear()
    send(*arguments)

memory._send = sent  # which runs in a fork, where rank 0 traces the network
sys.exit(main(sys.argv[1:]))
"""


def test_a_rank_imports_neither_the_compiler_nor_libraries_of_models(runs):
    """With a text encoder of transformers' kind and a data worker."""
    command = [sys.executable, "-c", LEAN, ",".join(NEVER), *runs.command("lean", "train.duration.steps=2")[2:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = forkserver.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(runs.losses("lean")) == {1, 2}


def test_no_module_of_a_rank_imports_them_when_it_is_imported():
    """A fork has the modules already, so that it would not notice."""
    wanted, seen = {"dico_t2i.cli", "dico_t2i.training.trainer"}, set()
    while wanted:
        seen.add(name := wanted.pop())
        places = (ROOT / name.replace(".", "/")).with_suffix(".py"), ROOT / name.replace(".", "/") / "__init__.py"
        for path in filter(Path.exists, places):
            wanted |= set(_imported(ast.parse(path.read_text()))) - seen
    assert "dico_t2i.models.cost" in seen
    assert {name for name in seen if any(f"{name}.".startswith(f"{never}.") for never in NEVER)} == set()


def _imported(module):
    for node in module.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
