"""Encode image shards into latent shards, one to one, with a frozen autoencoder and optionally a text encoder.

python data_prep/latents.py --data data/coco --out data/coco_latents --autoencoder /models/sd-vae-ft-ema

Stores the posterior's moments in float16, of each image and of its mirror image, and in the index the mean and scale
that give each channel of the latents mean 0 and variance 1 (autoencoder.scale: measured). Captions and labels are
copied; with --text-encoder the features of all captions are stored, too. A shard is complete or absent: a run that was
stopped resumes with the missing ones. Several processes share the work with --part 0/4, --part 1/4, ...; the last one
to finish writes the index. Samples in quarantine and bad images are skipped, counted and listed in skipped.jsonl.
check.png shows the first images beside the images that the decoder makes from their latents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from PIL import Image as Picture

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' folders are not installed
from data_prep.common import claim, held, remove_leftovers
from data_prep.encoding import Batch, Clock, Image, batches_of
from data_prep.latent_moments import Sums, measured
from dico_t2i.command import part, progress_bar, run, script_parser
from dico_t2i.config import MEASURED, AutoencoderConfig, load_config
from dico_t2i.data import quarantine
from dico_t2i.data.errors import DataError, SampleError
from dico_t2i.data.index import DatasetIndex, load_index, write_index
from dico_t2i.data.sample import POOLED, TEXT, captions_of
from dico_t2i.data.shard import MOMENTS
from dico_t2i.data.writer import ShardFile
from dico_t2i.files import write_atomically
from dico_t2i.text_lines import read_lines

if TYPE_CHECKING:  # --help must not wait for them
    import torch

    from dico_t2i.encoders import Autoencoder, TextEncoder

_CHECKED = 8  # images in check.png


Crop = Literal["center", "resize"]


@dataclass(frozen=True)
class Job:
    """The source, the encoders and the output folder. meta: everything that the latent data set depends on."""

    source: DatasetIndex
    out: Path
    autoencoder: Autoencoder
    text_encoder: TextEncoder | None
    size: int
    crop: Crop
    mirror: bool
    batch: int
    meta: dict[str, Any]


class Shard:
    """A latent shard that the writing thread is making. After an error it is discarded."""

    def __init__(self, path: Path) -> None:
        self._file = ShardFile(path)
        self._skipped: list[SampleError] = []
        self._sums = Sums()
        self._ended = False

    def write(self, encoded: Encoded, bucket: int | None) -> None:
        """Add samples; those with features that float16 cannot represent are skipped."""
        if self._ended:
            return
        self._skipped += encoded.skipped
        place = {} if bucket is None else {"__bucket__": bucket}
        try:
            for image, arrays in zip(encoded.images, encoded.arrays, strict=True):
                bad = [name for name, values in arrays.items() if not np.isfinite(values).all()]
                if bad:
                    reason = f"its {bad[0].removesuffix('.npy')} are not finite in float16"
                    self._skipped.append(SampleError(self._file.path.name, str(image.copied["__key__"]), reason))
                else:
                    self._file.write({**image.copied, **arrays, **place})
                    self._sums.add(arrays[MOMENTS])
        except BaseException:
            self.discard()
            raise

    def finish(self) -> None:
        if self._ended:
            return
        try:
            _log_skipped(self._file.path.parent, self._skipped)
            self._sums.save(self._file.path)
            self._file.commit()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        if not self._ended:
            self._ended = True
            self._file.discard()


class Encoded(NamedTuple):
    """Images with their features by member name, and samples that were skipped."""

    images: list[Image]
    arrays: list[dict[str, np.ndarray]]
    skipped: list[SampleError]


def encode_shards(job: Job, shards: Sequence[int], advance: Callable[[int], None] = lambda samples: None) -> str:
    """Make the latent shards of these image shards, in order; ``advance`` gets the number of samples just done.

    Reading, decoding and writing run in parallel with the encoder, which waits for them only if they are slower.
    Returns a line that says how the time was spent.
    """
    clock, shard, done = Clock(), None, 0
    batches = batches_of(job.source, shards, job.batch, job.size, job.crop)
    try:
        while (batch := _next(batches, clock)) is not None:
            shard = shard or Shard(job.out / job.source.names[batch.shard])
            with clock.measure("encoding"):
                encoded = _encode(job, batch)
            if batch.shard == 0 and batch.first and encoded.images:
                draw_check(job, encoded)
            clock.in_background(shard.write, encoded, batch.bucket)
            if batch.last:
                clock.in_background(shard.finish)
                shard = None
            done += batch.samples
            advance(batch.samples)
        clock.finish()
    finally:
        batches.close()
        clock.close()
        if shard is not None:
            shard.discard()
    return clock.line(done)


def _next(batches: Iterator[Batch], clock: Clock) -> Batch | None:
    with clock.measure("waiting for images"):
        return next(batches, None)


def _encode(job: Job, batch: Batch) -> Encoded:
    """Moments (2C, h, w), or (2, 2C, h, w) with the mirror image's, and the captions' features if wanted."""
    import torch

    images, skipped, captions = [], list(batch.skipped), []
    for image in batch.images:
        try:
            captions.append(captions_of(image.copied) if job.text_encoder else [])
            images.append(image)
        except SampleError as error:
            key = str(image.copied["__key__"])
            skipped.append(SampleError(job.source.names[batch.shard], key, error.reason))
    if not images:
        return Encoded([], [], skipped)
    pixels = torch.stack([image.pixels for image in images])
    moments = job.autoencoder.moments(pixels)
    if job.mirror:
        moments = torch.stack((moments, job.autoencoder.moments(pixels.flip(-1))), dim=1)
    arrays = [{MOMENTS: values} for values in moments.to(torch.float16).cpu().numpy()]
    if job.text_encoder:
        for values, features in zip(arrays, _encode_text(job.text_encoder, captions, job.batch), strict=True):
            values.update(features)
    return Encoded(images, arrays, skipped)


def _encode_text(encoder: TextEncoder, captions: list[list[str]], batch: int) -> Iterator[dict[str, np.ndarray]]:
    """The features of each image's captions, encoded ``batch`` captions at a time."""
    import torch

    ids = encoder.tokenize([text for texts in captions for text in texts])
    parts = [encoder.encode(part) for part in ids.split(batch)]
    tokens, pooled = (torch.cat(part).to(torch.float16).cpu().numpy() for part in zip(*parts, strict=True))
    start = 0
    for texts in captions:
        rows = slice(start, start + len(texts))
        yield {TEXT: tokens[rows], POOLED: pooled[rows]}
        start = rows.stop


def draw_check(job: Job, encoded: Encoded) -> None:
    """Draw check.png: each column is an image, then its latents decoded, then its mirror image's latents decoded."""
    import torch

    images = encoded.images[:_CHECKED]
    moments = torch.from_numpy(np.stack([arrays[MOMENTS] for arrays in encoded.arrays[:_CHECKED]]))
    rows = [torch.stack([image.pixels for image in images])]
    for view in moments.unbind(1) if job.mirror else (moments,):
        noise = torch.zeros_like(view.chunk(2, dim=1)[0])
        rows.append(job.autoencoder.decode(job.autoencoder.latents(view, noise)).cpu())
    grid = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    Picture.fromarray(grid.permute(1, 2, 0).numpy()).save(job.out / "check.png")


def describe(
    source: DatasetIndex, autoencoder: Autoencoder, text_encoder: TextEncoder | None, args: argparse.Namespace
) -> dict[str, Any]:
    """The meta data of the latent data set: everything that its content depends on, and a hash of that."""
    listed = source.root / quarantine.FILE
    left_out = hashlib.sha256(listed.read_bytes()).hexdigest() if listed.exists() else None
    meta = {
        "autoencoder": autoencoder.identity(),
        **({"text_encoder": text_encoder.identity()} if text_encoder else {}),
        "latent_channels": autoencoder.latent_channels,
        "latent_size": args.size // autoencoder.downscale,
        "image_size": args.size,
        "crop": args.crop,
        "mirrored": args.mirror,
        "dtype": args.dtype,
        **({"buckets": source.meta["buckets"]} if "buckets" in source.meta else {}),
        "source": {
            "samples": len(source),
            "bytes": int(source.bytes.sum()),
            "meta": source.meta,
            **({"quarantine": left_out} if left_out else {}),
        },
    }
    return {**meta, "hash": hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()}


def encode_dataset(job: Job, part: tuple[int, int]) -> None:
    """Encode the missing shards of this part, and write the index once the shards of all parts exist."""
    source, out = job.source, job.out
    there = {entry.name for entry in os.scandir(out)}
    missing = [shard for shard in range(part[0], len(source.names), part[1]) if source.names[shard] not in there]
    with held(out, missing), progress_bar() as progress:
        remove_leftovers(out, {source.names[shard] for shard in missing})
        task = progress.add_task("images", total=int(source.samples[missing].sum()))
        line = encode_shards(job, missing, lambda samples: progress.advance(task, samples))
    if missing:
        print(f"{out}: {line}")
    _finish(source, out, job.meta)


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
        print(f"{out}: {len(missing)} of {len(source.names)} shards remain for other parts")
        return
    index = write_latent_index(out, source.names, meta)
    print(f"{out}: {len(index)} latents of {len(source)} images, {len(source) - len(index)} skipped")
    log = out / "skipped.jsonl"
    if log.exists():
        lines = list(dict.fromkeys(read_lines(log)))  # killed runs may have written a line twice
        write_atomically(log, ("\n".join(lines) + "\n").encode())
        for line in lines[:5]:
            print("  {shard}: {key}: {reason}".format(**json.loads(line)))


def write_latent_index(out: Path, shards: Sequence[str], meta: dict[str, Any]) -> DatasetIndex:
    """Write the index of a folder of latent shards, with the mean and scale of their latents."""
    numbers = measured([out / name for name in shards])
    return write_index(out, "latents", {**meta, **({MEASURED: numbers} if numbers else {})}, check=False)


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None


def add_encoder_options(parser: argparse.ArgumentParser, required: bool) -> None:
    """Add the options that choose the encoders and their device."""
    add = parser.add_argument
    add("--autoencoder", required=required, metavar="PATH", help="autoencoder: local folder, or hub id in the cache")
    add("--kind", choices=("kl", "tiny"), default="kl", help="AutoencoderKL or AutoencoderTiny (default: kl)")
    add("--scale", type=float, default=0.18215, help="latent scale of training (default: 0.18215)")
    add(
        "--text-encoder",
        nargs="+",
        metavar=("CONFIG", "KEY=VALUE"),
        help="also encode captions, with the text_encoder of this training config",
    )
    add("--batch", type=int, default=32, help="images encoded at once (default: 32)")
    add("--device", default="auto", help="auto (cuda if there is one), cpu, cuda, cuda:1 (default: auto)")


def prepare(args: argparse.Namespace) -> Job:
    """The job of a command line. Raises ValueError for options that do not fit, before anything is written."""
    import torch

    from dico_t2i.encoders import load_autoencoder, load_text_encoder

    if args.batch < 1 or args.size < 1 or args.scale <= 0:
        raise ValueError("--batch, --size: at least 1; --scale: above 0")
    source = load_index(args.data)
    if source.kind != "images":
        raise DataError(f"--data {args.data}: it contains {source.kind}, expected images")
    config = AutoencoderConfig(kind=args.kind, path=args.autoencoder, scale=args.scale)
    dtype, device = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype], _device(args.device)
    text_encoder = None
    if args.text_encoder:
        chosen = load_config(args.text_encoder[0], args.text_encoder[1:]).text_encoder
        text_encoder = load_text_encoder(chosen, device, dtype)
    autoencoder = load_autoencoder(config, device, dtype)
    sides = [side for shape in source.meta.get("buckets", ()) for side in shape]
    odd = [side for side in (args.size, *sides) if side % autoencoder.downscale]
    if odd:
        raise ValueError(f"--size {odd[0]}: must be divisible by {autoencoder.downscale}")
    meta = describe(source, autoencoder, text_encoder, args)
    claim(args.out, meta)
    return Job(source, args.out, autoencoder, text_encoder, args.size, args.crop, args.mirror, args.batch, meta)


def main(argv: Sequence[str] | None = None) -> int:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of image shards")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of latent shards to make or resume")
    add_encoder_options(parser, required=True)
    add("--size", type=int, default=256, help="pixels of the square (default: 256)")
    add("--crop", choices=("center", "resize"), default="center", help="(default: center)")
    add("--mirror", action=argparse.BooleanOptionalAction, default=True, help="also encode mirror images (default)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the encoders (default: fp32)")
    add("--part", type=part, default=(0, 1), metavar="K/N", help="make every N-th shard, from K on (default: 0/1)")
    args = parser.parse_args(argv)
    encode_dataset(prepare(args), args.part)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
