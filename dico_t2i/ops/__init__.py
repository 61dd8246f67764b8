"""Operators of the network on (N, H, W, C): a public function for each, and plain versions in ``reference``."""

from dico_t2i.ops.convolution import conv3x3, depthwise_conv, pixel_shuffle, pixel_unshuffle
from dico_t2i.ops.depthwise import depthwise3x3_gelu_pool
from dico_t2i.ops.norm import norm_modulate, residual_norm_modulate
from dico_t2i.ops.scale import channel_scale, gated_residual
from dico_t2i.ops.text_dwconv import text_dwconv

__all__ = [
    "channel_scale",
    "conv3x3",
    "depthwise3x3_gelu_pool",
    "depthwise_conv",
    "gated_residual",
    "norm_modulate",
    "pixel_shuffle",
    "pixel_unshuffle",
    "residual_norm_modulate",
    "text_dwconv",
]
