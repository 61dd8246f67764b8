"""Sizes of DeepSpeed's buffers, used by both the engine and the plan."""

LARGEST = 500_000_000  # most elements of gradients that are sent together


def reduce_bucket(parameters: int) -> int:
    """The number of elements of the gradient buffer, which DeepSpeed allocates whole in each backward pass."""
    return min(LARGEST, parameters)
