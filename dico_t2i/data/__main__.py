"""Index a folder of shards anew: ``python -m dico_t2i.data DIR``."""

import argparse

from dico_t2i.data.index import DataError, rebuild_index


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dico_t2i.data", description="Index shards anew.")
    parser.add_argument("folder", help="folder of shards (*.tar)")
    folder = parser.parse_args().folder
    try:
        index = rebuild_index(folder)
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{folder}: {len(index)} samples in {len(index.names)} shards ({index.kind})")


if __name__ == "__main__":
    main()
