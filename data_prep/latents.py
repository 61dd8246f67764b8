"""Encode image shards into latent shards, one to one, with a frozen autoencoder.

python data_prep/latents.py --data data/coco --out data/coco_latents --autoencoder /models/sd-vae-ft-ema

Stores the posterior's moments in float16, of each image and of its mirror image. Captions and labels are
copied. A shard is finished or absent: a run that was stopped goes on with the missing ones. Several processes
share the work with --part 0/4, --part 1/4, ...; the last to finish writes the index. Bad images are left out,
counted and listed in skipped.jsonl.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.common import progress_bar, run
from dico_t2i.config import AutoencoderConfig
from dico_t2i.data.index import MOMENTS, DataError, DatasetIndex, ShardFile, load_index, write_index
from dico_t2i.data.loader import IMAGE_EXTENSIONS
from dico_t2i.data.reader import SampleError, ShardReader, decode_image
from dico_t2i.encoders import Autoencoder, load_autoencoder

COPIED = ("json", "txt", "cls")  # members that go along with the moments


class Image(NamedTuple):
    """A decoded image, (3, size, size) uint8, with the members to copy."""

    copied: dict[str, bytes | str]
    pixels: Tensor


Skip = Callable[[SampleError], None]
Decode = Callable[[bytes], Tensor]


def encode_shard(
    reader: ShardReader,
    shard: int,
    out: Path,
    autoencoder: Autoencoder,
    decode: Decode,
    *,
    batch: int,
    mirror: bool,
) -> list[SampleError]:
    """Write the latent shard of one image shard to ``out`` and return the samples left out."""
    skipped: list[SampleError] = []
    file = ShardFile(out)
    try:
        for images in _batches(reader, shard, decode, batch, skipped.append):
            moments = _encode(autoencoder, torch.stack([image.pixels for image in images]), mirror)
            for image, values in zip(images, moments, strict=True):
                if np.isfinite(values).all():
                    file.write({**image.copied, MOMENTS: values})
                else:
                    reason = "its moments are not finite in float16"
                    skipped.append(SampleError(out.name, str(image.copied["__key__"]), reason))
    except BaseException:
        file.discard()
        raise
    file.commit()
    return skipped


def _encode(autoencoder: Autoencoder, images: Tensor, mirror: bool) -> np.ndarray:
    """(n, 3, H, W) uint8 -> moments (n, 2C, h, w), with ``mirror`` (n, 2, 2C, h, w), float16."""
    moments = autoencoder.moments(images)
    if mirror:
        moments = torch.stack((moments, autoencoder.moments(images.flip(-1))), dim=1)
    return moments.to(torch.float16).cpu().numpy()


def _batches(reader: ShardReader, shard: int, decode: Decode, batch: int, skip: Skip) -> Iterator[list[Image]]:
    """Decoded images of a shard, ``batch`` at a time; the next batch is decoded while this one is encoded."""
    starts = range(0, int(reader.index.samples[shard]), batch)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:

        def submit(start: int) -> list[Future[Image]]:
            members = range(start, min(start + batch, starts.stop))
            return [pool.submit(_load, *sample, decode) for sample in _read(reader, shard, members, skip)]

        ahead = submit(0) if starts else []
        for start in starts:
            current, ahead = ahead, submit(start + batch)
            images = list(_results(current, skip))
            if images:
                yield images


def _read(reader: ShardReader, shard: int, members: range, skip: Skip) -> Iterator[tuple[str, dict[str, bytes | str]]]:
    for member in members:
        try:
            yield reader.index.names[shard], reader.read(shard, member)
        except SampleError as error:
            skip(error)


def _load(shard: str, sample: dict[str, bytes | str], decode: Decode) -> Image:
    key = str(sample["__key__"])
    data = next((sample[name] for name in IMAGE_EXTENSIONS if name in sample), None)
    if not isinstance(data, bytes):
        raise SampleError(shard, key, "has no image")
    try:
        pixels = decode(data)
    except SampleError as error:
        raise SampleError(shard, key, error.reason) from None
    return Image({name: sample[name] for name in ("__key__", *COPIED) if name in sample}, pixels)


def _results(futures: Sequence[Future[Image]], skip: Skip) -> Iterator[Image]:
    for future in futures:
        try:
            yield future.result()
        except SampleError as error:
            skip(error)


def describe(source: DatasetIndex, autoencoder: Autoencoder, args: argparse.Namespace) -> dict[str, Any]:
    """The meta data of the latent data set: all that its contents depend on."""
    return {
        "autoencoder": autoencoder.identity(),
        "latent_channels": autoencoder.latent_channels,
        "latent_size": args.size // autoencoder.downscale,
        "image_size": args.size,
        "crop": args.crop,
        "mirrored": args.mirror,
        "dtype": args.dtype,
        "source": {"samples": len(source), "bytes": int(source.bytes.sum()), "meta": source.meta},
    }


def _claim(out: Path, meta: dict[str, Any]) -> None:
    """Note in ``out`` what it will hold. Raises ValueError if it holds something else already."""
    file = out / "settings.json"
    if file.exists():
        found = json.loads(file.read_text(encoding="utf-8"))
        differ = [name for name in meta if found.get(name) != json.loads(json.dumps(meta[name]))]
        if differ:
            raise ValueError(f"--out {out}: holds latents with another {', '.join(differ)}; choose another folder")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out}: holds other files; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".settings.{os.getpid()}.part"
    part.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def encode_dataset(source: DatasetIndex, autoencoder: Autoencoder, args: argparse.Namespace) -> None:
    """Encode the missing shards of this part; write the index once no shard of any part is missing."""
    meta = describe(source, autoencoder, args)
    _claim(args.out, meta)
    number, parts = args.part
    own = list(range(number, len(source.names), parts))
    missing = [shard for shard in own if not (args.out / source.names[shard]).exists()]
    reader = ShardReader(source)
    decode = partial(decode_image, size=args.size, crop=args.crop)
    with progress_bar() as progress:
        task = progress.add_task("images", total=int(source.samples[missing].sum()))
        for shard in missing:
            out = args.out / source.names[shard]
            for leftover in args.out.glob(f".{out.name}.*.part"):  # of a run that was killed
                leftover.unlink()
            skipped = encode_shard(reader, shard, out, autoencoder, decode, batch=args.batch, mirror=args.mirror)
            _log_skipped(args.out, skipped)
            progress.advance(task, int(source.samples[shard]))
    reader.close()
    _finish(source, args.out, meta)


def _log_skipped(out: Path, skipped: Sequence[SampleError]) -> None:
    if not skipped:
        return
    with (out / "skipped.jsonl").open("a", encoding="utf-8") as log:
        log.writelines(
            json.dumps({"shard": item.shard, "key": item.key, "reason": item.reason}) + "\n" for item in skipped
        )


def _finish(source: DatasetIndex, out: Path, meta: dict[str, Any]) -> None:
    missing = [name for name in source.names if not (out / name).exists()]
    if missing:
        print(f"{out}: {len(missing)} of {len(source.names)} shards are left to other parts")
        return
    index = write_index(out, "latents", meta)
    print(f"{out}: {len(index)} latents of {len(source)} images, {len(source) - len(index)} skipped")
    log = out / "skipped.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines()[:5] if log.exists() else ():
        print("  {shard}: {key}: {reason}".format(**json.loads(line)))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and int(number) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 0 to N - 1")
    return int(number), int(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of image shards")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of latent shards to make or go on with")
    add("--autoencoder", required=True, metavar="PATH", help="local folder or hub id in the cache")
    add("--kind", choices=("kl", "tiny"), default="kl", help="AutoencoderKL or AutoencoderTiny (default: kl)")
    add("--scale", type=float, default=0.18215, help="latent scale of training (default: 0.18215)")
    add("--size", type=int, default=256, help="pixels (default: 256)")
    add("--crop", choices=("center", "resize"), default="center", help="(default: center)")
    add("--batch", type=int, default=32, help="images encoded at once (default: 32)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True, help="mirror images too (default)")
    add("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 (default: auto)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the encoder (default: fp32)")
    add("--part", type=_part, default=(0, 1), metavar="K/N", help="every N-th shard from K on (default: 0/1)")
    args = parser.parse_args(argv)
    if args.batch < 1 or args.size < 1 or args.scale <= 0:
        raise ValueError("--batch, --size: at least 1; --scale: above 0")
    source = load_index(args.data)
    if source.kind != "images":
        raise DataError(f"--data {args.data}: holds {source.kind}, expected images")
    config = AutoencoderConfig(kind=args.kind, path=args.autoencoder, scale=args.scale)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    autoencoder = load_autoencoder(config, _device(args.device), dtype)
    if args.size % autoencoder.downscale:
        raise ValueError(f"--size {args.size}: must be divisible by {autoencoder.downscale}")
    encode_dataset(source, autoencoder, args)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
