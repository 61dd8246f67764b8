"""Index a folder of shards anew: ``python -m dico_t2i.data DIR``; with ``--buckets 256``, the images' shapes too."""

import argparse

from dico_t2i.data.buckets import MAX_RATIO, assign_buckets, bucket_shapes, describe_buckets
from dico_t2i.data.errors import DataError
from dico_t2i.data.index import rebuild_index


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dico_t2i.data", description="Index shards anew.")
    add = parser.add_argument
    add("folder", help="folder of shards (*.tar)")
    add("--buckets", type=int, metavar="N", help="assign each image an aspect-ratio bucket of about N x N pixels")
    add("--max-ratio", type=float, default=MAX_RATIO, metavar="R", help="of a bucket's sides (default: %(default)s)")
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
