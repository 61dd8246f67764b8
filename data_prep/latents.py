"""Encode image shards into latent shards, one to one, with a frozen autoencoder.

python data_prep/latents.py --data data/coco --out data/coco_latents --autoencoder /models/sd-vae-ft-ema

Stores the posterior's moments in float16, of each image and of its mirror image. Captions and labels are copied.
A shard is finished or absent: a run that was stopped goes on with the missing ones. Several processes share the
work with --part 0/4, --part 1/4, ...; the last to finish writes the index. Bad images are left out, counted and
listed in skipped.jsonl.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data_prep.common import progress_bar, run
from dico_t2i.config import AutoencoderConfig
from dico_t2i.data.index import MOMENTS, DatasetIndex, ShardFile, load_index, write_index
from dico_t2i.data.reader import SampleError, ShardReader, decode_image
from dico_t2i.encoders import Autoencoder, load_autoencoder
