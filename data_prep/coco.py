"""Pack MS-COCO images and all their captions into shards.

python data_prep/coco.py --images train2014 --captions annotations/captions_train2014.json --out data/coco

Takes the 2014 and 2017 layouts; --images is the folder of the images or its parent. Images are cropped and
resized as the loader would do it, or kept byte for byte with --crop none. What could not be used is counted,
listed and written to report.json.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.common import finished_or_absent, is_finished, progress_bar, run
from dico_t2i.data.index import ShardWriter
from dico_t2i.data.reader import SampleError, decode_image

Crop = Literal["center", "resize", "none"]


class Record(NamedTuple):
    """An image file with what the annotations say of it; width and height are those of the original."""

    path: Path
    image_id: int
    file_name: str
    width: int
    height: int
    captions: list[str]


class Report(dict[str, list[str]]):
    """What could not be used, by reason."""

    def add(self, reason: str, what: str) -> None:
        self.setdefault(reason, []).append(what)

    def lines(self, first: int = 5) -> list[str]:
        """One line a reason: how many, and the first few."""
        return [
            f"{reason}: {len(items)} ({', '.join(items[:first])}{', ...' if len(items) > first else ''})"
            for reason, items in self.items()
        ]


def read_annotations(files: Sequence[Path]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images and caption annotations of COCO caption files. Raises ValueError if a file is not one."""
    from pycocotools.coco import COCO

    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"--captions {file}: no such file")
        coco = COCO()
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            # Without the categories that some caption files name, and which COCO() expects captions to have.
            coco.dataset = {name: content[name] for name in ("images", "annotations")}
            with contextlib.redirect_stdout(io.StringIO()):  # it reports its progress with print
                coco.createIndex()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--captions {file}: not a COCO annotation file: {error!r}") from None
        if not any("caption" in item for item in coco.anns.values()):
            raise ValueError(f"--captions {file}: has no captions; expected a captions_*.json")
        images += coco.imgs.values()
        annotations += coco.anns.values()
    return images, annotations


def match(images_folder: Path, files: Sequence[Path]) -> tuple[list[Record], Report]:
    """The images that have a file and a caption, by id, and what was left out.

    Raises ValueError if the folder is missing or no image matches.
    """
    if not images_folder.is_dir():
        raise ValueError(f"--images {images_folder}: no such folder")
    images, annotations = read_annotations(files)
    report = Report()
    captions: dict[int, list[str]] = {image["id"]: [] for image in images}
    for item in annotations:
        text = " ".join(str(item.get("caption", "")).split())
        if item["image_id"] not in captions:
            report.add("captions of images not in the annotations", str(item["image_id"]))
        elif text:
            captions[item["image_id"]].append(text)
    found = _files_by_name(images_folder)
    records = []
    for _, image in sorted({image["id"]: image for image in images}.items()):
        name = image["file_name"]
        if name not in found:
            report.add("missing image files", name)
        elif not captions[image["id"]]:
            report.add("images without captions", name)
        else:
            size = (image.get("width", 0), image.get("height", 0))
            records.append(Record(found[name], image["id"], name, *size, captions[image["id"]]))
    if not records:
        example = images[0]["file_name"] if images else "none"
        raise ValueError(
            f"--images {images_folder}: not one of {len(images)} annotated images is there with a caption;"
            f" looked for names such as {example} in the folder and the folders directly in it"
        )
    return records, report


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Files of a folder and of the folders directly in it."""
    folders = [*sorted(path for path in folder.iterdir() if path.is_dir()), folder]
    entries = (entry for place in folders for entry in os.scandir(place))
    return {entry.name: Path(entry.path) for entry in entries if entry.is_file()}


def make_sample(record: Record, *, size: int, crop: Crop, quality: int) -> dict[str, Any] | str:
    """The shard's sample of an image, or why there is none."""
    try:
        content, extension = record.path.read_bytes(), record.path.suffix[1:].lower()
        pixels = decode_image(content, size, "center" if crop == "none" else crop)
    except (OSError, SampleError) as error:
        return f"{record.file_name}: {error}"
    if crop != "none":
        buffer, extension = io.BytesIO(), "jpg"
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
        content = buffer.getvalue()
    about = {name: getattr(record, name) for name in ("captions", "image_id", "file_name", "width", "height")}
    return {"__key__": f"{record.image_id:012d}", extension: content, "json": about}


def make_samples(records: Sequence[Record], workers: int, **settings: Any) -> Iterator[dict[str, Any] | str]:
    """``make_sample`` of every record, in order, by ``workers`` processes."""
    job = partial(make_sample, **settings)
    if workers == 1:
        yield from map(job, records)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        window = 64 * workers  # bounds what waits in memory
        for start in range(0, len(records), window):
            yield from pool.map(job, records[start : start + window], chunksize=8)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="folder of the images, or its parent")
    add("--captions", type=Path, required=True, nargs="+", metavar="JSON", help="COCO caption annotations")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of shards to make")
    add("--size", type=int, default=256, help="pixels of the stored square (default: 256)")
    add("--crop", choices=("center", "resize", "none"), default="center", help="none: files as they are")
    add("--quality", type=int, default=95, help="of the stored JPEG, 1 to 100 (default: 95)")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="(default: 1000)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each CPU core)")
    args = parser.parse_args(argv)
    if min(args.size, args.samples_per_shard, args.workers) < 1 or not 1 <= args.quality <= 100:
        raise ValueError("--size, --samples-per-shard, --workers: at least 1; --quality: 1 to 100")

    records, report = match(args.images, args.captions)
    settings = {"size": args.size, "crop": args.crop, "quality": args.quality}
    if args.crop == "none":
        settings = {"crop": "none"}
    meta = {
        "source": "coco",
        "captions": [file.name for file in args.captions],
        "images": len(records),
        **settings,
    }
    if is_finished(args.out, meta):
        print(f"{args.out}: already holds these images")
        return 0
    with (
        finished_or_absent(args.out) as folder,
        ShardWriter(folder, kind="images", meta=meta, samples_per_shard=args.samples_per_shard) as writer,
        progress_bar() as progress,
    ):
        samples = make_samples(records, args.workers, size=args.size, crop=args.crop, quality=args.quality)
        for sample in progress.track(samples, total=len(records), description="images"):
            if isinstance(sample, str):
                report.add("undecodable images", sample)
            else:
                writer.write(sample)
        if not writer.samples:
            raise ValueError(f"--images {args.images}: {report.lines()[-1]}; no image is left")
        (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {writer.samples} images", *report.lines(), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
