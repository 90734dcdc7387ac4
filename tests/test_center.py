"""Centering: the function stays, the mean goes, and the exported graph does the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pq_export.calib.center import CENTERABLE, KEY, VALUE, CenterOptions, center, find_means
from pq_export.calib.checkpoint import full_logits, load_checkpoint
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.rewrites import rewrite
from pq_export.calibration import Calibration, load_calibration, prefix_key, save_calibration
from pq_export.decoder import Decoder
from pq_export.errors import IntegrityError, PqExportError
from pq_export.export.fp_graph import export_fp_graph
from pq_export.precision import Precision
from pq_export.rewrite.pipeline import quantized_model
from pq_export.rewrite.qlinear import Form
from pq_export.simulate import simulated_decoder
from pq_export.targets.base import TargetOptions
from pq_export.targets.ort import ORT
from pq_export.validate.codes import compare_blocks
from tests.conftest import FAMILIES
from tests.tiny_blocks import random_ids

PREFIX = (77, 8, 9)


def rewritten(directory: Path, prefix: bool) -> Decoder:
    """With R1-R4, and a prefix if asked for."""
    decoder = load_checkpoint(str(directory)).decoder
    rewrite(decoder, "online", seed=0)
    if prefix:
        with torch.no_grad():
            decoder.set_prefix(compute_prefix_kv(decoder, PREFIX))
    return decoder


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_and_means_go(checkpoint_dir: Callable[[str], Path], family: str, prefix: bool) -> None:
    decoder, ids = rewritten(checkpoint_dir(family), prefix), random_ids(6, 24)
    before = full_logits(decoder, ids)
    means = find_means(decoder, ids, CENTERABLE)
    assert len(means) == len(CENTERABLE) * len(decoder.layers)
    assert all(mean.abs().max() > 0.02 for mean in means.values())  # else there would be nothing to see
    center(decoder, means)
    assert torch.allclose(full_logits(decoder, ids), before, atol=2e-4 * before.abs().max().item())
    for name, mean in find_means(decoder, ids, CENTERABLE).items():
        assert mean.abs().max() < 1e-4 * max(1.0, means[name].abs().max().item()), name


def test_the_prefix_moves_with_the_keys_and_values(checkpoint_dir: Callable[[str], Path]) -> None:
    """What center leaves is what the prefix's tokens give when they are run anew."""
    decoder, ids = rewritten(checkpoint_dir("llama"), True), random_ids(6, 24)
    center(decoder, find_means(decoder, ids, CENTERABLE))
    moved = [(layer.self_attn.prefix_key, layer.self_attn.prefix_value) for layer in decoder.layers]
    with torch.no_grad():
        anew = compute_prefix_kv(decoder, PREFIX)
    for pair, other in zip(moved, anew, strict=True):
        for one, two in zip(pair, other, strict=True):
            assert torch.allclose(one, two, atol=2e-3)  # FP16


def test_a_wrong_mean_is_noticed(checkpoint_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = rewritten(checkpoint_dir("llama"), False), random_ids(6, 24)
    monkeypatch.setattr(
        "pq_export.calib.center._center_values", lambda layer, mean: layer.self_attn.v_proj.bias.add_(1)
    )
    with pytest.raises(PqExportError, match="'center' changed"), torch.no_grad():
        center(decoder, find_means(decoder, ids, (VALUE,)))


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (Precision(4, 4, 4), CENTERABLE),
        (Precision(4, 8, 4), (KEY, VALUE)),
        (Precision(4, 4, 8), ("self_attn.qkv_input", "mlp.gate_up_input")),
        (Precision(8, 8, 8), ()),
        (Precision(4, 16, 16), ()),
    ],
)
def test_sites_with_fine_steps_are_left(precision: Precision, expected: tuple[str, ...]) -> None:
    assert CenterOptions().chosen(precision) == expected
    assert CenterOptions(bits=16).chosen(precision) == CENTERABLE


def test_options_that_are_wrong() -> None:
    with pytest.raises(ValueError, match=r"'mlp.down_input' cannot be centered"):
        CenterOptions(sites=("mlp.down_input",))
    with pytest.raises(ValueError, match="bits"):
        CenterOptions(bits=5)


STEPS = (("center", {}), ("clip_search", {}), ("gptq", {}))


@pytest.fixture
def centered(calibrations: Callable[..., Calibration]) -> Calibration:
    return calibrations("w4a4", steps=STEPS)


def test_offsets_are_in_the_contract(centered: Calibration) -> None:
    c = centered.decoder
    assert c.norm_bias and c.key_offset and c.qkv_bias and c.o_bias and c.mlp_bias
    for name in ("input_layernorm.bias", "self_attn.key_offset", "self_attn.v_proj.bias", "self_attn.o_proj.bias"):
        assert np.abs(centered.tensors[f"layers.1.{name}"]).max() > 0
    changed = {
        **centered.tensors,
        "layers.1.self_attn.key_offset": centered.tensors["layers.1.self_attn.key_offset"] * 2,
    }
    assert centered.prefix.key != prefix_key(changed, centered.prefix.token_ids, centered.rotation, c)


def test_readers_that_know_no_offsets_refuse_them(
    centered: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_calibration(centered, tmp_path)
    assert load_calibration(tmp_path).decoder == centered.decoder
    monkeypatch.setattr("pq_export.calibration.SCHEMA_VERSION", 2)
    with pytest.raises(IntegrityError, match="schema version 3; this pq-export reads up to 2"):
        load_calibration(tmp_path)


@pytest.mark.parametrize("form", [Form.INTEGER, Form.QDQ])
def test_graph_is_the_fake_quant_model(centered: Calibration, form: Form) -> None:
    """Every code of the file, on the fake-quant model's own inputs: ties alone may differ."""
    model = quantized_model(export_fp_graph(centered.decoder), centered, form)
    if form is Form.INTEGER:
        ORT.lower(model, TargetOptions())
    bits = dict.fromkeys((*centered.activation_scales, *centered.kv_scales), 4)
    blocks = compare_blocks(model, simulated_decoder(centered), random_ids(1, 16, seed=3), bits)
    assert set(blocks["sites"]) == set(bits)
    assert sum(c["different"] for c in blocks["sites"].values()) <= 2
    assert min(blocks["cosine"]) > 1 - 1e-6
