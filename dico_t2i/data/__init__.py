"""Data: the contents of the shards, the order of the samples, and the micro-batches."""
