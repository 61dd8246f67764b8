"""Data: what is in the shards, in which order, and micro-batches of it."""
