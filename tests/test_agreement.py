"""KL divergence, top-1 agreement and perplexity of models beside a reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pq_export.calibration import Calibration
from pq_export.decoder import Decoder
from pq_export.simulate import simulated_decoder
from pq_export.validate import agreement
from pq_export.validate.agreement import compare_logits
from pq_export.validate.perplexity import perplexity, torch_logits

WINDOWS = torch.randint(3, 320, (3, 40), generator=torch.Generator().manual_seed(0))


def constant(*rows: list[float]) -> Callable[[Tensor], Tensor]:
    """The same logits [len(rows), vocab] for every window."""
    return lambda ids: torch.tensor([rows])


def test_values_are_those_computed_by_hand() -> None:
    """Two positions count, the last one predicts nothing."""
    third = math.log(1 / 3)
    reference = constant([math.log(0.5), math.log(0.25), math.log(0.25)], [third] * 3, [9.0, 0.0, 0.0])
    candidate = constant([third] * 3, [math.log(0.1), math.log(0.1), math.log(0.8)], [0.0, 0.0, 9.0])
    found = compare_logits(reference, {"q": candidate}, torch.tensor([[0, 1, 2]]))["q"]
    first = 0.5 * math.log(0.5 * 3) + 2 * 0.25 * math.log(0.25 * 3)
    second = sum(math.log((1 / 3) / q) / 3 for q in (0.1, 0.1, 0.8))
    assert found.kl == pytest.approx((first + second) / 2, rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp((-third - math.log(0.8)) / 2), rel=1e-6)
    assert found.top1 == 0.5  # of equal values both take the first
    assert found.tokens_per_second > 0


def test_shift_of_logits_is_no_difference_and_the_order_of_the_two_counts() -> None:
    a, b = constant([0.0, 3.0], [0.0, 0.0]), constant([1.0, 0.0], [0.0, 0.0])
    shifted = constant([100.0, 103.0], [5.0, 5.0])
    ids = torch.tensor([[0, 1]])
    assert compare_logits(a, {"b": shifted}, ids)["b"].kl == pytest.approx(0.0, abs=1e-6)
    forward, backward = compare_logits(a, {"b": b}, ids)["b"].kl, compare_logits(b, {"a": a}, ids)["a"].kl
    p, q = 1 / (1 + math.exp(3)), 1 / (1 + math.exp(-1))
    assert forward == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), rel=1e-5)
    assert abs(forward - backward) > 0.1


def test_a_model_agrees_with_itself_exactly(tiny_decoder: Decoder) -> None:
    """Both when its logits are used again and when it runs a second time."""
    found = compare_logits(torch_logits(tiny_decoder), {"again": torch_logits(tiny_decoder)}, WINDOWS)["again"]
    assert found.kl == 0.0 and found.top1 == 1.0
    runs = []

    def counted(ids: Tensor) -> Tensor:
        runs.append(len(ids))
        return torch_logits(tiny_decoder)(ids)

    same = compare_logits(counted, {"FP": counted}, WINDOWS)["FP"]
    assert len(runs) == len(WINDOWS)
    assert (same.kl, same.top1, same.perplexity) == (0.0, 1.0, found.perplexity)


def test_models_beside_the_floating_point_one(
    tiny_decoder: Decoder, calibrations: Callable[..., Calibration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All in one pass equal each alone, whatever the chunk; the perplexity is that of ``perplexity``."""
    reference = torch_logits(tiny_decoder)
    candidates = {name: torch_logits(simulated_decoder(calibrations(name))) for name in ("w4a4", "w8a8")}
    advanced: list[int] = []
    found = compare_logits(reference, candidates, WINDOWS, advanced.append)
    assert advanced == [1, 1, 1] and list(found) == ["w4a4", "w8a8"]
    for name, logits_of in candidates.items():
        assert found[name].perplexity == pytest.approx(perplexity(logits_of, WINDOWS).value, rel=1e-5)
    p, q = (torch.stack([f(w[None])[0, :-1] for w in WINDOWS]).double() for f in (reference, candidates["w4a4"]))
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True)
    assert found["w4a4"].kl == pytest.approx(expected.sum(-1).mean().item(), rel=1e-5)
    assert found["w4a4"].top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    monkeypatch.setattr(agreement, "CHUNK_VALUES", 7 * 320)  # 39 tokens in six chunks
    chunked = compare_logits(reference, candidates, WINDOWS)
    for name, value in found.items():
        assert (chunked[name].kl, chunked[name].perplexity) == pytest.approx((value.kl, value.perplexity), rel=1e-6)
        assert chunked[name].top1 == value.top1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_may_sit_on_different_devices(tiny_decoder: Decoder, calibrations: Callable[..., Calibration]) -> None:
    simulated = simulated_decoder(calibrations("w8a8"))
    here = compare_logits(torch_logits(tiny_decoder), {"q": torch_logits(simulated)}, WINDOWS)["q"]
    tiny_decoder.to("cuda")
    mixed = compare_logits(torch_logits(tiny_decoder), {"q": torch_logits(simulated)}, WINDOWS)["q"]
    assert mixed.kl == pytest.approx(here.kl, rel=1e-3) and mixed.perplexity == pytest.approx(here.perplexity)
