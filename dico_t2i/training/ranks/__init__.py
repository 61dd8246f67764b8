"""How the ranks of a run join, agree, watch each other and stop."""
