"""What the compiler makes of the GPU kernels: no register in memory, wide loads, no more instructions than bytes."""

import pytest
import torch

pytest.importorskip("triton")
from evals.gpu_code import COLUMNS, calls, rows
from evals.speed.machine_code import MACHINES, Code, Instruction, Loop
from evals.speed.measure import SHAPES

ELEMENTWISE = ("norm", "scale", "gelu", "depthwise")
PRODUCTS = ("linear_gelu", "gelu_linear_backward", "gate_linear", "gate_linear_backward")
TIGHTEST = 1.2  # issue over bytes


def cases(long):
    """Shapes, dtype and GPU."""
    if not long:
        return [(((416, 32),), torch.bfloat16, "H200")]
    return [(SHAPES, dtype, gpu) for dtype in (torch.bfloat16, torch.float32) for gpu in ("H200", "A100")]


@pytest.mark.slow
def test_kernels_are_limited_by_memory_and_text_by_its_multiply_adds(long):
    for shapes, dtype, gpu in cases(long):
        found = list(rows([""], shapes, 256, dtype, MACHINES[gpu]))
        fused = sum(2 * (channels <= 1024) + 2 * (side > 8) for channels, side in shapes)
        assert len(found) == len(shapes) * (5 + 3 + 2 + 1) + (fused if dtype == torch.bfloat16 else 0)
        for row in found:
            if row.kernel in PRODUCTS and MACHINES[gpu].capability < 90:
                continue  # not used there (``has_wide_products``)
            assert row.stack == 0, row
            assert row.warps >= 8, row
            assert len(list(row.cells())) == len(COLUMNS)
            if row.kernel.startswith(ELEMENTWISE) and row.kernel not in PRODUCTS:
                assert row.ratio <= TIGHTEST, row
            if row.kernel.startswith(("norm", "scale", "gelu")) or row.kernel in PRODUCTS:
                assert 16 in row.loads, row
            if row.kernel in PRODUCTS:  # two programs of eight warps, so that one multiplies while the other waits
                assert row.warps >= 16, row
            if row.kernel.startswith("depthwise"):
                assert min(row.loads) > 2, row
            if row.kernel in ("text_forward", "text_taps"):
                assert row.useful >= 0.65, row


def test_all_functions_of_the_kernels_are_called():
    from dico_t2i.ops import kernels

    called = {partial.func.__name__ for partial in calls(32, 16, 2, torch.bfloat16).values()}
    public = {name for name, value in vars(kernels).items() if not name.startswith("_") and callable(value)}
    assert {name for name in public if name.endswith(("_forward", "_backward"))} == called


def program(*lines):
    """Instructions at 0, 16, ..., each a name or a name and the number of the one that it branches to."""
    return Code(
        [
            Instruction(16 * number, name.split()[0], name, 16 * int(name.split()[1]) if " " in name else None)
            for number, name in enumerate(lines)
        ]
    )


def test_instructions_count_as_often_as_their_loops_run():
    code = program("MOV", "LDG.E.128", "FFMA", "BRA 2", "LDG.E.U16", "BRA 1", "EXIT", "BRA 7", "NOP")
    assert code.loops == [Loop(16, 80), Loop(32, 48)]
    assert code.executed((5, 3)) == 2 + 5 * (3 + 3 * 2)
    assert code.loads() == {16: 1, 2: 1}
    with pytest.raises(ValueError, match="1 nested loops expected"):
        code.executed((5,))
    beside = program("MOV", "BRA 0", "FFMA", "BRA 2", "EXIT")
    with pytest.raises(ValueError, match="found"):
        beside.executed((5, 3))
