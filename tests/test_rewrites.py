"""The decoder is transformers' model, and every rewrite of its weights leaves the function as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from pq_export.calib.checkpoint import check_equal_to_hf, decoder_from_hf, full_logits, load_checkpoint
from pq_export.calib.rewrites import LOGITS_TOLERANCE, assert_unchanged, fold_r1, fold_r2, fold_r4, fuse_norms, rewrite
from pq_export.calibration import Rotation
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.hadamard import HadamardTransform, hadamard_factors, random_hadamard
from pq_export.simulate import insert_online_rotations
from tests.conftest import FAMILIES, VOCAB

IDS = torch.randint(0, VOCAB, (2, 21), generator=torch.Generator().manual_seed(5))
Loader = Callable[[str], Decoder]


@pytest.fixture(scope="module")
def loaded(checkpoint_dir: Callable[[str], Path]) -> Loader:
    """A fresh copy of a family's decoder; the files are read once."""
    originals: dict[str, Decoder] = {}

    def load(family: str) -> Decoder:
        if family not in originals:
            originals[family] = load_checkpoint(str(checkpoint_dir(family))).decoder
        return copy.deepcopy(originals[family])

    return load


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def transformers_model(directory: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


# --- the decoder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_transformers(checkpoint_dir: Callable[[str], Path], loaded: Loader, family: str) -> None:
    theirs = transformers_model(checkpoint_dir(family))(input_ids=IDS).logits
    assert theirs.abs().max() > 1
    assert close(full_logits(loaded(family), IDS), theirs)


@pytest.mark.parametrize("family", ["llama-rope-linear", "llama-rope-llama3", "llama-rope-yarn"])
@torch.no_grad()
def test_scaled_rope_at_far_positions(checkpoint_dir: Callable[[str], Path], loaded: Loader, family: str) -> None:
    """The scaling shows beyond the original context: 400 tokens, against the unscaled model too."""
    ids = torch.randint(0, VOCAB, (1, 400), generator=torch.Generator().manual_seed(6))
    model = transformers_model(checkpoint_dir(family))
    theirs = model(input_ids=ids).logits
    assert close(full_logits(loaded(family), ids), theirs)
    plain = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**model.config.to_dict(), "rope_parameters": None})
    )
    plain.load_state_dict(model.state_dict())
    assert not close(plain.eval()(input_ids=ids).logits, theirs, 1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@torch.no_grad()
def test_cache_and_padding_are_those_of_transformers(
    checkpoint_dir: Callable[[str], Path], loaded: Loader, family: str
) -> None:
    """Row 1 has 4 pads on the left; 13 tokens, then 8 more with the cache."""
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    theirs = transformers_model(checkpoint_dir(family))(
        input_ids=IDS, attention_mask=mask, position_ids=positions
    ).logits
    decoder = loaded(family)
    first, past = decoder(IDS[:, :13], mask[:, :13], positions[:, :13], decoder.empty_past(2))
    second, _ = decoder(IDS[:, 13:], mask, positions[:, 13:], past)
    ours = torch.cat((first, second), 1)
    assert close(ours[0], theirs[0]) and close(ours[1, 4:], theirs[1, 4:])


def test_loading_checks_the_logits(checkpoint_dir: Callable[[str], Path], loaded: Loader) -> None:
    decoder, model = loaded("qwen2"), transformers_model(checkpoint_dir("qwen2"))
    check_equal_to_hf(decoder, model, "tiny")
    decoder.layers[1].self_attn.q_proj.bias.data.zero_()
    with pytest.raises(PqExportError, match="differ from transformers"):
        check_equal_to_hf(decoder, model, "tiny")


# --- single rewrites -------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Decoder], None]] = {
    "fuse": fuse_norms,
    "R1": lambda d: (fuse_norms(d), fold_r1(d, random_hadamard(d.config.hidden_size, 3)))[0],
    "R2": lambda d: fold_r2(d, random_hadamard(d.config.head_dim, 4)),
    "R3": lambda d: insert_online_rotations(d, ("R3",)),
    "R4": fold_r4,
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rewrite_keeps_the_logits(loaded: Loader, family: str, step: str) -> None:
    decoder = loaded(family)
    before, parameters = full_logits(decoder, IDS), {n: p.clone() for n, p in decoder.named_parameters()}
    STEPS[step](decoder)
    assert close(full_logits(decoder, IDS), before)
    changed = {name for name, p in decoder.named_parameters() if not torch.equal(p, parameters[name])}
    assert (len(changed) > 0) == (step != "R3")  # R3 has no half in the weights


@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_leaves_gains_of_one(loaded: Loader, family: str) -> None:
    decoder = loaded(family)
    q_norm = decoder.layers[0].self_attn.q_norm
    gain = getattr(q_norm, "weight", torch.zeros(0)).clone()
    fuse_norms(decoder)
    for norm in [
        decoder.norm,
        *(n for layer in decoder.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]:
        assert (norm.weight == 1).all()
    if family == "qwen3":  # these act after the product: they must stay
        assert torch.equal(q_norm.weight, gain) and (gain != 1).any()


def test_r1_rotates_the_residual_stream(loaded: Loader) -> None:
    """Not only the logits: the embedding is E Q."""
    decoder = loaded("llama")
    fuse_norms(decoder)
    q, before = random_hadamard(48, 3), decoder.embed_tokens.weight.double().clone()
    fold_r1(decoder, q)
    assert torch.allclose(decoder.embed_tokens.weight.double(), before @ q, atol=1e-6)


def test_r1_without_fusing_is_no_equivalence(loaded: Loader) -> None:
    decoder = loaded("llama")
    before = full_logits(decoder, IDS)
    fold_r1(decoder, random_hadamard(48, 3))
    with pytest.raises(PqExportError, match="changed the floating-point logits"):
        assert_unchanged(full_logits(decoder, IDS), before, "R1")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_r2_rotates_every_value_head(loaded: Loader, family: str) -> None:
    decoder, c = loaded(family), loaded(family).config
    q, ids = random_hadamard(c.head_dim, 4), IDS[:1]
    arguments = (ids, torch.ones_like(ids), torch.arange(21)[None], decoder.empty_past(1))
    before = decoder(*arguments)[1][0]
    fold_r2(decoder, q)
    after = decoder(*arguments)[1][0]
    assert torch.allclose(after[1], before[1] @ q.float(), atol=1e-4)  # values of layer 0
    assert torch.allclose(after[0], before[0], atol=1e-5)  # keys stay


def test_r3_rotates_cached_keys(loaded: Loader) -> None:
    decoder = loaded("qwen3")
    arguments = (IDS, torch.ones_like(IDS), torch.arange(21).expand_as(IDS), decoder.empty_past(2))
    before = decoder(*arguments)[1][0]
    insert_online_rotations(decoder, ("R3",))
    after = decoder(*arguments)[1][0]
    h = torch.from_numpy(hadamard_factors(24).matrix()).float()
    assert torch.allclose(after[0], before[0] @ h, atol=1e-4)
    assert torch.allclose(after[1], before[1], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_r4_changes_the_logits(loaded: Loader, family: str) -> None:
    """The weight's half without the online one, and the online one alone."""
    before = full_logits(loaded(family), IDS)
    folded = loaded(family)
    fold_r4(folded)
    for layer in folded.layers:
        layer.mlp.down_rotation = torch.nn.Identity()
    online = loaded(family)
    insert_online_rotations(online, ("R4",))
    for half in (folded, online):
        with pytest.raises(PqExportError, match="changed the floating-point logits"):
            assert_unchanged(full_logits(half, IDS), before, "half of R4")


def test_assert_unchanged_has_a_limit() -> None:
    reference = torch.tensor([1.0, -50.0])
    assert_unchanged(reference + 50 * LOGITS_TOLERANCE * 0.9, reference, "x")
    with pytest.raises(PqExportError, match="rewrite 'x'"):
        assert_unchanged(reference + 50 * LOGITS_TOLERANCE * 1.1, reference, "x")
    with pytest.raises(PqExportError, match="rewrite 'x'"):
        assert_unchanged(reference * float("nan"), reference, "x")


# --- tied embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_lm_head_has_a_tensor_of_its_own(checkpoint_dir: Callable[[str], Path], loaded: Loader, family: str) -> None:
    model = transformers_model(checkpoint_dir(family))
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == (family in ("llama", "qwen2"))
    decoder = decoder_from_hf(model)
    assert decoder.lm_head.weight.data_ptr() != decoder.embed_tokens.weight.data_ptr()
    assert torch.equal(decoder.lm_head.weight, decoder.embed_tokens.weight) == tied


def test_fusing_a_tied_lm_head_would_break_the_embedding(loaded: Loader) -> None:
    decoder = loaded("llama")
    before = full_logits(decoder, IDS)
    decoder.lm_head.weight = decoder.embed_tokens.weight
    assert torch.equal(full_logits(decoder, IDS), before)
    fuse_norms(decoder)
    with pytest.raises(PqExportError):
        assert_unchanged(full_logits(decoder, IDS), before, "fuse norms")


# --- all of them -----------------------------------------------------------------------------------

RECORDS = {
    "none": ((), ()),
    "offline": (("R1", "R2"), ()),
    "online": (("R1", "R2"), ("R3", "R4")),
}


@pytest.mark.parametrize("mode", RECORDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rewrite(loaded: Loader, family: str, mode: str) -> None:
    decoder = loaded(family)
    before = full_logits(decoder, IDS)
    notes: list[str] = []
    record = rewrite(decoder, mode, 7, notes.append)
    offline, online = RECORDS[mode]
    assert record == Rotation(mode, 7, offline, online)
    assert notes == ["fuse norms", *offline, *online]
    assert close(full_logits(decoder, IDS), before)
    attention, mlp = decoder.layers[1].self_attn, decoder.layers[1].mlp
    for module in (attention.q_rotation, attention.k_rotation, mlp.down_rotation):
        assert isinstance(module, HadamardTransform) == (mode == "online")


def test_rewrite_without_r3(loaded: Loader) -> None:
    """For caches that it does not serve: everything else stays."""
    decoder, full = loaded("llama"), loaded("llama")
    before = full_logits(decoder, IDS)
    assert rewrite(decoder, "online", 7, r3=False) == Rotation("online", 7, ("R1", "R2"), ("R4",))
    rewrite(full, "online", 7)
    assert close(full_logits(decoder, IDS), before)
    attention = decoder.layers[1].self_attn
    assert not isinstance(attention.q_rotation, HadamardTransform) and isinstance(
        decoder.layers[1].mlp.down_rotation, HadamardTransform
    )
    for (name, ours), theirs in zip(decoder.named_parameters(), full.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_rewrite_depends_on_the_seed_alone(loaded: Loader) -> None:
    one, same, other = loaded("llama"), loaded("llama"), loaded("llama")
    for decoder, seed in ((one, 0), (same, 0), (other, 1)):
        rewrite(decoder, "online", seed)
    name = "layers.0.self_attn.q_proj.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))


def test_rewrite_stops_at_a_step_that_breaks(loaded: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pq_export.calib.rewrites.fold_r2", lambda d, q: d.layers[0].mlp.up_proj.weight.mul_(1.5))
    with pytest.raises(PqExportError, match="rewrite 'R2'"):
        rewrite(loaded("llama"), "online", 0)
