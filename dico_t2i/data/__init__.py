"""Data: what is in the shards, in which order, and micro-batches of it."""

from dico_t2i.data.checks import check_data
from dico_t2i.data.index import (
    DataError,
    DatasetIndex,
    ShardError,
    ShardFile,
    ShardIndex,
    ShardWriter,
    index_shard,
    load_index,
    write_index,
)
from dico_t2i.data.loader import BadSample, Batch, make_loader
from dico_t2i.data.order import Order, rank_positions
from dico_t2i.data.reader import SampleError, ShardReader, decode_image, decode_moments

__all__ = [
    "BadSample",
    "Batch",
    "DataError",
    "DatasetIndex",
    "Order",
    "SampleError",
    "ShardError",
    "ShardFile",
    "ShardIndex",
    "ShardReader",
    "ShardWriter",
    "check_data",
    "decode_image",
    "decode_moments",
    "index_shard",
    "load_index",
    "make_loader",
    "rank_positions",
    "write_index",
]
