"""Reports how much memory a rank uses, by part."""

import resource
from collections.abc import Mapping

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of this process: that of the GPU if there is one, else the resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_report(held: Mapping[str, float], peak: float, predicted: Mapping[str, float] | None) -> str:
    """A rank's memory by part, as text. held: bytes kept between steps; peak: the peak in bytes.

    The rest of the peak is used only within a step: activations, gradients, buffers, and on a CPU the program itself.
    """
    parts = {**held, "the rest": peak - sum(held.values())}
    told = [_part(name, size, predicted.get(name) if predicted else None) for name, size in parts.items()]
    whole = _part("all", peak, sum(predicted.values()) if predicted else None)
    return f"{', '.join(told)}; {whole}" + (" (in brackets: expected by dico plan on a GPU)" if predicted else "")


def _part(name: str, size: float, predicted: float | None) -> str:
    shown = _size(size)
    expected = "" if predicted is None else f" ({_size(predicted).removesuffix(shown[-3:])})"
    return f"{name.replace('_', ' ')} {shown}{expected}"


def _size(size: float) -> str:
    """In the unit in which three digits tell something."""
    unit, divisor = next(((unit, d) for unit, d in (("GB", 1e9), ("MB", 1e6)) if abs(size) >= 0.1 * d), ("kB", 1e3))
    return f"{size / divisor:.2f} {unit}"
