"""What lies between the qkv product and o_proj, in PyTorch: the definition that the Triton kernels are held to.

Shapes: ``B`` batch, ``S`` new tokens, ``p`` prefix tokens, ``H`` query heads, ``G`` KV heads, ``D`` head_dim. The
prefix stands in front of every sequence and is seen by every token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pq_export.cuda.cache import Format, KVCache, loaded, stored
from pq_export.cuda.weights import CacheQuantizer, DecoderWeights, Layer, Site
from pq_export.plugins.abi import Type
from pq_export.quantizer import quantize


class EagerAttention:
    """Attention over ``cache`` for ``weights``, on any device."""

    def __init__(self, weights: DecoderWeights, cache: KVCache):
        self.weights, self.cache = weights, cache

    def prefill(self, index: int, qkv: Tensor) -> Tensor:
        """The first S tokens: qkv [B, S, (H + 2 G) D] of layer ``index`` -> [B, S, H D]; fills the cache."""
        layer, dtype, p = self.weights.layers[index], self.weights.dtype, self.weights.prefix_length
        q, k, v = self._projected(layer, qkv)
        k, v = self._store(index, k, v)
        q = F.pad(q, (0, 0, p, 0))  # a row of zeros for each prefix token: the mask is square then
        prefix_key, prefix_value = (t.expand(len(q), -1, -1, -1) for t in (layer.prefix_key, layer.prefix_value))
        k, v = torch.cat((prefix_key, k.to(dtype)), 2), torch.cat((prefix_value, v.to(dtype)), 2)
        return causal_attention(q.to(dtype), k, v, p)

    def step(self, index: int, qkv: Tensor, site: Site | None = None) -> Tensor:
        """One token: qkv [B, (H + 2 G) D] -> [B, H D], or its int8 codes where ``site`` says how to make them.

        ``cache.length`` stays as it is: it belongs to all layers.
        """
        weights, cache = self.weights, self.cache
        layer, c = weights.layers[index], weights.sizes
        q, k, v = self._projected(layer, qkv[:, None])
        self._store(index, k, v)
        keys = _values(loaded(cache.keys[index], cache.key_formats[index]), layer.key)
        values = _values(loaded(cache.values[index], cache.value_formats[index]), layer.value)
        batch, p = len(qkv), weights.prefix_length
        keys = torch.cat((layer.prefix_key.float().expand(batch, -1, -1, -1), keys), 2)
        values = torch.cat((layer.prefix_value.float().expand(batch, -1, -1, -1), values), 2)
        seen = torch.arange(keys.shape[2], device=qkv.device) <= cache.length + p
        stacked = q.reshape(batch, c.num_kv_heads, -1, c.head_dim) * c.head_dim**-0.5
        scores = (stacked @ keys.transpose(2, 3)).masked_fill(~seen, float("-inf"))
        result = (scores.softmax(-1) @ values).reshape(batch, -1)
        return result.to(weights.dtype) if site is None else codes_of(result, site)

    def _projected(self, layer: Layer, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 q [B, H, S, D], k and v [B, G, S, D], rotated, not quantized."""
        w, c = self.weights, self.weights.sizes
        heads = qkv.float().view(*qkv.shape[:2], -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = (_rms_norm(x, gain, c.rms_norm_eps) for x, gain in ((q, layer.q_norm), (k, layer.k_norm)))
        positions = self.cache.length + w.prefix_length + torch.arange(qkv.shape[1], device=qkv.device)
        q, k = (_rotary(x, w.cos[positions], w.sin[positions]) for x in (q, k))
        if w.r3 is not None:
            q, k = (x @ w.r3.float() * w.r3_factor for x in (q, k))
        if layer.key_offset is not None:
            k = k + layer.key_offset[:, None]
        return q, k, v

    def _store(self, index: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put new keys and values into the cache; returns them as the cache holds them."""
        cache, layer = self.cache, self.weights.layers[index]
        positions = cache.length + torch.arange(k.shape[2], device=k.device)
        results = []
        for new, quantizer, buffer, form in (
            (k, layer.key, cache.keys[index], cache.key_formats[index]),
            (v, layer.value, cache.values[index], cache.value_formats[index]),
        ):
            codes = new.to(buffer.dtype) if form is Format.FLOAT else quantize(new, _column(quantizer), quantizer.bits)
            buffer.index_copy_(2, positions.long(), stored(codes, form))
            results.append(_values(codes.float(), quantizer))
        return results[0], results[1]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, prefix: int) -> Tensor:
    """q [B, H, p + S, D], k and v [B, G, p + S, D] -> [B, S, H D]: rows behind the prefix."""
    grouped = q.shape[1] != k.shape[1]
    result = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return result.transpose(1, 2)[:, prefix:].flatten(2)


def codes_of(x: Tensor, site: Site) -> Tensor:
    """int8 codes of x, one to a byte."""
    assert site.codes_type is Type.S8
    scale = torch.full((), site.scale, dtype=torch.float32, device=x.device)  # no copy from the host: graphs forbid it
    return quantize(x.float(), scale, site.bits).to(torch.int8)


def _column(quantizer: CacheQuantizer) -> Tensor:
    return quantizer.scale[:, None, None]


def _values(codes: Tensor, quantizer: CacheQuantizer) -> Tensor:
    return codes * _column(quantizer)  # scale 1 where nothing is quantized


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
