"""Indexes a folder of shards again: ``python -m dico_t2i.data DIR``; ``--buckets 256`` assigns buckets, too."""

import argparse

from dico_t2i.data.buckets import MAX_RATIO, assign_buckets, bucket_shapes, describe_buckets
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import rebuild_index


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dico_t2i.data", description="Index a folder of shards again.")
    add = parser.add_argument
    add("folder", help="the folder that holds the shards (*.tar)")
    add("--buckets", type=int, metavar="N", help="assign each image an aspect-ratio bucket of about N x N pixels")
    add("--max-ratio", type=float, default=MAX_RATIO, metavar="R", help="largest ratio of sides (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        if arguments.buckets is None:
            index = rebuild_index(arguments.folder)
        else:
            index = assign_buckets(arguments.folder, bucket_shapes(arguments.buckets, arguments.max_ratio))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{arguments.folder}: {len(index)} samples in {len(index.names)} shards ({index.kind})")
    if arguments.buckets is not None:
        print(describe_buckets(index))


if __name__ == "__main__":
    main()
