"""The decoder on a GPU: its Triton kernels, its CUDA graph, and onnxruntime's tokens."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pq_export.cuda.cache import KVCache, loaded
from pq_export.cuda.decoder import CudaDecoder
from pq_export.cuda.eager import EagerAttention
from pq_export.cuda.random_weights import Bits, random_weights
from pq_export.cuda.source import Sizes
from pq_export.cuda.weights import CacheQuantizer, DecoderWeights, Site
from pq_export.plugins.abi import Type
from pq_export.plugins.library import Library

pytestmark = pytest.mark.gpu

CAPACITY = 300
SIZES = {
    "D128": Sizes(512, 256, 512, 2, 8, 2, 128, 1e-5),
    "D64": Sizes(512, 192, 384, 2, 9, 3, 64, 1e-5),
    "D16": Sizes(512, 64, 96, 2, 4, 4, 16, 1e-5),
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def weights_of(library: Library, name: str = "D128", dtype: torch.dtype = torch.float16, kv: int = 4) -> DecoderWeights:
    return random_weights(SIZES[name], library, bits=Bits(kv=kv), positions=CAPACITY, prefix=3, dtype=dtype)


def prompt_of(weights: DecoderWeights, batch: int, length: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    return torch.randint(0, weights.sizes.vocab_size, (batch, length), device="cuda", generator=generator)


def fed(decoder: CudaDecoder, ids: Tensor, prompt: int) -> Tensor:
    """Logits behind every token from the prompt's last on: [tokens, B, vocab]."""
    rows = [decoder.prefill(ids[:, :prompt])]
    for column in range(prompt, ids.shape[1]):
        rows.append(decoder.step(ids[:, column].contiguous()))
        decoder.advance()
    return torch.stack(rows)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kv", [4, 8])
@pytest.mark.parametrize("name", SIZES)
def test_fused_attention_is_the_eager_one(library: Library, name: str, kv: int, dtype: torch.dtype) -> None:
    from pq_export.cuda.fused import FusedAttention

    weights = weights_of(library, name, dtype, kv)
    s, generator = weights.sizes, torch.Generator("cuda").manual_seed(0)
    gains = [torch.rand(s.head_dim, device="cuda", generator=generator) + 0.5 for _ in range(2)]
    offset = torch.randn(s.num_kv_heads, s.head_dim, device="cuda", generator=generator)
    rich = dataclasses.replace(weights.layers[1], q_norm=gains[0], k_norm=gains[1], key_offset=offset)
    weights = dataclasses.replace(weights, layers=[weights.layers[0], rich])
    caches = [KVCache(weights, 2, CAPACITY) for _ in range(2)]
    attentions = EagerAttention(weights, caches[0]), FusedAttention(weights, caches[1])
    width = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim
    exact = dtype is torch.float32

    def check(fused: Tensor, eager: Tensor) -> None:
        """By norm: one code that rounds to the other side changes one number by a whole step."""
        error = (fused.float() - eager.float()).norm() / eager.float().norm()
        assert error < (1e-3 if exact else 3e-2), error

    for prompt in (200, 7):
        for index in range(2):
            for cache in caches:
                cache.length.zero_()
            qkv = torch.randn(2, prompt, width, device="cuda", generator=generator).to(dtype)
            eager, fused = (attention.prefill(index, qkv) for attention in attentions)
            check(fused, eager)
            for cache in caches:
                cache.length.fill_(prompt)
            # From here on both read one cache: a code that rounds to the other side is not this test's matter.
            for parts, forms in (("keys", "key_formats"), ("values", "value_formats")):
                one, other = (getattr(cache, parts)[index] for cache in caches)
                form = getattr(caches[0], forms)[index]
                apart = (loaded(one, form) - loaded(other, form)).abs()
                assert apart.max() <= 1
                if kv == 4 or exact:
                    assert apart.mean() < (1e-4 if exact else 0.05)
                other.copy_(one)
            qkv = torch.randn(2, width, device="cuda", generator=generator).to(dtype)
            eager, fused = (attention.step(index, qkv) for attention in attentions)
            check(fused, eager)
            site = Site(0.05, 4, Type.S8)
            eager, fused = (attention.step(index, qkv, site) for attention in attentions)
            assert (eager.int() - fused.int()).abs().max() <= 1
            assert (eager != fused).float().mean() < (1e-3 if exact else 0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_graph_decodes_as_steps_do(library: Library, dtype: torch.dtype) -> None:
    from pq_export.cuda.generate import DecodeGraph

    weights = weights_of(library, dtype=dtype)
    ids = prompt_of(weights, 2, 20)
    plain, replayed = (CudaDecoder(weights, library, capacity=CAPACITY, batch=2) for _ in range(2))
    logits = plain.prefill(ids)
    assert torch.equal(replayed.prefill(ids), logits)
    graph = DecodeGraph(replayed)
    for _ in range(100):
        token = logits.argmax(-1)
        logits = plain.step(token)
        plain.advance()
        assert torch.equal(graph(token), logits)
    assert int(replayed.cache.length) == int(plain.cache.length) == 120


def test_packed_cache_is_the_bytewise_one(library: Library) -> None:
    weights = weights_of(library)
    ids = prompt_of(weights, 2, 150)
    packed, bytewise = (
        CudaDecoder(weights, library, capacity=CAPACITY, batch=2, packed=packed) for packed in (True, False)
    )
    assert torch.equal(fed(packed, ids, 100), fed(bytewise, ids, 100))
    assert 2 * packed.cache.nbytes == bytewise.cache.nbytes


def test_logits_change_with_tokens_prefix_and_scales(library: Library) -> None:
    weights = weights_of(library)
    ids = prompt_of(weights, 1, 30)
    before = fed(CudaDecoder(weights, library, capacity=CAPACITY), ids, 20)
    other = ids.clone()
    other[0, 25] = (other[0, 25] + 1) % weights.sizes.vocab_size
    assert torch.equal(fed(CudaDecoder(weights, library, capacity=CAPACITY), other, 20)[:6], before[:6])
    assert not torch.equal(fed(CudaDecoder(weights, library, capacity=CAPACITY), other, 20)[6], before[6])
    scale = CacheQuantizer(4, 2 * weights.layers[0].key.scale)
    for change in ({"prefix_key": -weights.layers[0].prefix_key}, {"key": scale}):
        layers = [dataclasses.replace(weights.layers[0], **change), *weights.layers[1:]]
        changed = dataclasses.replace(weights, layers=layers)
        assert not torch.equal(fed(CudaDecoder(changed, library, capacity=CAPACITY), ids, 20), before)


PROMPTS = ([5, 90, 77, 31, 200, 8, 8, 150, 42], [17], [250, 3, 3, 61], list(range(100, 120)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_tokens_are_onnxruntimes(
    library: Library, small_plan: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """A calibrated tiny model, built for onnxruntime: the same greedy tokens in float32, eager and fused."""
    pytest.importorskip("onnxruntime")
    from pq_export.build import build
    from pq_export.calib.checkpoint import load_checkpoint
    from pq_export.calib.pipeline import calibrate
    from pq_export.cuda.generate import generate_on_cuda, tokens_of
    from pq_export.cuda.readers import bundle_source
    from pq_export.cuda.weights import load_weights
    from pq_export.runtime import OrtDecoder, generate
    from pq_export.stages import Stages
    from pq_export.targets import find_target
    from tests.conftest import byte_tokenizer, hf_model, word_tokenizer

    model = hf_model(family, hidden_size=64, intermediate_size=96, **({"head_dim": 24} if family == "qwen3" else {}))
    model.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer() if family == "qwen2" else word_tokenizer(bos=family != "qwen3")
    tokenizer.save_pretrained(tmp_path / "model")
    plan = small_plan("w4a4", prefix="w77 w8 w9")
    calibration = calibrate(load_checkpoint(str(tmp_path / "model")), plan, tmp_path / "calibration", Stages())
    bundle = build(calibration, tmp_path / "calibration", find_target("ort"), tmp_path / "bundle", Stages())
    theirs = OrtDecoder(bundle.model_path)
    weights = load_weights(bundle_source(bundle), library, dtype=torch.float32)
    attentions = ["eager", "fused"] if importlib.util.find_spec("triton") else ["eager"]
    ours = [CudaDecoder(weights, library, capacity=64, attention=attention) for attention in attentions]
    for prompt in PROMPTS:
        expected = list(generate(theirs, prompt, 32, set()))
        for decoder in ours:
            assert list(tokens_of(decoder, prompt, 32, set())) == expected
    monkeypatch.setattr(Library, "of_device", lambda: library)
    assert list(generate_on_cuda(bundle, PROMPTS[0], 8, set(), dtype=torch.float32)) == list(
        generate(theirs, PROMPTS[0], 8, set())
    )
