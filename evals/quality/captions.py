"""Selects the captions of COCO that are sampled, by a rule that depends on nothing but the annotation file.

Image and annotation ids get keys of 64 bits from Philox: the key of an image is that of (prompts.seed, "evaluation
image", image id), the key of a caption that of (prompts.seed, "evaluation caption", annotation id). An image's caption
is the one with the smallest key. ``drawn`` takes the images with the smallest keys, in the order of keys, so that the
first 10,000 of 30,000 are the same as a draw of 10,000; ``in_order`` takes them by id. Blank captions are ignored.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.coco import Annotation, Id, Places, read_annotations
from dico_t2i import randomness
from dico_t2i.data.sample import captions_in
from evals.quality.protocol import Prompts, digest


@dataclass(frozen=True)
class Draw:
    """The drawn captions in the order of sampling, and the files that they were drawn from."""

    image_ids: tuple[int, ...]
    captions: tuple[str, ...]
    files: tuple[str, ...]  # of the drawn images
    all_files: tuple[str, ...]  # of all annotated images, by id
    source: dict[str, str]  # sha256 of the annotation file and of the drawn ids


def draw(file: Path, prompts: Prompts) -> Draw:
    """Draw the captions of a protocol. Raises ValueError if the file is of a different split or has too few images."""
    content = read_annotations(file)
    names = {_number(file, image.id): image.file_name for image in content.images.values()}
    if prompts.annotated_images not in (None, len(names)):
        raise ValueError(
            f"--captions {file}: it annotates {len(names)} images, such as {next(iter(names.values()))}; this"
            f" protocol's captions are of a split of {prompts.annotated_images}. To evaluate on a different split, with"
            " a result that is not comparable: --set prompts.annotated_images=null"
        )
    captions = _one_an_image(file, content.captions, names, prompts.seed)
    order = np.array(sorted(captions), dtype=np.int64)
    if prompts.rule == "drawn":
        order = order[np.argsort(_keys(order, prompts.seed, "evaluation image"), kind="stable")]
    if len(order) < prompts.count:
        raise ValueError(
            f"--captions {file}: {len(order)} images have captions, but this protocol draws {prompts.count}; to draw"
            f" fewer, with a result that is not comparable: --set prompts.count={len(order)}"
        )
    chosen = [int(i) for i in order[: prompts.count]]
    ids = tuple(captions[i][0] for i in chosen)
    source = {"captions_sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "drawn_sha256": digest([chosen, ids])}
    return Draw(
        tuple(chosen),
        tuple(captions[i][1] for i in chosen),
        tuple(names[i] for i in chosen),
        tuple(names[i] for i in sorted(names)),
        source,
    )


def find_files(names: tuple[str, ...], folder: Path) -> list[Path]:
    """The image files with these names, in the folder or its direct subfolders.

    Raises ValueError, with numbers, if any is missing, or if several files fit a name.
    """
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    places = Places(folder)
    found = {name: place for name in names if isinstance(place := places.find(name, "--captions"), str)}
    missing = [name for name in names if name not in found]
    if missing:
        hint = "; the folder is of a different split, or empty" if len(missing) == len(names) else ""
        raise ValueError(
            f"--images {folder}: {len(missing)} of {len(names)} reference images are missing"
            f" ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}){hint}"
        )
    return [folder / found[name] for name in names]


def _number(file: Path, identity: Id) -> int:
    """The number of an id, by which images and captions are drawn. Raises ValueError if it is not a number."""
    if not isinstance(identity, int):
        raise ValueError(f"--captions {file}: id {identity!r} is not a number, but captions are drawn by their numbers")
    return identity


def _one_an_image(file: Path, notes: list[Annotation], names: dict[int, str], seed: int) -> dict[int, tuple[int, str]]:
    """The caption of each image with the smallest key: image id -> annotation id and caption."""
    texts = {}
    for note in notes:
        captions, _ = captions_in(note.caption)
        text = next((caption.text for caption in captions), "")
        texts[_number(file, note.id)] = (_number(file, note.image_id), " ".join(text.split()))
    ids = np.array(sorted(i for i, (image, text) in texts.items() if text and image in names), dtype=np.int64)
    chosen: dict[int, tuple[int, str]] = {}
    for i in ids[np.argsort(_keys(ids, seed, "evaluation caption"), kind="stable")]:
        image, text = texts[int(i)]
        chosen.setdefault(image, (int(i), text))
    return chosen


def _keys(ids: NDArray[np.int64], seed: int, purpose: str) -> NDArray[np.uint64]:
    high, low = randomness.words(seed, purpose, torch.from_numpy(ids), 2).numpy().astype(np.uint64).T
    keys: NDArray[np.uint64] = (high << np.uint64(32)) | low
    return keys
