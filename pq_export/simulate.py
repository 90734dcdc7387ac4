"""The fake-quant model: the decoder with the integers of a ``Calibration``, in PyTorch.

It computes what the exported graph computes: linears multiply the integer codes themselves, so their
results are exact and equal to the graph's, and everything else is the same fp32 formula. ``.double()``
widens everything else to fp64, quantizers keep rounding in fp32: the reference for validation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pq_export.calibration import KV_SITES, Calibration, input_site
from pq_export.decoder import Decoder, KVPair
from pq_export.hadamard import HadamardTransform
from pq_export.quantizer import code_range, quantize

Tap = Callable[[str, Tensor, Tensor], None]


class QuantLinear(nn.Module):
    """``(codes(x) @ codesᵀ) · (s_x · s_w) + bias``; with 16-bit activations ``x @ (codes · s_w)ᵀ + bias``.

    The product of integers is exact: fp32 holds every partial sum below 2^24, fp64 otherwise.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, input_scale: float | None, input_bits: int):
        """codes: float32 [out, in] holding integers; scale: float32 [out]; bias: float32 [out]."""
        super().__init__()
        self.input_bits = input_bits
        self.input_scale = None if input_scale is None else torch.tensor(input_scale, dtype=torch.float32)
        self.register_buffer("bias", bias)
        if self.input_scale is None:
            self.register_buffer("codes", codes * scale[:, None])
            self.register_buffer("scale", None)
            return
        largest_sum = codes.abs().sum(1).max() * -code_range(input_bits)[0]
        self.register_buffer("codes", codes if largest_sum < 2**24 else codes.double())
        self.register_buffer("scale", self.input_scale * scale)

    def codes_of(self, x: Tensor) -> Tensor:
        """Integer codes of the input, as the graph's activation quantizer makes them."""
        assert self.input_scale is not None  # 16-bit activations have no codes
        return quantize(x.float(), self.input_scale.to(x.device), self.input_bits)

    def steps_of(self, x: Tensor) -> Tensor:
        """The input in units of its scale."""
        assert self.input_scale is not None
        return x / self.input_scale.to(x.device)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is None:
            return F.linear(x, self.codes, self.bias)
        accumulator = F.linear(self.codes_of(x).to(self.codes.dtype), self.codes).to(x.dtype)
        result = accumulator * self.scale.to(x.dtype)
        return result if self.bias is None else result + self.bias.to(x.dtype)


class KVQuantizer(nn.Module):
    """Static fake quantizer of keys or values [B, G, S, D], scale per head or one for all."""

    scale: Tensor

    def __init__(self, scales: tuple[float, ...], bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.tensor(scales, dtype=torch.float32).view(1, -1, 1, 1))

    def codes_of(self, x: Tensor) -> Tensor:
        """Integer codes of keys or values."""
        return quantize(x.float(), self.scale.float(), self.bits)

    def steps_of(self, x: Tensor) -> Tensor:
        """Keys or values in units of their scale."""
        return x / self.scale

    def forward(self, x: Tensor) -> Tensor:
        return (self.codes_of(x) * self.scale.float()).to(x.dtype)


def simulated_decoder(calibration: Calibration) -> Decoder:
    """Build the fake-quant model; needs no checkpoint."""
    c = calibration
    with torch.device("meta"):
        decoder = Decoder(c.decoder)
    decoder.rotary = type(decoder.rotary)(c.decoder)  # the tables are constants, not weights
    tensors = {name: torch.from_numpy(array) for name, array in c.tensors.items()}
    for name, _ in list(decoder.named_parameters()):
        if name in tensors:
            module, _, leaf = name.rpartition(".")
            setattr(decoder.get_submodule(module), leaf, nn.Parameter(tensors[name].float(), requires_grad=False))
    for name in c.linear_names():
        codes = torch.from_numpy(c.weight_codes(name)).float()
        linear = QuantLinear(
            codes,
            tensors[f"{name}.scale"],
            tensors.get(f"{name}.bias"),
            c.input_scale(name),
            c.activation_bits(input_site(name)),
        )
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), leaf, linear)
    insert_online_rotations(decoder, c.rotation.online)
    for name, scales in c.kv_scales.items():
        parent, _, leaf = name.rpartition(".")
        setattr(decoder.get_submodule(parent), f"{leaf}_quantizer", KVQuantizer(scales, c.kv_bits(name)))
    prefix = c.prefix_kv()
    decoder.set_prefix(None if prefix is None else [_to_pair(k, v) for k, v in prefix])
    return decoder.eval().requires_grad_(False)


def _to_pair(key: np.ndarray, value: np.ndarray) -> KVPair:
    return torch.from_numpy(key).float()[None], torch.from_numpy(value).float()[None]


def insert_online_rotations(decoder: Decoder, online: tuple[str, ...]) -> None:
    """Put the Hadamards named in ``online`` (R3, R4) where the decoder executes them."""
    device, config = decoder.embed_tokens.weight.device, decoder.config
    for layer in decoder.layers:
        if "R3" in online:
            layer.self_attn.q_rotation = HadamardTransform(config.head_dim).to(device)
            layer.self_attn.k_rotation = HadamardTransform(config.head_dim).to(device)
        if "R4" in online:
            layer.mlp.down_rotation = HadamardTransform(config.intermediate_size).to(device)


def tap_codes(decoder: Decoder, tap: Tap) -> list[torch.utils.hooks.RemovableHandle]:
    """Call ``tap(site, codes, steps)`` at every quantizer: linear inputs and new keys and values.

    ``steps`` are the values in units of the scale, before rounding.
    """
    handles = []

    def hook(module: QuantLinear | KVQuantizer, site: str) -> None:
        def show(seen: Any, args: tuple[Tensor, ...]) -> None:  # a hook that returned something would change the input
            tap(site, seen.codes_of(args[0]), seen.steps_of(args[0]))

        handles.append(module.register_forward_pre_hook(show))

    for index, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        linears = {
            "self_attn.qkv_input": attention.q_proj,
            "self_attn.o_input": attention.o_proj,
            "mlp.gate_up_input": mlp.gate_proj,
            "mlp.down_input": mlp.down_proj,
        }
        # The decoder declares nn.Linear; a simulated one has these in their place.
        for site, linear in cast("dict[str, QuantLinear]", linears).items():
            if linear.input_scale is not None:
                hook(linear, f"layers.{index}.{site}")
        for site in KV_SITES:
            quantizer = getattr(attention, f"{site.rpartition('.')[2]}_quantizer")
            if isinstance(quantizer, KVQuantizer):
                hook(quantizer, f"layers.{index}.{site}")
    return handles
