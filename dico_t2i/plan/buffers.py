"""Sizes of DeepSpeed's buffers, set in one place for the engine and for the plan."""

LARGEST = 500_000_000  # elements of gradients sent together


def reduce_bucket(parameters: int) -> int:
    """Elements of the buffer in which gradients wait to be sent; DeepSpeed takes it whole at every backward pass."""
    return min(LARGEST, parameters)
