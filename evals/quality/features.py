"""The kinds of features and the networks that give them. Imports nothing heavy, for the table of metrics reads it.

To add a network, give its features a row here and its weights a key of ``Models``, and write its class in
extractors.py.
"""

from typing import NamedTuple

from pydantic import Field

from dico_t2i.config import Section

POOL, SPATIAL, LOGITS, DINO, CLIP = "pool", "spatial", "logits", "dinov2", "clip"
INCEPTION = "inception"
POOL_DIMENSION = 2048
SPATIAL_DIMENSION = 7 * 17 * 17


class Feature(NamedTuple):
    """network: the FID Inception or a key of ``Models``. gaussian, rows: whether a set of images keeps the mean and
    covariance of this kind of features, and whether it keeps the features of each image."""

    network: str
    gaussian: bool = False
    rows: bool = False


FEATURES = {
    POOL: Feature(INCEPTION, gaussian=True, rows=True),
    SPATIAL: Feature(INCEPTION, gaussian=True),
    LOGITS: Feature(INCEPTION, rows=True),
    DINO: Feature("dinov2", gaussian=True),
    CLIP: Feature("clip", rows=True),
}


class Models(Section):
    """Hub ids or folders of the networks beside the FID Inception; each is an option of the command lines, too.

    Protocols hold these keys. One that is added is excluded at its default (``exclude_if``), so that their hashes stay.
    """

    clip: str = Field(default="timm/vit_large_patch14_clip_224.openai", description="the CLIP model of the CLIP score")
    dinov2: str = Field(default="facebook/dinov2-large", description="DINOv2")
