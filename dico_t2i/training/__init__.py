"""Training: the loop, DeepSpeed, the optimizer, checkpoints, observers and the ranks of a run."""
