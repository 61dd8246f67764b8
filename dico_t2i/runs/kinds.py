"""Names of what is kept of each parameter: the weight, Adam's moments, the averages."""

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


def ema_name(decay: float) -> str:
    """The name under which an average is kept in the optimizer's state and in checkpoints."""
    return f"ema_{decay:g}"
