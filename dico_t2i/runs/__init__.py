"""The files of a run: its folder, log, checkpoints, weights and evaluations."""
