"""Errors of data: of a whole data set, of a shard, of one sample."""


class DataError(ValueError):
    """Data that cannot be used; the message says what, where and what to do."""


class ShardError(DataError):
    """A shard, or its index, that cannot be read."""


class SampleError(DataError):
    """One sample that cannot be used. ``shard`` and ``key`` are empty where only its bytes are known."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key!r}: {reason}" if shard else reason)
        self.shard, self.key, self.reason = shard, key, reason


class QuarantinedError(SampleError):
    """A sample that the quarantine list leaves out."""
