"""The kinds of features and their networks. Imports nothing heavy, because the table of metrics reads it.

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
    """A kind of features.

    network: the FID Inception or a key of ``Models``. gaussian: whether a set of images keeps their mean and
    covariance. rows: whether it keeps the features of each image.
    """

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
    """Hub ids or folders of the networks other than the FID Inception; each is an option of the command lines, too.

    Protocols contain these keys. A new key must be excluded at its default (``exclude_if``), so that their hashes stay
    the same.
    """

    clip: str = Field(default="timm/vit_large_patch14_clip_224.openai", description="the CLIP model of the CLIP score")
    dinov2: str = Field(default="facebook/dinov2-large", description="DINOv2")
