"""A decoder's weights on the GPU: linears packed for the kernels, constants as the kernels read them.

Linears that read the same codes are one product: q, k and v along N, gate and up along N. Where their bits differ,
all take the wider layout: 4-bit codes are 8-bit codes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pq_export.cuda.source import Sizes, Source
from pq_export.errors import PqExportError
from pq_export.hadamard import hadamard_factors
from pq_export.plugins.abi import Layout, Type
from pq_export.plugins.library import K_STEP, PackedWeights
from pq_export.plugins.reference import online_hadamard

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O_PROJ, DOWN_PROJ = ("self_attn.o_proj",), ("mlp.down_proj",)


class Kernels(Protocol):
    """What the decoder calls: :class:`pq_export.plugins.library.Library`, which says what each does."""

    def preferred_layout(self, weight_bits: int, activation_bits: int) -> Layout: ...
    def gemm(self, x: Tensor, weights: Any, y_type: Type, **options: Any) -> Tensor: ...
    def quantize(self, x: Tensor, scale: float, bits: int, codes_type: Type, **options: Any) -> Tensor: ...
    def rmsnorm_quantize(
        self, x: Tensor, scale: float, bits: int, codes_type: Type, **options: Any
    ) -> tuple[Tensor, Tensor]: ...
    def silu_mul_quantize(
        self, gate: Tensor, up: Tensor, scale: float, bits: int, codes_type: Type, **options: Any
    ) -> Tensor: ...
    def quantize_dynamic(self, x: Tensor, bits: int, codes_type: Type, **options: Any) -> tuple[Tensor, Tensor]: ...


Pack = Callable[[np.ndarray, np.ndarray, "np.ndarray | None", Layout], Any]


@dataclass(frozen=True)
class Site:
    """How one linear's input becomes codes: one constant scale, and where the codes lie."""

    scale: float
    bits: int
    codes_type: Type


@dataclass(frozen=True)
class Linear:
    """Quantizer and product: y [..., N] = codes(x [..., K]) wᵀ * scale [+ bias]. ``weights``: a PackedWeights."""

    site: Site
    weights: Any


@dataclass(frozen=True)
class Norm:
    """RMSNorm before a quantizer. ``gain`` fp32 [hidden], None for ones; ``shift``: minus the bias, or None."""

    gain: Tensor | None
    shift: Tensor | None


@dataclass(frozen=True)
class CacheQuantizer:
    """Codes of keys or values. ``bits``: 4, 8, or 16 for none; ``scale``: fp32 [G]."""

    bits: int
    scale: Tensor


@dataclass(frozen=True)
class Layer:
    """One decoder layer. ``q_norm``, ``k_norm``: fp32 [D]; ``key_offset``: fp32 [G, D]; prefix: [G, p, D]."""

    input_norm: Norm
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    key_offset: Tensor | None
    key: CacheQuantizer
    value: CacheQuantizer
    prefix_key: Tensor
    prefix_value: Tensor
    o: Linear
    post_norm: Norm
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class DecoderWeights:
    """The whole decoder.

    ``embed`` and ``lm_head`` [vocab, hidden] and the prefix KV have the type that activations have. ``cos``, ``sin``:
    fp32 [positions, D / 2], the prefix's positions first. ``r3``: signs [D, D] and their factor in fp32, so that
    ``x @ r3 * r3_factor`` is R3, or None. ``r4_left``: as :meth:`Library.silu_mul_quantize` takes it, or None.
    """

    sizes: Sizes
    layers: list[Layer]
    embed: Tensor
    final_norm: Tensor
    lm_head: Tensor
    cos: Tensor
    sin: Tensor
    r3: Tensor | None
    r3_factor: float
    r4_left: Tensor | None
    prefix_length: int

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device


def load_weights(
    source: Source,
    kernels: Kernels,
    *,
    dtype: torch.dtype = torch.float16,
    max_length: int | None = None,
    device: str | torch.device = "cuda",
    pack: Pack | None = None,
) -> DecoderWeights:
    """Pack ``source`` for ``kernels``.

    ``dtype``: of activations. ``max_length``: longest sequence without the prefix (default: the model's limit).
    ``pack``: codes int8 [N, K], scale [N], bias [N] or None, layout -> what ``kernels.gemm`` takes.
    Raises :class:`PqExportError` that names the linear or the cache which the kernels cannot run.
    """
    check_runnable(source)
    s, p = source.sizes, source.prefix_length
    positions = len(source.cos) if max_length is None else max_length + p
    if positions > len(source.cos):
        raise PqExportError(
            f"{positions} positions are more than the model's {len(source.cos)}",
            where=source.where,
            cure="Shorten the prompt or ask for fewer tokens.",
        )

    def tensor(values: np.ndarray, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values).to(device=device, dtype=kind)

    def optional(name: str) -> Tensor | None:
        return tensor(source.floats[name]) if name in source.floats else None

    packer = pack or (lambda codes, scale, bias, layout: PackedWeights.of(codes, scale, bias, layout, device))

    def linear(layer: str, names: tuple[str, ...], site: str) -> Linear:
        linears = [f"{layer}.{name}" for name in names]
        bits = source.activation_bits(f"{layer}.{site}")
        layout = kernels.preferred_layout(max(source.weight_bits(name) for name in linears), bits)
        scales = [source.scale(name) for name in linears]
        biases = [source.bias(name) for name in linears]
        bias = None
        if any(b is not None for b in biases):
            parts = [np.zeros_like(scale) if b is None else b for b, scale in zip(biases, scales, strict=True)]
            bias = np.concatenate(parts)
        codes = np.concatenate([source.codes(name) for name in linears])
        return Linear(
            Site(float(np.float32(source.activation_scales[f"{layer}.{site}"])), bits, layout.x_type),
            packer(codes, np.concatenate(scales), bias, layout),
        )

    def norm(name: str) -> Norm:
        gain, bias = source.floats[f"{name}.weight"], source.floats.get(f"{name}.bias")
        return Norm(None if (gain == 1).all() else tensor(gain), None if bias is None else tensor(-bias))

    def cache(site: str) -> CacheQuantizer:
        bits = source.kv_bits(site)
        scales = (1.0,) if bits == 16 else source.kv_scales[site]
        return CacheQuantizer(bits, tensor(np.broadcast_to(np.array(scales, np.float32), (s.num_kv_heads,))))

    empty = np.zeros((s.num_kv_heads, 0, s.head_dim), np.float16)

    def layer(index: int) -> Layer:
        name = f"layers.{index}"
        offset = optional(f"{name}.self_attn.key_offset")
        return Layer(
            input_norm=norm(f"{name}.input_layernorm"),
            qkv=linear(name, QKV, "self_attn.qkv_input"),
            q_norm=optional(f"{name}.self_attn.q_norm.weight"),
            k_norm=optional(f"{name}.self_attn.k_norm.weight"),
            key_offset=None if offset is None else offset.reshape(s.num_kv_heads, s.head_dim),
            key=cache(f"{name}.self_attn.key"),
            value=cache(f"{name}.self_attn.value"),
            prefix_key=tensor(source.floats.get(f"{name}.prefix.key", empty), dtype),
            prefix_value=tensor(source.floats.get(f"{name}.prefix.value", empty), dtype),
            o=linear(name, O_PROJ, "self_attn.o_input"),
            post_norm=norm(f"{name}.post_attention_layernorm"),
            gate_up=linear(name, GATE_UP, "mlp.gate_up_input"),
            down=linear(name, DOWN_PROJ, "mlp.down_input"),
        )

    r3, r3_factor = hadamard_signs(s.head_dim) if "R3" in source.online else (None, 1.0)
    r4 = online_hadamard(s.intermediate_size).left if "R4" in source.online else None
    return DecoderWeights(
        sizes=s,
        layers=[layer(index) for index in range(s.num_layers)],
        embed=tensor(source.floats["embed_tokens.weight"], dtype),
        final_norm=tensor(source.floats["norm.weight"]),
        lm_head=tensor(source.floats["lm_head.weight"], dtype),
        cos=tensor(source.cos[:positions]),
        sin=tensor(source.sin[:positions]),
        r3=None if r3 is None else tensor(r3, dtype),
        r3_factor=r3_factor,
        r4_left=None if r4 is None else tensor(r4),
        prefix_length=p,
    )


def hadamard_signs(order: int) -> tuple[np.ndarray, float]:
    """R3 [order, order] as entries ±1 (and 0), exact in every floating type, and the factor in front of them."""
    matrix = hadamard_factors(order).matrix()
    factor = float(np.abs(matrix).max())
    return np.round(matrix / factor), factor


def check_runnable(source: Source) -> None:
    """Refuse by name what no kernel here runs."""
    s = source.sizes
    if s.head_dim % 2:
        raise PqExportError(f"head_dim {s.head_dim} is odd", where=source.where)
    inner = {
        QKV: s.hidden_size,
        O_PROJ: s.num_heads * s.head_dim,
        GATE_UP: s.hidden_size,
        DOWN_PROJ: s.intermediate_size,
    }
    for index in range(s.num_layers):
        for site, names in (
            ("self_attn.qkv_input", QKV),
            ("self_attn.o_input", O_PROJ),
            ("mlp.gate_up_input", GATE_UP),
            ("mlp.down_input", DOWN_PROJ),
        ):
            linear, bits = f"layers.{index}.{names[0]}", source.activation_bits(f"layers.{index}.{site}")
            if bits == 16:
                raise PqExportError(
                    "has 16-bit activations, for which there is no kernel",
                    where=f"{source.where}: {linear}",
                    cure="Use a bundle of --w4a4, --w4a8 or --w8a8, or onnxruntime.",
                )
            if inner[names] % K_STEP:
                raise PqExportError(
                    f"has {inner[names]} inputs; the kernels take multiples of {K_STEP}",
                    where=f"{source.where}: {linear}",
                    cure="Run this model in onnxruntime.",
                )
