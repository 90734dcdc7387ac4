"""The fake-quant model: exact integers, one cache for prefill and decode, prefix and padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.rewrites import rewrite
from pq_export.calibration import KV_SITES, SITES, Calibration
from pq_export.decoder import Decoder, KVPair
from pq_export.hadamard import HadamardTransform
from pq_export.quantizer import fake_quantize
from pq_export.simulate import KVQuantizer, QuantLinear, simulated_decoder, tap_codes
from tests.conftest import PLANTED_TOKEN, VOCAB

Calibrations = Callable[..., Calibration]
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))


def random_linear(
    out: int, inner: int, weight_bits: int, input_bits: int | None, bias: bool, seed: int = 0
) -> tuple[QuantLinear, np.ndarray, np.ndarray, np.ndarray | None, np.float32]:
    """A layer and its parts: codes, scale, bias and input scale."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), (out, inner)).astype(np.int8)
    scale = rng.uniform(0.01, 0.1, out).astype(np.float32)
    shift = rng.normal(size=out).astype(np.float32) if bias else None
    input_scale = np.float32(0.037)
    linear = QuantLinear(
        torch.from_numpy(codes).float(),
        torch.from_numpy(scale),
        None if shift is None else torch.from_numpy(shift),
        None if input_bits is None else float(input_scale),
        input_bits or 16,
    )
    return linear, codes, scale, shift, input_scale


def numpy_codes(x: np.ndarray, scale: np.float32, bits: int) -> np.ndarray:
    return np.clip(np.rint(x / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("weight_bits", "input_bits"), [(4, 4), (4, 8), (8, 8)])
def test_quant_linear_is_the_integer_product(weight_bits: int, input_bits: int, bias: bool) -> None:
    linear, codes, scale, shift, input_scale = random_linear(33, 70, weight_bits, input_bits, bias)
    x = np.random.default_rng(1).normal(0, 1.5, (3, 5, 70)).astype(np.float32)
    accumulator = numpy_codes(x, input_scale, input_bits) @ codes.T.astype(np.int64)
    expected = accumulator.astype(np.float32) * (input_scale * scale)
    if shift is not None:
        expected = expected + shift
    assert linear.codes.dtype == torch.float32
    assert (linear.codes_of(torch.from_numpy(x)).numpy() == numpy_codes(x, input_scale, input_bits)).all()
    assert (linear(torch.from_numpy(x)).numpy() == expected).all()


@pytest.mark.parametrize(("inner", "wide"), [(1023, False), (1025, True), (4096, True)])
def test_sums_beyond_fp32_are_exact_too(inner: int, wide: bool) -> None:
    """128 · 128 · 1024 = 2^24. All codes extreme and one odd: fp32 would round the sums."""
    codes = np.full((4, inner), -128, np.int8)
    codes[:, 0] = [1, 3, 5, -127]
    linear = QuantLinear(torch.from_numpy(codes).float(), torch.ones(4), None, 1.0, 8)
    x = np.full((2, inner), -128.0, np.float32)
    x[:, 0] = [1.0, -127.0]
    exact = x.astype(np.int64) @ codes.T.astype(np.int64)
    assert (linear.codes.dtype == torch.float64) == wide
    assert (np.abs(exact).max() > 2**24) == wide
    accumulator = torch.nn.functional.linear(linear.codes_of(torch.from_numpy(x)).to(linear.codes.dtype), linear.codes)
    assert (accumulator.numpy().astype(np.int64) == exact).all()
    assert (linear(torch.from_numpy(x)).numpy() == exact.astype(np.float32)).all()


def test_fp32_sums_really_round_where_fp64_is_used() -> None:
    """Why the bound is there: 1 + 2^24 is not a fp32 number."""
    codes = torch.full((1, 1026), -128.0)
    codes[0, 0] = 1.0
    x = codes.clone()
    exact = int((codes.long() * x.long()).sum())
    assert exact > 2**24 and exact % 2 == 1
    assert int(np.float32(exact)) != exact


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_sixteen_bit_activations_are_not_quantized(weight_bits: int, bias: bool) -> None:
    linear, codes, scale, shift, _ = random_linear(9, 20, weight_bits, None, bias)
    x = np.random.default_rng(1).normal(size=(4, 20)).astype(np.float32)
    expected = x.astype(np.float64) @ (codes * scale[:, None]).T.astype(np.float64) + (0 if shift is None else shift)
    assert np.allclose(linear(torch.from_numpy(x)).numpy(), expected, atol=1e-5)


def test_quant_linear_in_fp64_keeps_its_codes() -> None:
    """``.double()`` widens what is around the codes: the same integers, the product no longer rounded to fp32."""
    linear, codes, scale, shift, input_scale = random_linear(33, 70, 4, 8, bias=True)
    x = np.random.default_rng(1).normal(0, 1.5, (5, 70)).astype(np.float32)
    accumulator = numpy_codes(x, input_scale, 8) @ codes.T.astype(np.int64)
    assert shift is not None
    expected = accumulator * (input_scale * scale).astype(np.float64) + shift.astype(np.float64)
    result = linear.double()(torch.from_numpy(x).double())
    assert result.dtype == torch.float64 and (result.numpy() == expected).all()


@pytest.mark.parametrize(("scales", "bits"), [((0.05, 0.2), 4), ((0.01,), 8)])
def test_kv_quantizer(scales: tuple[float, ...], bits: int) -> None:
    x = torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(0))
    quantizer = KVQuantizer(scales, bits)
    for head in range(2):
        scale = torch.tensor(scales[head % len(scales)])
        assert torch.equal(quantizer(x)[:, head], fake_quantize(x[:, head], scale, bits))
        codes = numpy_codes(x[:, head].numpy(), np.float32(scale), bits)
        assert (quantizer.codes_of(x)[:, head].numpy() == codes).all()


# --- whole models ----------------------------------------------------------------------------------


def near(one: Tensor, other: Tensor) -> bool:
    """Equal but for round-off, which may move a value across a rounding boundary: one code is some 1e-3 of it all."""
    return bool((one - other).norm() <= 0.01 * other.norm())


def exact_decoder(calibration: Calibration) -> Decoder:
    """In fp64, where round-off is too small to move a code: equality of codes can be asked for."""
    return simulated_decoder(calibration).double()


def forward(decoder: Decoder, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[KVPair]]:
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return decoder(ids, mask, positions, decoder.empty_past(len(ids)))


def decode(decoder: Decoder, ids: Tensor) -> tuple[Tensor, list[KVPair]]:
    """Token by token through the cache."""
    past, logits = decoder.empty_past(len(ids)), []
    for step in range(ids.shape[1]):
        new = ids[:, step : step + 1]
        mask = torch.ones(len(ids), step + 1, dtype=torch.long)
        one, past = decoder(new, mask, torch.full_like(new, step), past)
        logits.append(one)
    return torch.cat(logits, 1), past


CASES = [("w4a4", None, {}), ("w4a8", 8, {"prefix": "none"}), ("w8a8", None, {}), ("w4a16", None, {"rotate": "none"})]


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}")
def calibration(request: pytest.FixtureRequest, calibrations: Calibrations) -> Calibration:
    name, kv, changes = request.param
    return calibrations(name, kv, **changes)


def test_prefill_is_decode(calibration: Calibration) -> None:
    decoder = exact_decoder(calibration)
    logits, cache = forward(decoder, IDS)
    step_logits, step_cache = decode(decoder, IDS)
    assert torch.allclose(step_logits, logits, atol=1e-9)
    for index, (pair, step_pair) in enumerate(zip(cache, step_cache, strict=True)):
        for site, ours, theirs in zip(KV_SITES, pair, step_pair, strict=True):
            assert ours.shape == (2, 2, 12, 16)
            if calibration.precision.kv_bits == 16:
                assert torch.allclose(ours, theirs, atol=1e-9)
                continue
            scale = torch.tensor(calibration.kv_scales[f"layers.{index}.{site}"]).view(1, -1, 1, 1)
            codes, step_codes = (ours / scale).round(), (theirs / scale).round()
            assert torch.equal(codes, step_codes)
            assert torch.allclose(codes * scale, ours, rtol=1e-6) and codes.unique().numel() > 4


def test_prefill_is_decode_in_fp32(calibration: Calibration) -> None:
    decoder = simulated_decoder(calibration)
    logits, cache = forward(decoder, IDS)
    step_logits, step_cache = decode(decoder, IDS)
    assert near(step_logits, logits)
    for pair, step_pair in zip(cache, step_cache, strict=True):
        assert near(step_pair[0], pair[0]) and near(step_pair[1], pair[1])


def test_it_is_the_quantized_checkpoint(calibration: Calibration, checkpoint_dir: Callable[[str], Path]) -> None:
    """Built a second time from the checkpoint: rewritten, weights and inputs fake-quantized by hooks."""
    c = calibration
    decoder = load_checkpoint(str(checkpoint_dir("llama"))).decoder
    rewrite(decoder, c.rotation.mode, c.rotation.seed, r3="R3" in c.rotation.online)
    for name in ("embed_tokens", "lm_head"):
        module = decoder.get_submodule(name)
        module.weight.data = module.weight.half().float()
    for name in c.linear_names():
        linear = decoder.get_submodule(name)
        scale = torch.from_numpy(c.tensors[f"{name}.scale"])[:, None]
        linear.weight.data = fake_quantize(linear.weight, scale, c.precision.weight_bits)
        if (s := c.input_scale(name)) is not None:
            linear.register_forward_pre_hook(
                lambda m, a, s=s: (fake_quantize(a[0], torch.tensor(s), c.precision.activation_bits),)
            )
    for index, layer in enumerate(decoder.layers):
        for kind in ("key", "value") if c.precision.kv_bits < 16 else ():
            scale = torch.tensor(c.kv_scales[f"layers.{index}.self_attn.{kind}"]).view(1, -1, 1, 1)
            quantizer = torch.nn.Identity()
            quantizer.register_forward_hook(lambda m, a, o, s=scale: fake_quantize(o, s, c.precision.kv_bits))
            setattr(layer.self_attn, f"{kind}_quantizer", quantizer)
    if (prefix := c.prefix_kv()) is not None:
        decoder.set_prefix([(torch.tensor(k).float()[None], torch.tensor(v).float()[None]) for k, v in prefix])
    expected, _ = forward(decoder, IDS)
    logits, _ = forward(simulated_decoder(c), IDS)
    assert near(logits, expected)
    plain = full_logits(load_checkpoint(str(checkpoint_dir("llama"))).decoder, IDS)
    assert not near(logits, plain)


def test_modules_are_in_place(calibration: Calibration) -> None:
    c, decoder = calibration, simulated_decoder(calibration)
    assert all(p.device.type == "cpu" for p in decoder.parameters())
    for layer in decoder.layers:
        assert isinstance(layer.mlp.down_rotation, HadamardTransform) == ("R4" in c.rotation.online)
        assert isinstance(layer.self_attn.k_rotation, HadamardTransform) == ("R3" in c.rotation.online)
        assert isinstance(layer.self_attn.key_quantizer, KVQuantizer) == (c.precision.kv_bits < 16)
    assert all(isinstance(decoder.get_submodule(name), QuantLinear) for name in c.linear_names())
    assert decoder.prefix_length == len(c.prefix.token_ids)


def test_taps_see_the_codes_of_every_quantizer(calibration: Calibration) -> None:
    c, decoder = calibration, simulated_decoder(calibration)
    seen: dict[str, Tensor] = {}
    steps_at: dict[str, Tensor] = {}

    def tap(site: str, codes: Tensor, steps: Tensor) -> None:
        seen[site], steps_at[site] = codes, steps

    handles = tap_codes(decoder, tap)
    _, cache = forward(decoder, IDS)
    sites = SITES if c.precision.activation_bits < 16 else ()
    sites += KV_SITES if c.precision.kv_bits < 16 else ()
    assert set(seen) == {f"layers.{i}.{site}" for i in range(2) for site in sites}
    for site, codes in seen.items():
        bits = c.precision.kv_bits if site.endswith(("key", "value")) else c.precision.activation_bits
        assert torch.equal(codes, codes.round())
        assert -(2 ** (bits - 1)) <= codes.min() < 0 < codes.max() < 2 ** (bits - 1)
        steps = steps_at[site].numpy()
        assert (codes.numpy() == np.clip(np.rint(steps), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)).all()
        assert (steps != np.rint(steps)).any()  # before rounding
    if c.precision.kv_bits < 16:
        scale = torch.tensor(c.kv_scales["layers.1.self_attn.value"]).view(1, -1, 1, 1)
        assert torch.equal(seen["layers.1.self_attn.value"] * scale, cache[1][1])
    for handle in handles:
        handle.remove()
    seen.clear()
    forward(decoder, IDS)
    assert not seen


def test_fp64_changes_little(calibration: Calibration) -> None:
    """The same model with finer arithmetic around the same integers."""
    logits, _ = forward(simulated_decoder(calibration), IDS)
    exact, _ = forward(exact_decoder(calibration), IDS)
    assert exact.dtype == torch.float64
    assert near(logits.double(), exact) and not torch.equal(logits.double(), exact)


# --- prefix and padding ----------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("rotated", [False, True])
def test_prefix_is_the_tokens_in_front(tiny_decoder: Decoder, rotated: bool, length: int) -> None:
    if rotated:
        rewrite(tiny_decoder, "online", 0)
    front = torch.tensor([[PLANTED_TOKEN, 8, 1][:length]])
    together, cache = forward(tiny_decoder, torch.cat((front.expand(2, -1), IDS), 1))
    _, prefix = forward(tiny_decoder, front)
    without, _ = forward(tiny_decoder, IDS)
    tiny_decoder.set_prefix(prefix)
    assert tiny_decoder.prefix_length == length
    logits, presents = forward(tiny_decoder, IDS)
    size = together.abs().max().item()
    assert torch.allclose(logits, together[:, length:], atol=1e-4 * size)
    assert not torch.allclose(logits, without, atol=1e-2 * size)
    for pair, expected in zip(presents, cache, strict=True):  # the cache holds the new tokens alone
        for ours, theirs in zip(pair, expected, strict=True):
            assert torch.allclose(ours, theirs[:, :, length:], atol=1e-4)
    stepwise, _ = decode(tiny_decoder, IDS)
    assert torch.allclose(stepwise, logits, atol=1e-4 * size)
    tiny_decoder.set_prefix(None)
    assert tiny_decoder.prefix_length == 0
    assert torch.equal(forward(tiny_decoder, IDS)[0], without)


def padded() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of 12, 9 and 5 tokens, padded on the left with arbitrary tokens."""
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    mask[2, :7] = 0
    return ids, mask, [ids[:1], ids[1:2, 3:], ids[2:, 7:]]


def test_left_padding_changes_nothing(calibration: Calibration) -> None:
    decoder = exact_decoder(calibration)
    ids, mask, rows = padded()
    logits, cache = forward(decoder, ids, mask)
    assert torch.isfinite(logits).all()
    for row, alone in enumerate(rows):
        expected, own = forward(decoder, alone)
        n = alone.shape[1]
        assert torch.allclose(logits[row, -n:], expected[0], atol=1e-9)
        for pair, own_pair in zip(cache, own, strict=True):
            assert torch.allclose(pair[0][row, :, -n:], own_pair[0][0], atol=1e-9)
    wrong, _ = forward(decoder, ids)  # the mask does matter
    assert not torch.allclose(wrong[2, -5:], logits[2, -5:], atol=1e-2)


def test_padded_batch_decodes_on(calibration: Calibration) -> None:
    """The mask goes on covering the pads in the cache."""
    decoder = exact_decoder(calibration)
    ids, mask, rows = padded()
    _, past = forward(decoder, ids, mask)
    new = torch.tensor([[5], [6], [7]])
    logits, _ = decoder(new, torch.cat((mask, torch.ones(3, 1, dtype=torch.long)), 1), mask.sum(1, keepdim=True), past)
    for row, alone in enumerate(rows):
        expected, _ = forward(decoder, torch.cat((alone, new[row : row + 1]), 1))
        assert torch.allclose(logits[row, 0], expected[0, -1], atol=1e-9)


def test_what_pads_hold_does_not_matter(calibration: Calibration) -> None:
    decoder = exact_decoder(calibration)
    ids, mask, _ = padded()
    other = ids.clone()
    other[mask == 0] = 300
    one, two = forward(decoder, ids, mask)[0], forward(decoder, other, mask)[0]
    assert torch.allclose(one[mask == 1], two[mask == 1], atol=1e-9) and not torch.allclose(one, two, atol=1e-2)


def test_a_row_that_is_masked_everywhere_is_finite(tiny_decoder: Decoder) -> None:
    mask = torch.ones_like(IDS)
    mask[1] = 0
    assert torch.isfinite(forward(tiny_decoder, IDS, mask)[0]).all()


def test_no_token_sees_later_ones(calibration: Calibration) -> None:
    decoder = exact_decoder(calibration)
    changed = IDS.clone()
    changed[:, 7] = (changed[:, 7] + 5) % VOCAB
    one, two = forward(decoder, IDS)[0], forward(decoder, changed)[0]
    assert torch.allclose(one[:, :7], two[:, :7], atol=1e-9)
    assert not torch.allclose(one[:, 7], two[:, 7], atol=1e-2)
    assert not torch.allclose(one[:, 8:], two[:, 8:], atol=1e-2)
