"""Operators of the network. Each has one public function here and a plain reference in ``ops.reference``."""

from dico_t2i.ops.convolution import conv3x3, depthwise3x3, pixel_shuffle, pixel_unshuffle
from dico_t2i.ops.text_dwconv import KERNEL_SIZE, text_dwconv

__all__ = ["KERNEL_SIZE", "conv3x3", "depthwise3x3", "pixel_shuffle", "pixel_unshuffle", "text_dwconv"]
