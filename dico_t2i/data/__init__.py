"""Data: what is in the shards, in which order, and micro-batches of it."""

from dico_t2i.data.buckets import assign_buckets, bucket_shapes, nearest_bucket
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
from dico_t2i.data.order import BucketOrder, MixtureOrder, Order, SampleOrder, rank_positions
from dico_t2i.data.reader import SampleError, ShardReader, decode_image, decode_moments
from dico_t2i.data.sources import MixedIndex, load_data, make_order, same_encoder

__all__ = [
    "BadSample",
    "Batch",
    "BucketOrder",
    "DataError",
    "DatasetIndex",
    "MixedIndex",
    "MixtureOrder",
    "Order",
    "SampleError",
    "SampleOrder",
    "ShardError",
    "ShardFile",
    "ShardIndex",
    "ShardReader",
    "ShardWriter",
    "assign_buckets",
    "bucket_shapes",
    "check_data",
    "decode_image",
    "decode_moments",
    "index_shard",
    "load_data",
    "load_index",
    "make_loader",
    "make_order",
    "nearest_bucket",
    "rank_positions",
    "same_encoder",
    "write_index",
]
