"""The ranks of a run: how they join, agree, watch each other and stop."""
