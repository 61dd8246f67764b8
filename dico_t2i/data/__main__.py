"""Indexes a folder of shards again: ``python -m dico_t2i.data DIR``; ``--buckets 256`` assigns buckets, too.

``--part 3/16`` does a share of this for an array of jobs: it indexes every 16th shard that has no index of its size.
The part that finishes last writes index.json. A part that was interrupted goes on where it stopped.
"""

import argparse
from pathlib import Path

from dico_t2i.command import part, script_parser
from dico_t2i.data.buckets import MAX_RATIO, assign_buckets, assign_missing, bucket_shapes, describe_buckets
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import DatasetIndex, index_shards, join_parts, part_of, rebuild_index


def main() -> None:
    parser = script_parser(__doc__)
    parser.prog = "python -m dico_t2i.data"
    add = parser.add_argument
    add("folder", type=Path, help="the folder that holds the shards (*.tar)")
    add("--buckets", type=int, metavar="N", help="assign each image an aspect-ratio bucket of about N x N pixels")
    add("--max-ratio", type=float, default=MAX_RATIO, metavar="R", help="largest ratio of sides (default: %(default)s)")
    add("--part", type=part, metavar="K/N", help="only every N-th shard, and only what is missing (K from 0 to N - 1)")
    arguments = parser.parse_args()
    try:
        index = _index(arguments)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    if index is None:
        print(f"{arguments.folder}: other parts have shards left; the last part writes index.json")
        return
    print(f"{arguments.folder}: {len(index)} samples in {len(index.names)} shards ({index.kind})")
    if arguments.buckets is not None:
        print(describe_buckets(index))


def _index(arguments: argparse.Namespace) -> DatasetIndex | None:
    """The index of the folder; None if a part is done and others are not."""
    buckets = arguments.buckets
    shapes = bucket_shapes(buckets, arguments.max_ratio) if buckets is not None else []
    if arguments.part is None:
        return assign_buckets(arguments.folder, shapes) if shapes else rebuild_index(arguments.folder)
    tars = part_of(arguments.folder, arguments.part)
    index_shards(tars)
    if shapes:
        assign_missing(tars, shapes)
    return join_parts(arguments.folder, tuple(shapes))


if __name__ == "__main__":
    main()
