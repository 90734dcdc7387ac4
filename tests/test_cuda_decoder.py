"""The CUDA decoder without a GPU: its forward over a stand-in for the kernels, its Triton kernels interpreted."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from pq_export.build import build
from pq_export.bundle import Bundle
from pq_export.calib.checkpoint import load_checkpoint
from pq_export.calib.pipeline import calibrate
from pq_export.calibration import Calibration
from pq_export.cuda import bench
from pq_export.cuda.bench_tables import print_tables
from pq_export.cuda.cache import Format, KVCache, loaded, stored
from pq_export.cuda.decoder import CudaDecoder
from pq_export.cuda.dynamic import DynamicDecoder
from pq_export.cuda.eager import EagerAttention
from pq_export.cuda.float_decoder import FloatDecoder, FloatWeights
from pq_export.cuda.generate import tokens_of
from pq_export.cuda.random_weights import SPREAD, random_weights, without_input_scales
from pq_export.cuda.readers import bundle_source, calibration_source
from pq_export.cuda.source import Sizes, Source
from pq_export.cuda.weights import DecoderWeights, Site, load_weights
from pq_export.errors import IntegrityError, PqExportError
from pq_export.hadamard import hadamard_factors
from pq_export.plan import Plan
from pq_export.plugins import reference
from pq_export.plugins.abi import Layout, Type
from pq_export.plugins.layouts import unpack, unpack_rows
from pq_export.plugins.reference import NUMPY_TYPES
from pq_export.runtime import OrtDecoder, generate
from pq_export.simulate import simulated_decoder
from pq_export.stages import Stages
from pq_export.targets import find_target
from tests.conftest import byte_tokenizer, hf_model, word_tokenizer

PROMPT = [5, 90, 77, 31, 200, 8, 8, 150, 42]
SIZES = {"hidden_size": 64, "intermediate_size": 96}  # of tiny models: multiples of 32


@dataclass(frozen=True)
class Codes:
    """A PackedWeights on the CPU, not packed."""

    codes: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None
    layout: Layout


class FakeLibrary:
    """``pq_export.plugins.library.Library`` on the CPU: the same calls over the NumPy reference."""

    def __init__(self, packed_x: bool = False):
        self.packed_x = packed_x  # as GPUs whose tensor cores multiply int4

    def preferred_layout(self, weight_bits: int, activation_bits: int) -> Layout:
        if weight_bits == 8:
            return Layout.W8
        return Layout.S4 if self.packed_x and activation_bits == 4 else Layout.S8

    def gemm(self, x: Tensor, weights: Codes, y_type: Type, **options: Any) -> Tensor:
        codes = x.numpy()
        if weights.layout is Layout.S4:
            codes = unpack_rows(codes, weights.codes.shape[1])
        arrays = {name: None if value is None else value.numpy() for name, value in options.items()}
        return torch.from_numpy(
            reference.gemm(codes, weights.codes, weights.scale, y_type, bias=weights.bias, **arrays)
        )

    def quantize(self, x: Tensor, scale: float, bits: int, codes_type: Type) -> Tensor:
        return torch.from_numpy(reference.quantize(x.numpy(), scale, bits, codes_type))

    def rmsnorm_quantize(
        self, x: Tensor, scale: float, bits: int, codes_type: Type, *, eps: float, gain: Any, shift: Any
    ) -> tuple[Tensor, Tensor]:
        normed, total = reference.rmsnorm(x.numpy(), float(np.float32(eps)), gain=_numpy(gain))
        codes = reference.quantize(normed, scale, bits, codes_type, shift=_numpy(shift))
        return torch.from_numpy(codes), torch.from_numpy(total)

    def silu_mul_quantize(
        self, gate: Tensor, up: Tensor, scale: float, bits: int, codes_type: Type, *, left: Any
    ) -> Tensor:
        product = reference.silu_mul(gate.numpy(), up.numpy(), _numpy(left))
        return torch.from_numpy(reference.quantize(product, scale, bits, codes_type))

    def quantize_dynamic(self, x: Tensor, bits: int, codes_type: Type) -> tuple[Tensor, Tensor]:
        codes, scale = reference.quantize_dynamic(x.numpy(), bits, codes_type)
        return torch.from_numpy(codes), torch.from_numpy(scale)


def _numpy(x: Tensor | None) -> np.ndarray | None:
    return None if x is None else x.numpy()


def cpu_weights(source: Source, library: FakeLibrary | None = None, **options: Any) -> DecoderWeights:
    options = {"dtype": torch.float32, "device": "cpu", "pack": Codes, **options}
    return load_weights(source, library or FakeLibrary(), **options)


def cpu_decoder(source: Source, **options: Any) -> CudaDecoder:
    return CudaDecoder(cpu_weights(source), FakeLibrary(), capacity=64, **options)


@pytest.fixture(scope="module")
def models(
    small_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Calibration, Path]]:
    """``models("llama", "w4a4")`` -> calibration of a tiny model whose sizes the kernels take, and its directory."""
    made: dict[object, tuple[Calibration, Path]] = {}

    def make(family: str, name: str = "w4a4", kv: int | None = None, **changes: Any) -> tuple[Calibration, Path]:
        key = (family, name, kv, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("cuda")
            sizes = {**SIZES, **changes.pop("sizes", {})}
            hf_model(family, **sizes).save_pretrained(folder / "model")
            tokenizer = byte_tokenizer() if family == "qwen2" else word_tokenizer(bos=family != "qwen3")
            tokenizer.save_pretrained(folder / "model")
            plan = small_plan(name, kv, **{"prefix": "w77 w8 w9", **changes})
            checkpoint = load_checkpoint(str(folder / "model"))
            made[key] = calibrate(checkpoint, plan, folder / "calibration", Stages()), folder
        return made[key]

    return make


@pytest.fixture(scope="module")
def bundles(models: Callable[..., tuple[Calibration, Path]]) -> Callable[..., Bundle]:
    """``bundles("llama")`` -> W4A4 bundle of that tiny model, made once; do not change it."""
    made: dict[object, Bundle] = {}

    def make(family: str, form: str = "integer") -> Bundle:
        if (family, form) not in made:
            made[family, form] = new(family, form)
        return made[family, form]

    def new(family: str, form: str) -> Bundle:
        calibration, folder = models(family)
        output = folder / f"bundle-{form}"
        return build(calibration, folder / "calibration", find_target("ort"), output, Stages(), form=form)

    return make


def simulated_logits(calibration: Calibration, ids: list[int]) -> Tensor:
    """Logits [S, vocab] of the fake-quant model."""
    decoder, batch = simulated_decoder(calibration), torch.tensor([ids])
    positions, mask = torch.arange(len(ids))[None], torch.ones_like(batch)
    return decoder(batch, mask, positions, decoder.empty_past(1))[0][0]


def fed(decoder: CudaDecoder, ids: list[int], prompt: int) -> Tensor:
    """Logits behind the tokens from ``prompt`` on: prefill, then token by token. [len(ids) - prompt + 1, vocab]"""
    rows = [decoder.prefill(torch.tensor([ids[:prompt]]))]
    for token in ids[prompt:]:
        rows.append(decoder.step(torch.tensor([token])))
        decoder.advance()
    return torch.cat(rows)


CASES = [
    ("llama", "w4a4", None, {}),
    ("llama-bias", "w4a4", None, {}),
    ("qwen2", "w4a4", None, {"prefix": "none"}),
    ("qwen3", "w8a8", None, {}),
    ("llama", "w4a8", None, {}),
    ("llama", "w4a4", 16, {}),
]


@pytest.mark.parametrize(("family", "name", "kv", "changes"), CASES)
def test_logits_are_the_fake_quant_models(
    models: Callable[..., tuple[Calibration, Path]], family: str, name: str, kv: int | None, changes: dict[str, Any]
) -> None:
    calibration, _ = models(family, name, kv, **changes)
    ids = [*PROMPT, 17, 300, 4, 91]
    expected = simulated_logits(calibration, ids)[len(PROMPT) - 1 :]
    result = fed(cpu_decoder(calibration_source(calibration)), ids, len(PROMPT))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert (result.argmax(-1) == expected.argmax(-1)).all()


def test_centered_model(models: Callable[..., tuple[Calibration, Path]]) -> None:
    """Norm biases and key offsets: made here by hand, whatever recipe makes them."""
    calibration, _ = models("llama")
    rng = np.random.default_rng(0)
    offsets = {
        **{
            f"layers.{i}.{norm}.bias": rng.normal(0, 0.3, 64).astype(np.float32)
            for i in range(2)
            for norm in ("input_layernorm", "post_attention_layernorm")
        },
        **{f"layers.{i}.self_attn.key_offset": rng.normal(0, 0.5, (2, 1, 16)).astype(np.float32) for i in range(2)},
    }
    decoder = dataclasses.replace(calibration.decoder, norm_bias=True, key_offset=True)
    centered = dataclasses.replace(calibration, decoder=decoder, tensors={**calibration.tensors, **offsets})
    expected = simulated_logits(centered, [*PROMPT, 17])[len(PROMPT) - 1 :]
    plain = simulated_logits(calibration, [*PROMPT, 17])[len(PROMPT) - 1 :]
    result = fed(cpu_decoder(calibration_source(centered)), [*PROMPT, 17], len(PROMPT))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert (plain - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_tokens_are_onnxruntimes(bundles: Callable[..., Bundle], family: str) -> None:
    bundle = bundles(family)
    theirs, ours = OrtDecoder(bundle.model_path), cpu_decoder(bundle_source(bundle))
    seen = set()
    for prompt in (PROMPT, PROMPT[::-1], [17], [250, 3, 3, 61], list(range(100, 120))):
        expected = list(generate(theirs, prompt, 32, set()))
        assert list(tokens_of(ours, prompt, 32, set())) == expected
        seen |= set(expected)
    assert len(seen) > 4  # a model that says one thing would prove nothing


@pytest.mark.parametrize(("family", "form"), [("qwen2", "integer"), ("llama", "qdq")])
def test_bundle_and_calibration_are_one_source(
    bundles: Callable[..., Bundle], models: Callable[..., tuple[Calibration, Path]], family: str, form: str
) -> None:
    calibration, _ = models(family)
    ours, theirs = bundle_source(bundles(family, form)), calibration_source(calibration)
    assert ours.sizes == theirs.sizes
    for linear in calibration.linear_names():
        for part in ("codes", "scale", "bias"):
            np.testing.assert_array_equal(getattr(ours, part)(linear), getattr(theirs, part)(linear))
    assert set(ours.floats) == set(theirs.floats)
    for name, values in theirs.floats.items():
        np.testing.assert_array_equal(ours.floats[name], values)
    for site, scale in theirs.activation_scales.items():
        assert np.float32(ours.activation_scales[site]) == np.float32(scale)
    for site, scales in theirs.kv_scales.items():
        np.testing.assert_array_equal(np.float32(ours.kv_scales[site]), np.float32(scales))
    np.testing.assert_array_equal(ours.cos, theirs.cos)


def test_packed_cache_holds_the_same(models: Callable[..., tuple[Calibration, Path]]) -> None:
    source = calibration_source(models("llama")[0])
    packed, bytewise = cpu_decoder(source), cpu_decoder(source, packed=False)
    assert torch.equal(fed(packed, PROMPT, 4), fed(bytewise, PROMPT, 4))
    assert 2 * packed.cache.nbytes == bytewise.cache.nbytes


def test_packed_activations(models: Callable[..., tuple[Calibration, Path]]) -> None:
    """Kernels that read two activation codes a byte get them, from attention too."""
    source, library = calibration_source(models("llama")[0]), FakeLibrary(packed_x=True)
    decoder = CudaDecoder(cpu_weights(source, library), library, capacity=64)
    assert decoder.weights.layers[0].o.site.codes_type is Type.S4
    assert torch.equal(fed(decoder, PROMPT, 4), fed(cpu_decoder(source), PROMPT, 4))


def test_batch_is_its_sequences(models: Callable[..., tuple[Calibration, Path]]) -> None:
    source = calibration_source(models("llama")[0])
    prompts = torch.tensor([PROMPT, PROMPT[::-1]])
    decoder = cpu_decoder(source, batch=2)
    both = torch.stack((decoder.prefill(prompts), decoder.step(torch.tensor([7, 8]))))
    for row, token in enumerate((7, 8)):
        alone = fed(cpu_decoder(source), [*prompts[row].tolist(), token], len(PROMPT))
        torch.testing.assert_close(both[:, row], alone, rtol=1e-4, atol=1e-4)


def test_mixed_weight_bits_take_the_wider_layout(models: Callable[..., tuple[Calibration, Path]]) -> None:
    calibration, _ = models("llama")
    name = "layers.0.self_attn.k_proj"
    wide = dataclasses.replace(
        calibration,
        overrides={name: 8},
        tensors={**calibration.tensors, f"{name}.codes": calibration.weight_codes(name)},
    )
    decoder = cpu_decoder(calibration_source(wide))
    assert [layer.qkv.weights.layout for layer in decoder.weights.layers] == [Layout.W8, Layout.S8]
    assert torch.equal(fed(decoder, PROMPT, 4), fed(cpu_decoder(calibration_source(calibration)), PROMPT, 4))


@pytest.mark.parametrize("form", list(Format))
def test_stored_codes_come_back(form: Format) -> None:
    codes = torch.arange(-8, 8).float().repeat(3, 1)
    assert torch.equal(loaded(stored(codes, form), form), codes)


def test_stops_and_keeps_within_the_context(models: Callable[..., tuple[Calibration, Path]]) -> None:
    decoder = cpu_decoder(calibration_source(models("llama")[0]))
    tokens = list(tokens_of(decoder, PROMPT, 8, set()))
    assert list(tokens_of(decoder, PROMPT, 8, {tokens[3]})) == tokens[: tokens.index(tokens[3])]
    assert list(tokens_of(decoder, PROMPT, 0, set())) == []
    with pytest.raises(PqExportError, match="the cache holds 1 of 64"):
        decoder.prefill(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(PqExportError, match="the cache holds 64"):
        list(tokens_of(decoder, PROMPT, 64, set()))


def test_refused_by_name(models: Callable[..., tuple[Calibration, Path]]) -> None:
    with pytest.raises(PqExportError, match=r"q_proj: has 16-bit activations.*onnxruntime"):
        cpu_weights(calibration_source(models("llama", "w4a16")[0]))
    with pytest.raises(PqExportError, match="down_proj: has 48 inputs; the kernels take multiples of 32"):
        cpu_weights(calibration_source(models("llama", "w4a4", sizes={"intermediate_size": 48})[0]))
    source = calibration_source(models("llama")[0])
    with pytest.raises(PqExportError, match="600 positions are more than the model's 512"):
        cpu_weights(source, max_length=597)
    with pytest.raises(PqExportError, match="larger max_length"):
        CudaDecoder(cpu_weights(source, max_length=16), FakeLibrary(), capacity=17)


def test_bundle_of_another_kind_is_refused(bundles: Callable[..., Bundle], tmp_path: Path) -> None:
    shutil.copytree(bundles("llama").directory, tmp_path / "bundle")
    bundle = dataclasses.replace(bundles("llama"), directory=tmp_path / "bundle")
    model = onnx.load(bundle.model_path)
    for tensor in model.graph.initializer:
        if tensor.name == "layers.0.self_attn.q_proj.codes":
            tensor.name = "weights"
    onnx.save(model, bundle.model_path)
    with pytest.raises(IntegrityError, match=r"holds no integer weights .*--target ort"):
        bundle_source(bundle)


# ---- Triton kernels, interpreted on the CPU (TRITON_INTERPRET=1), against the eager definition -----------------


@pytest.fixture(scope="module")
def fused_attention() -> Callable[[DecoderWeights, KVCache], Any]:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 (without it tests/gpu runs the kernels)")
    from pq_export.cuda.fused import FusedAttention

    return FusedAttention


FUSED_CASES = [
    ("llama", "w4a4", None, {}),
    ("llama", "w4a4", None, {"sizes": {"head_dim": 64}}),
    ("qwen2", "w4a4", None, {"prefix": "none"}),
    ("qwen3", "w8a8", None, {}),
    ("llama", "w4a4", 16, {}),
    ("llama", "w4a4", 8, {"rotate": "offline"}),
]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("family", "name", "kv", "changes"), FUSED_CASES)
def test_fused_is_eager(
    models: Callable[..., tuple[Calibration, Path]],
    fused_attention: Any,
    family: str,
    name: str,
    kv: int | None,
    changes: dict[str, Any],
    batch: int,
) -> None:
    weights = cpu_weights(calibration_source(models(family, name, kv, **changes)[0]))
    s, generator = weights.sizes, torch.Generator().manual_seed(0)
    caches = [KVCache(weights, batch, 160) for _ in range(2)]
    eager, fused = EagerAttention(weights, caches[0]), fused_attention(weights, caches[1])
    fused._splits = 4  # the interpreter counts no SMs
    shape = (batch, s.num_heads, 4)
    fused._tops, fused._totals, fused._sums = torch.empty(shape), torch.empty(shape), torch.empty(*shape, s.head_dim)
    width = (s.num_heads + 2 * s.num_kv_heads) * s.head_dim

    def check(results: list[Tensor]) -> None:
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
        for one, other in zip((*caches[0].keys, *caches[0].values), (*caches[1].keys, *caches[1].values), strict=True):
            if one.dtype.is_floating_point:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(one, other)

    for prompt in (130, 5):
        for cache in caches:
            cache.length.zero_()
        qkv = torch.randn(batch, prompt, width, generator=generator)
        check([attention.prefill(1, qkv) for attention in (eager, fused)])
        for cache in caches:
            cache.length.fill_(prompt)
        for _ in range(2):
            qkv = torch.randn(batch, width, generator=generator)
            check([attention.step(1, qkv) for attention in (eager, fused)])
            site = Site(0.05, 4, Type.S8)
            codes = [attention.step(1, qkv, site) for attention in (eager, fused)]
            assert codes[1].dtype == torch.int8
            assert (codes[0] != codes[1]).float().mean() < 0.01
            for cache in caches:
                cache.length.add_(1)


def test_fused_offset_and_signs(models: Callable[..., tuple[Calibration, Path]], fused_attention: Any) -> None:
    """A key offset, and R3 of a head size without a power of two."""
    weights = cpu_weights(calibration_source(models("qwen3", sizes={"head_dim": 24})[0]))
    assert weights.r3 is not None
    torch.testing.assert_close(
        weights.r3.double() * weights.r3_factor, torch.from_numpy(hadamard_factors(24).matrix()), rtol=1e-6, atol=1e-6
    )
    offset = torch.linspace(-1, 1, 2 * 24).view(2, 24)
    layers = [dataclasses.replace(layer, key_offset=offset) for layer in weights.layers]
    moved = dataclasses.replace(weights, layers=layers)
    qkv = torch.randn(1, 9, 8 * 24, generator=torch.Generator().manual_seed(1))
    results, caches = [], [KVCache(moved, 1, 16) for _ in range(2)]
    for attention in (EagerAttention(moved, caches[0]), fused_attention(moved, caches[1])):
        results.append(attention.prefill(0, qkv))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert torch.equal(caches[0].keys[0], caches[1].keys[0])
    plain = KVCache(weights, 1, 16)
    EagerAttention(weights, plain).prefill(0, qkv)
    assert not torch.equal(plain.keys[0], caches[0].keys[0])


def test_numpy_types_of_the_stand_in() -> None:
    """The stand-in returns what the library does."""
    library = FakeLibrary()
    weights = Codes(np.ones((4, 32), np.int8), np.ones(4, np.float32), None, Layout.S8)
    y = library.gemm(torch.ones(2, 32, dtype=torch.int8), weights, Type.F16, residual=None, row_scale=None)
    assert y.numpy().dtype == NUMPY_TYPES[Type.F16]
    assert y.tolist() == [[32.0] * 4] * 2


# ---- What the benchmark runs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomPacked:
    """A PackedWeights of random bytes, unpacked for the stand-in."""

    data: Tensor
    scale: Tensor
    bias: None
    layout: Layout
    N: int
    K: int


class UnpackingLibrary(FakeLibrary):
    def gemm(self, x: Tensor, weights: RandomPacked, y_type: Type, **options: Any) -> Tensor:
        w = weights
        codes = Codes(unpack(w.data.numpy(), w.layout, w.N, w.K), w.scale.numpy(), None, w.layout)
        return super().gemm(x, codes, y_type, **options)


SMALL = Sizes(320, 128, 384, 3, 8, 2, 32, 1e-5)


@pytest.fixture
def random_small(monkeypatch: pytest.MonkeyPatch) -> DecoderWeights:
    monkeypatch.setattr("pq_export.cuda.random_weights.PackedWeights", RandomPacked)
    return random_weights(SMALL, UnpackingLibrary(), positions=160, device="cpu", dtype=torch.float32)


def test_random_weights_keep_the_size_of_activations(random_small: DecoderWeights) -> None:
    """Codes that were all zeros or all clamped would make the GPU faster than it is."""
    seen: dict[str, list[float]] = {}

    class Watching(UnpackingLibrary):
        def gemm(self, x: Tensor, weights: RandomPacked, y_type: Type, **options: Any) -> Tensor:
            seen.setdefault(f"{weights.K}x{weights.N}", []).append(x.float().std().item())
            return super().gemm(x, weights, y_type, **options)

    decoder = CudaDecoder(random_small, Watching(), capacity=160)
    logits = decoder.prefill(torch.randint(0, 320, (1, 128)))
    assert 0.3 < logits.std() < 3
    assert len(seen) == 4
    for deviations in seen.values():
        assert all(1.5 < deviation < 6.0 for deviation in deviations), seen
    w = random_small.layers[0].gate_up.weights
    codes = unpack(w.data.numpy(), w.layout, w.N, w.K).astype(int)
    assert (codes.min(), codes.max()) == (-8, 7) and abs(codes.mean()) < 0.1 and abs(codes.std() - 8 / SPREAD) < 0.1


def test_dynamic_scales_say_the_same(random_small: DecoderWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ids = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(0))
    static = CudaDecoder(random_small, UnpackingLibrary(), capacity=80, batch=2)
    dynamic = DynamicDecoder(without_input_scales(random_small), UnpackingLibrary(), capacity=80, batch=2)
    ours, theirs = ([decoder.prefill(ids), decoder.step(ids[:, 0])] for decoder in (static, dynamic))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.corrcoef(torch.stack((one.flatten(), other.flatten())))[0, 1] > 0.8


def test_float_decoder_steps_as_it_prefills() -> None:
    weights = FloatWeights.random(SMALL, 64, torch.float32, "cpu")
    ids = torch.randint(0, 320, (2, 10), generator=torch.Generator().manual_seed(0))
    whole = FloatDecoder(weights, capacity=16, batch=2).prefill(ids)
    stepped = FloatDecoder(weights, capacity=16, batch=2, context=9)
    stepped.prefill(ids[:, :9])
    torch.testing.assert_close(stepped.step(ids[:, 9]), whole, rtol=1e-4, atol=1e-4)
    assert whole.std() > 0.3


def test_benchmark_refuses_bad_flags() -> None:
    for flags, message in (
        (["--shape", "gpt"], "unknown shape 'gpt'"),
        (["--prefill", "1,x"], "--prefill: '1,x' is no list"),
        (["--batch", "0"], "--batch: '0' is no list"),
    ):
        result = CliRunner().invoke(bench.main, flags)
        assert result.exit_code == 1
        assert message in result.output


def test_tables_hold_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    work = {"workload": "decode at 2048, batch 1"}
    document = {
        "device": "GPU",
        "torch": "2",
        "shape": "llama-3-8b",
        "layers": 8,
        "model_layers": 32,
        "seconds": 1.0,
        "times": [
            {
                **work,
                "ms": {"fp16 graph": 5.0, "w4a4 static": 2.0},
                "ratios": {"fp16 graph": 1.0, "w4a4 static": 2.5},
                "tokens_per_second": {"fp16 graph": 200.0, "w4a4 static": 500.0},
                "static_over_dynamic": None,
                "sdpa": {"fp16 graph": "flash"},
                "failed": {"w4a4 dynamic": "out of memory"},
            }
        ],
        "memory": [{**work, "fp16": 2**34, "w4a4": 2**32, "fp16_variant": "fp16 eager", "ratio": 0.25}],
        "kernels": [{**work, "kernels": [{"kernel": "gemm", "calls": 2, "us": 10.0}]}],
    }
    print_tables(document)
    output = capsys.readouterr().out
    for text in ("8 of 32 layers", "2.000 (2.50)", "0.250", "16.00", "w4a4 dynamic did not run: out of memory", "5.0"):
        assert text in output
