"""A run as it lies on disk: its folder, log, checkpoints, weights and evaluations."""
