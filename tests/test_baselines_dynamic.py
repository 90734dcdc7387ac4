"""Per-token quantizers: their numbers, and where they are placed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pq_export.calib.baselines.dynamic import (
    ACTIVATION_CLIP,
    KV_CLIP,
    DynamicKVQuantizer,
    DynamicQuantizer,
    place_dynamic,
    search_dynamic,
)
from pq_export.calib.block import Block, LayerBits
from pq_export.calib.fake_quant import site_quantizer
from pq_export.calibration import KV_SITES, SITES
from pq_export.decoder import Decoder
from pq_export.precision import Precision
from tests.conftest import VOCAB


def test_symmetric_by_hand() -> None:
    x = torch.tensor([[7.0, -3.4, 0.6], [0.7, 0.34, -0.7]])
    torch.testing.assert_close(
        DynamicQuantizer(4)(x), torch.tensor([[7.0, -3.0, 1.0], [0.7, 0.3, -0.7]]), rtol=0, atol=1e-6
    )


def test_clip_cuts_the_largest() -> None:
    x = torch.tensor([14.0, 1.0, -14.0])
    torch.testing.assert_close(DynamicQuantizer(4, 0.5)(x), torch.tensor([7.0, 1.0, -8.0]))


def test_each_token_has_its_own_scale() -> None:
    """A token a million times larger changes nothing for the others."""
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    quiet = DynamicQuantizer(4)(x)
    loud = x.clone()
    loud[0, 0] *= 1e6
    assert torch.equal(DynamicQuantizer(4)(loud)[0, 1:], quiet[0, 1:])
    assert torch.equal(DynamicQuantizer(4)(loud)[1], quiet[1])


def test_zero_tokens_stay_zero() -> None:
    assert torch.equal(DynamicQuantizer(4)(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert torch.equal(DynamicKVQuantizer(4)(torch.zeros(1, 2, 3, 4)), torch.zeros(1, 2, 3, 4))


def quarot_asymmetric(x: Tensor, bits: int, clip: float) -> Tensor:
    """QuaRot's formula, written with an unsigned grid and an integer zero point."""
    low, high = clip * x.amin(-1, keepdim=True), clip * x.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    return scale * ((torch.round(x / scale) + zero).clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("clip", [1.0, KV_CLIP])
def test_asymmetric_is_quarots(bits: int, clip: float) -> None:
    x = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x += 3.0  # off center: what the zero point is for
    ours, theirs = DynamicKVQuantizer(bits, clip)(x.float()), quarot_asymmetric(x, bits, clip).float()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    levels = [len(row.unique()) for row in ours.flatten(0, 2)]
    assert max(levels) <= 2**bits


def block_of(decoder: Decoder, precision: str, kv: int | None = None) -> Block:
    ids = torch.randint(3, VOCAB, (3, 16), generator=torch.Generator().manual_seed(4))
    positions = torch.arange(16)[None]
    context = decoder.context(positions, torch.ones_like(positions), 0)
    x = decoder.embed(ids)
    return Block.of(0, decoder.layers[0], context, x, x, LayerBits.of(Precision.named(precision, kv)), {})


def kinds(block: Block) -> dict[str, nn.Module]:
    return {site: site_quantizer(block.layer, site) for site in (*SITES, *KV_SITES)}


@torch.no_grad()
def test_placed_where_there_are_fewer_than_16_bits(tiny_decoder: Decoder) -> None:
    block = block_of(tiny_decoder, "w4a8", 4)
    place_dynamic(block)
    for site, module in kinds(block).items():
        expected = DynamicKVQuantizer if site in KV_SITES else DynamicQuantizer
        assert type(module) is expected
        assert (module.bits, module.clip) == ((4, KV_CLIP) if site in KV_SITES else (8, ACTIVATION_CLIP))


@torch.no_grad()
def test_nothing_is_placed_at_16_bits(tiny_decoder: Decoder) -> None:
    for place in (place_dynamic, lambda block: search_dynamic(block, 3, 16)):
        block = block_of(tiny_decoder, "w4a16", 16)
        place(block)
        assert all(type(module) is nn.Identity for module in kinds(block).values())


@torch.no_grad()
def test_search_clips_what_only_widens_the_scale(tiny_decoder: Decoder) -> None:
    """A channel that is large in every token and that no linear reads: the less of it a scale covers, the better."""
    layer = tiny_decoder.layers[0]
    layer.input_layernorm.weight[7] = 20.0
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        linear.weight[:, 7] = 0.0

    def error(block: Block) -> float:
        return (block.staged().run(block.x) - block.staged_reference().run(block.x)).square().mean().item()

    block = block_of(tiny_decoder, "w4a4")
    place_dynamic(block, 1.0, 1.0)
    unclipped = error(block)
    place_dynamic(block)
    fixed = error(block)
    search_dynamic(block, 3, 16)
    assert error(block) < fixed < unclipped
    clips = {site: module.clip for site, module in kinds(block).items()}
    assert clips == block.found.factors
    assert clips["self_attn.qkv_input"] < 0.5 < clips["mlp.gate_up_input"]
