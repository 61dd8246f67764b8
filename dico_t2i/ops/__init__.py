"""Operators of the networks on (N, H, W, C) or on tokens: a public function for each, and plain versions."""

import torch

from dico_t2i.ops.convolution import causal_conv, conv3x3, depthwise_conv, pixel_shuffle, pixel_unshuffle
from dico_t2i.ops.depthwise import depthwise3x3_gelu_pool
from dico_t2i.ops.linear import PRODUCTS, gate_linear, gelu_linear, norm_linear, norm_linear_gelu, norm_text_dwconv
from dico_t2i.ops.linear_attention import gated_linear_attention
from dico_t2i.ops.norm import norm_modulate, residual_norm_modulate
from dico_t2i.ops.operator import flop_formulas
from dico_t2i.ops.scale import channel_gate, channel_scale, gated_residual
from dico_t2i.ops.selective_scan import selective_scan
from dico_t2i.ops.text_dwconv import text_dwconv

# The operators that are recurrences along tokens, as torch.library knows them.
SCANS = (torch.ops.dico_t2i.gated_linear_attention, torch.ops.dico_t2i.selective_scan)

__all__ = [
    "PRODUCTS",
    "SCANS",
    "causal_conv",
    "channel_gate",
    "channel_scale",
    "conv3x3",
    "depthwise3x3_gelu_pool",
    "depthwise_conv",
    "flop_formulas",
    "gate_linear",
    "gated_linear_attention",
    "gated_residual",
    "gelu_linear",
    "norm_linear",
    "norm_linear_gelu",
    "norm_modulate",
    "norm_text_dwconv",
    "pixel_shuffle",
    "pixel_unshuffle",
    "residual_norm_modulate",
    "selective_scan",
    "text_dwconv",
]
