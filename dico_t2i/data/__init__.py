"""Data: what is in the shards, in which order, and micro-batches of it."""

from dico_t2i.data.batches import BadSample, Batch
from dico_t2i.data.buckets import assign_buckets, bucket_shapes, nearest_bucket
from dico_t2i.data.checks import check_data
from dico_t2i.data.decode import decode_image, decode_moments
from dico_t2i.data.errors import DataError, SampleError, ShardError
from dico_t2i.data.index import DatasetIndex, load_index, write_index
from dico_t2i.data.loader import make_loader
from dico_t2i.data.order import BucketOrder, MixtureOrder, Order, SampleOrder, rank_positions
from dico_t2i.data.reader import ShardReader
from dico_t2i.data.shard import ShardIndex, index_shard
from dico_t2i.data.sources import MixedIndex, load_data, make_order, same_encoder
from dico_t2i.data.writer import ShardFile, ShardWriter

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
