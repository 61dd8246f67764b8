"""Compiles the operators' kernels for a GPU that need not be there, and reads the compiler's result.

``launches`` calls a function of ``dico_t2i.ops.kernels`` on tensors without data. Triton compiles each kernel as it
would for such a call on the GPU, but does not start it. ``Code`` reads the disassembled program: loops, instructions,
loads by their width. What a launch takes is then computed from counted instructions and from counted bytes.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

THREADS = 32  # of a warp
REGISTERS, MOST_WARPS, MOST_PROGRAMS = 65536, 64, 32  # of a multiprocessor
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Machine(NamedTuple):
    """A GPU: compute capability, multiprocessors with four schedulers each, clock, and rates.

    bandwidth in bytes/s is 0.9 of the published one, products in bf16 operations/s 0.8 of the published one; on an H200
    both shares were measured.
    """

    capability: int
    multiprocessors: int
    clock: float
    bandwidth: float
    shared: int  # shared memory of a multiprocessor, bytes
    products: float


MACHINES = {
    "A100": Machine(80, 108, 1.41e9, 1.83e12, 164 << 10, 250e12),
    "H100": Machine(90, 132, 1.755e9, 3.0e12, 228 << 10, 790e12),
    "H200": Machine(90, 132, 1.755e9, 4.3e12, 228 << 10, 790e12),
}


class Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers, such as LDG.E.128
    text: str
    target: int | None  # of a branch


class Loop(NamedTuple):
    first: int
    last: int  # the address of the branch back

    def holds(self, address: int) -> bool:
        return self.first <= address <= self.last


class Code:
    """The program of a kernel."""

    def __init__(self, instructions: list[Instruction]) -> None:
        end = max(i.address for i in instructions if i.name == "EXIT")  # a trap and padding follow
        self.instructions = [i for i in instructions if i.address <= end or (i.target or end + 1) <= end]

    @cached_property
    def loops(self) -> list[Loop]:
        """From the outermost to the innermost; several branches back to one place are one loop."""
        back = [i for i in self.instructions if i.target is not None and i.target < i.address]
        lasts = {i.target: max(j.address for j in back if j.target == i.target) for i in back}
        return sorted(
            (Loop(first, last) for first, last in lasts.items() if first is not None), key=_size, reverse=True
        )

    def inside(self, loop: Loop | None) -> list[Instruction]:
        """The instructions of a loop, or all of them."""
        return [i for i in self.instructions if loop is None or loop.holds(i.address)]

    def executed(self, trips: tuple[int, ...]) -> int:
        """Instructions of a warp whose nested loops run as often as ``trips`` says, the outermost first.

        Raises ValueError if the loops are not nested like this.
        """
        loops = self.loops
        if len(loops) != len(trips) or any(not a.holds(b.first) for a, b in pairwise(loops)):
            raise ValueError(f"{len(trips)} nested loops expected, found {loops}")
        return sum(
            prod(trip for loop, trip in zip(loops, trips, strict=True) if loop.holds(i.address))
            for i in self.instructions
        )

    def loads(self) -> Counter[int]:
        """Loads from global memory by their bytes in a thread."""
        return Counter(_width(i.name) for i in self.instructions if i.name.startswith("LDG"))


def _size(loop: Loop) -> int:
    return loop.last - loop.first


def _width(name: str) -> int:
    """The bytes of a load or store."""
    modifiers = name.split(".")
    return next((size for known, size in _WIDTHS.items() if known in modifiers), 4)


_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_LABEL = re.compile(r"^\s*(\.L_x_\d+):", re.MULTILINE)


@cache
def disassembled(cubin: bytes) -> Code:
    """Read a compiled kernel with Triton's own copy of nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output("nvdisasm", "-c", file.name)
    labels: dict[str, int] = {}
    waiting: list[str] = []
    lines: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.match(line):
            address = int(found[1], 16)
            lines.append((address, found[2]))
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
    return Code([_instruction(address, text, labels) for address, text in lines])


def _instruction(address: int, text: str, labels: dict[str, int]) -> Instruction:
    words = text.split()
    name = words[1] if words[0].startswith("@") else words[0]
    target = re.search(r"`\((\.L_x_\d+)\)", text) if name.startswith("BRA") else None
    return Instruction(address, name, text, labels.get(target[1]) if target else None)


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], check=True, capture_output=True, text=True).stdout


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments by name, and its grid."""

    name: str
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    compiled: Any

    @cached_property
    def code(self) -> Code:
        return disassembled(self.compiled.asm["cubin"])

    @cached_property
    def _usage(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            text = _output("cuobjdump", "--dump-resource-usage", file.name)
        return {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}

    @property
    def registers(self) -> int:
        return self._usage["REG"]

    @property
    def stack(self) -> int:
        """Bytes of a thread that the compiler keeps in memory: registers that it had too few of."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @property
    def warps(self) -> int:
        """Of one program."""
        return self.compiled.metadata.num_warps

    @property
    def bytes(self) -> int:
        """Each tensor once: what has to go through memory if the caches hold the rest."""
        return sum(x.nbytes for x in self.arguments.values() if isinstance(x, torch.Tensor))

    def resident(self, machine: Machine) -> int:
        """Warps that a multiprocessor holds at once."""
        of_a_warp = ceil(self.registers * THREADS / 256) * 256
        programs = min(MOST_PROGRAMS, MOST_WARPS // self.warps, REGISTERS // of_a_warp // self.warps)
        shared = self.compiled.metadata.shared
        return self.warps * (min(programs, machine.shared // (shared + 1024)) if shared else programs)

    def issue_seconds(self, trips: tuple[int, ...], machine: Machine) -> float:
        """The least time in which the schedulers, one instruction a clock each, start all instructions."""
        executed = self.code.executed(trips) * self.warps * prod(self.grid)
        return executed / (4 * machine.multiprocessors * machine.clock)

    def memory_seconds(self, machine: Machine) -> float:
        return self.bytes / machine.bandwidth


class _NoDevice:
    """Takes the place of Triton's driver, which needs a GPU. Each capability is a device of its own number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, THREADS)


def launches(call: Callable[[], Any], capability: int) -> Iterator[Launch]:
    """The launches of ``call``, whose tensors are on the meta device; nothing is started."""
    found: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(Launch(self.__name__, dict(zip(self.arg_names, args, strict=False)) | kwargs, grid, compiled))
        return compiled

    with (
        mock.patch.object(driver, "_active", _NoDevice(capability)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        call()
    return iter(found)
