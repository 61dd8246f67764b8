"""Errors in data: in a data set, in a shard, or in a single sample."""


class DataError(ValueError):
    """Raised for data that cannot be used; the message says what is wrong, where, and what to do."""


class ShardError(DataError):
    """Raised for a shard, or the index of a shard, that cannot be read."""


class SampleError(DataError):
    """Raised for a sample that cannot be used. ``shard`` and ``key`` are empty if only its bytes are known."""

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(f"{shard}: sample {key!r}: {reason}" if shard else reason)
        self.shard, self.key, self.reason = shard, key, reason


class QuarantinedError(SampleError):
    """Raised for a sample that is on the quarantine list."""
