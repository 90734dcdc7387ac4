"""Trainable quantizers: exact until they are trained, and their gradients are those of their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pq_export.calib.fake_quant import (
    CELL_MARGIN,
    StaticQuantizer,
    SteppedLinear,
    quantizers,
    round_ste,
    set_kv_quantizer,
    set_site_quantizer,
    site_quantizer,
)
from pq_export.calibration import KV_SITES, SITES
from pq_export.decoder import Decoder
from pq_export.quantizer import code_range, fake_quantize, quantize


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


# --- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_untrained_quantizer_is_fake_quantize(bits: int, trainable: bool, shape: tuple[int, ...]) -> None:
    """Bit for bit, with and without a graph; values at rounding ties and far outside the range included."""
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.01
    x = torch.cat(
        (random(2, 3, 50, 8, size=2.0), scale * (torch.arange(-30, 30).view(60, 1) + 0.5).expand(2, 3, 60, 8)), 2
    )
    quantizer = StaticQuantizer(scale, bits)
    quantizer.shift.requires_grad_(trainable)
    expected = fake_quantize(x, scale, bits)
    assert torch.equal(quantizer(x).detach(), expected) and torch.equal(quantizer.scale, scale)
    assert torch.equal(quantizer(x.clone().requires_grad_()).detach(), expected)
    assert expected.unique().numel() > 15


def test_a_quantizer_gives_back_the_dtype_of_its_input() -> None:
    quantizer = StaticQuantizer(torch.tensor(0.1, dtype=torch.float64), 4)
    assert quantizer.start.dtype == torch.float32
    assert quantizer(random(5).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_untrained_linear_is_that_of_its_codes(bits: int, with_bias: bool) -> None:
    """Also where the codes are not the nearest ones: GPTQ's are not."""
    weight, bias = random(12, 16), random(12, seed=1) if with_bias else None
    low, high = code_range(bits)
    scale = weight.abs().amax(1) / high * 0.8  # some weights lie outside the range
    moved = torch.randint(-2, 3, weight.shape, generator=torch.Generator().manual_seed(2))
    codes = (quantize(weight, scale[:, None], bits) + moved).clamp(low, high)
    linear, x = SteppedLinear(weight, codes.to(torch.int8), scale, bias, bits), random(7, 16, seed=3)
    for requires_grad in (False, True):
        linear.steps.requires_grad_(requires_grad)
        assert torch.equal(linear.codes().detach(), codes)
        assert torch.equal(linear.weight.detach(), codes * scale[:, None])
        expected = torch.nn.functional.linear(x, codes * scale[:, None], bias)
        assert torch.equal(linear(x).detach(), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_masters_start_inside_the_cells_of_their_codes(bits: int) -> None:
    weight = random(12, 16)
    low, high = code_range(bits)
    scale = weight.abs().amax(1) / high * 0.8
    moved = torch.randint(-2, 3, weight.shape, generator=torch.Generator().manual_seed(2))
    codes = (quantize(weight, scale[:, None], bits) + moved).clamp(low, high)
    steps = SteppedLinear(weight, codes, scale, None, bits).steps.detach()
    edge = 0.5 - CELL_MARGIN
    assert ((steps - codes).abs() <= edge + 1e-5).all()
    original = weight / scale[:, None]
    inside = (original - codes).abs() <= edge
    assert torch.equal(steps[inside], original[inside]) and 0.1 < inside.float().mean() < 0.9
    outside = (steps - codes)[~inside]
    assert torch.allclose(outside, (original - codes)[~inside].sign() * edge, atol=1e-5)  # as near as they may be


# --- gradients -------------------------------------------------------------------------------------


def test_rounding_lets_the_gradient_through() -> None:
    x = torch.tensor([-1.5, -0.2, 0.5, 2.4], requires_grad=True)
    y = round_ste(x)
    assert torch.equal(y.detach(), torch.round(x.detach()))
    (y * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_of_the_input_is_straight_through_inside_the_range_and_zero_outside(bits: int) -> None:
    low, high = code_range(bits)
    quantizer = StaticQuantizer(torch.tensor(0.25), bits)
    steps = torch.tensor([low - 3.0, low - 0.4, low + 0.3, -0.6, 0.0, 1.2, high - 0.3, high + 0.4, high + 9.0])
    x = (steps * 0.25).requires_grad_()
    upstream = torch.arange(1.0, 10.0)
    quantizer(x).backward(upstream)
    inside = (steps >= low) & (steps <= high)
    assert x.grad is not None and torch.allclose(x.grad, torch.where(inside, upstream, 0.0))


@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
def test_gradient_of_the_scale_is_that_of_learned_step_size_quantization(shape: tuple[int, ...]) -> None:
    """LSQ, equation 3: ``round(x/s) - x/s`` inside, the bound outside; times ds/dshift = s."""
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.1
    quantizer, x = StaticQuantizer(scale, 4), random(2, 3, 40, 5)
    quantizer.shift.requires_grad_(True)
    upstream = random(2, 3, 40, 5, seed=4)
    quantizer(x).backward(upstream)
    steps = x / scale
    formula = torch.where(steps <= -8, -8.0, torch.where(steps >= 7, 7.0, torch.round(steps) - steps))
    product = upstream * formula * scale
    expected = product.sum() if shape == () else product.sum((0, 2, 3)).view(shape)
    assert quantizer.shift.grad is not None and quantizer.shift.grad.shape == shape
    assert torch.allclose(quantizer.shift.grad, expected, rtol=1e-4, atol=1e-4)
    assert ((steps < -8) | (steps > 7)).any() and (formula.abs() < 0.5).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_gradient_of_the_scale_is_the_finite_difference_of_what_straight_through_stands_for(bits: int) -> None:
    """The offset that rounding adds is a constant of the surrogate: ``(clamp(x/s) + offset) · s``."""
    low, high = code_range(bits)
    start, x = 0.11, random(200, size=2.0 if bits == 4 else 20.0).double()
    quantizer = StaticQuantizer(torch.tensor(start), bits)
    quantizer.shift.requires_grad_(True)
    quantizer(x).square().sum().backward()
    start = quantizer.start.item()
    clamped = (x / start).clamp(low, high)
    offset = clamped.round() - clamped

    def surrogate(shift: float) -> float:
        scale = start * torch.tensor(shift, dtype=torch.float64).exp()
        return (((x / scale).clamp(low, high) + offset) * scale).square().sum().item()

    epsilon = 1e-6
    difference = (surrogate(epsilon) - surrogate(-epsilon)) / (2 * epsilon)
    assert quantizer.shift.grad is not None
    assert quantizer.shift.grad.item() == pytest.approx(difference, rel=1e-3)
    assert ((x / start < low) | (x / start > high)).any()


def test_gradients_of_a_linear() -> None:
    """Of ``x · (codes · scale)ᵀ``: steps get scale · dW inside the range and 0 outside, shifts get Σ W · dW."""
    weight, x = random(6, 8), random(20, 8, seed=1)
    scale = weight.abs().amax(1) / 7 * 0.8
    codes = quantize(weight, scale[:, None], 4)
    linear = SteppedLinear(weight, codes, scale, None, 4)
    with torch.no_grad():
        linear.steps[0, 0], linear.steps[1, 1] = 7.4, -8.3  # where training may take them
    linear.steps.requires_grad_(True)
    linear.shift.requires_grad_(True)
    upstream = random(20, 6, seed=2)
    linear(x).backward(upstream)
    of_weight = upstream.T @ x
    inside = (linear.steps >= -8) & (linear.steps <= 7)
    assert not inside[0, 0] and not inside[1, 1]
    assert linear.steps.grad is not None and linear.shift.grad is not None
    assert torch.allclose(linear.steps.grad, torch.where(inside, of_weight * scale[:, None], 0.0), atol=1e-5)
    assert torch.allclose(linear.shift.grad, (of_weight * linear.weight.detach()).sum(1), atol=1e-4)


def test_a_trained_scale_is_relative_to_its_start() -> None:
    quantizer, x = StaticQuantizer(torch.tensor([0.1, 20.0]).view(2, 1, 1), 4), random(1, 2, 9, 4, size=3.0)
    with torch.no_grad():
        quantizer.shift += torch.tensor(1.25).log()
    assert torch.allclose(quantizer.scale.flatten(), torch.tensor([0.125, 25.0]))
    assert torch.equal(quantizer(x), fake_quantize(x, quantizer.scale, 4))


# --- places ----------------------------------------------------------------------------------------


def test_quantizers_are_found_where_they_were_put(tiny_decoder: Decoder) -> None:
    layer = tiny_decoder.layers[1]
    assert list(quantizers(tiny_decoder)) == []
    set_kv_quantizer(layer, "self_attn.value", torch.tensor([0.1, 0.2]), 4)
    set_kv_quantizer(layer, "self_attn.key", torch.tensor([0.3]), 8)
    set_site_quantizer(layer, "mlp.down_input", StaticQuantizer(torch.tensor(0.5), 4))
    set_site_quantizer(tiny_decoder.layers[0], "mlp.down_input", StaticQuantizer(torch.tensor(0.5), 4))
    names = [name for name, _ in quantizers(tiny_decoder)]
    assert names == [
        "layers.0.mlp.down_input",
        "layers.1.mlp.down_input",
        "layers.1.self_attn.key",
        "layers.1.self_attn.value",
    ]
    value = site_quantizer(layer, "self_attn.value")
    x = random(2, 2, 5, 16)
    assert torch.equal(value(x)[:, 1], fake_quantize(x[:, 1], torch.tensor(0.2), 4))
    for site in (*SITES, *KV_SITES):
        set_site_quantizer(layer, site, None)
    assert [name for name, _ in quantizers(tiny_decoder)] == ["layers.0.mlp.down_input"]
    assert torch.equal(site_quantizer(layer, "self_attn.value")(x), x)
