"""Biases for a decoder whose checkpoint has none: places where constants can go that rewrites and rounding find."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from pq_export.calib.block import NORMS, get_linear
from pq_export.calibration import SITE_OF_LINEAR
from pq_export.decoder import Decoder


def add_linear_biases(decoder: Decoder) -> None:
    """Give every linear of the layers a bias of zeros where it has none: the function stays what it is."""
    for layer in decoder.layers:
        for name in SITE_OF_LINEAR:
            linear = get_linear(layer, name)
            if linear.bias is None:
                linear.bias = _zeros(linear.weight.new_zeros(len(linear.weight)))
    decoder.config = replace(decoder.config, qkv_bias=True, o_bias=True, mlp_bias=True)


def add_norm_biases(decoder: Decoder) -> None:
    """The same for the layers' norms."""
    for layer in decoder.layers:
        for name in NORMS:
            norm = layer.get_submodule(name)
            if norm.bias is None:
                norm.bias = _zeros(torch.zeros_like(norm.weight))
    decoder.config = replace(decoder.config, norm_bias=True)


def add_key_offsets(decoder: Decoder) -> None:
    """Give every attention a key offset of zeros [G, 1, D]."""
    c = decoder.config
    for layer in decoder.layers:
        if layer.self_attn.key_offset is None:
            size = (c.num_kv_heads, 1, c.head_dim)
            layer.self_attn.key_offset = _zeros(layer.self_attn.k_proj.weight.new_zeros(size))
    decoder.config = replace(c, key_offset=True)


def _zeros(value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)
