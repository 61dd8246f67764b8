"""Names of the tensors kept for each parameter: the weight, Adam's moments and the averages."""

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


def ema_name(decay: float) -> str:
    """The name of an average in the optimizer's state and in checkpoints."""
    return f"ema_{decay:g}"
