"""Rewrites of the weights that leave the function as it is: norm fusion and rotations.

Row-vector convention: a linear computes ``x Wᵀ``. All products in fp64. After each rewrite the
floating-point logits are compared with those of before. The names R1-R4 are SpinQuant's (arXiv
2405.16406). PrefixQuant folds R1 and R2 and executes R3 and R4 online.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calibration import Rotation
from pq_export.decoder import Decoder, RMSNorm
from pq_export.errors import PqExportError
from pq_export.hadamard import hadamard_factors, random_hadamard
from pq_export.simulate import insert_online_rotations

# Largest change of a logit, relative to the largest logit, that fp32 round-off can explain.
LOGITS_TOLERANCE = 2e-4


def rewrite(
    decoder: Decoder, rotate: str, seed: int, progress: Callable[[str], None] = lambda step: None, *, r3: bool = True
) -> Rotation:
    """Fuse norms and fold rotations in place; returns the record of what was done.

    ``rotate``: 'online' = R1, R2, R3, R4; 'offline' = R1, R2 only; 'none' = norm fusion only. ``r3`` False
    leaves R3 out: it serves 4-bit keys and nothing else.
    Raises :class:`PqExportError` if a step changes the logits.
    """
    steps: list[tuple[str, Callable[[], None]]] = [("fuse norms", lambda: fuse_norms(decoder))]
    if rotate != "none":
        steps.append(("R1", lambda: fold_r1(decoder, random_hadamard(decoder.config.hidden_size, seed))))
        steps.append(("R2", lambda: fold_r2(decoder, random_hadamard(decoder.config.head_dim, seed + 1))))
    if rotate == "online" and r3:
        steps.append(("R3", lambda: insert_online_rotations(decoder, ("R3",))))
    if rotate == "online":
        steps.append(("R4", lambda: fold_r4(decoder)))
    ids = probe_ids(decoder.config.vocab_size).to(decoder.embed_tokens.weight.device)
    reference = full_logits(decoder, ids)
    for name, step in steps:
        progress(name)
        step()
        assert_unchanged(full_logits(decoder, ids), reference, name)
    done = [name for name, _ in steps]
    return Rotation(
        rotate, seed, tuple(n for n in done if n in ("R1", "R2")), tuple(n for n in done if n in ("R3", "R4"))
    )


def assert_unchanged(logits: Tensor, reference: Tensor, step: str) -> None:
    """Raise if ``logits`` differ from ``reference`` by more than round-off."""
    error, size = (logits - reference).abs().max().item(), reference.abs().max().item()
    if not error <= LOGITS_TOLERANCE * size:
        raise PqExportError(
            f"rewrite '{step}' changed the floating-point logits by {error:.3g} "
            f"(largest logit {size:.3g}): this is a defect, please report it"
        )


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.to(parameter.dtype)


def _consumers(decoder: Decoder) -> list[tuple[RMSNorm, list[nn.Linear]]]:
    """Every RMSNorm of the residual stream with the linears that read it."""
    groups: list[tuple[RMSNorm, list[nn.Linear]]] = [(decoder.norm, [decoder.lm_head])]
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        groups.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        groups.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    return groups


def fuse_norms(decoder: Decoder) -> None:
    """``W ← W diag(γ)``, ``γ ← 1`` for each norm of the residual stream. The norm's own eps stays.

    No mean is subtracted from the embedding: that is an equivalence for LayerNorm, not for RMSNorm.
    """
    for norm, linears in _consumers(decoder):
        gain = norm.weight.double()
        for linear in linears:
            _set(linear.weight, linear.weight.double() * gain)
        _set(norm.weight, torch.ones_like(norm.weight))


def fold_r1(decoder: Decoder, q: Tensor) -> None:
    """Rotate the residual stream by orthogonal ``q`` [hidden, hidden]: ``E Q``, ``W Q``, ``Qᵀ W_{o,down}``."""
    q = q.to(decoder.embed_tokens.weight.device)
    _set(decoder.embed_tokens.weight, decoder.embed_tokens.weight.double() @ q)
    for _, linears in _consumers(decoder):
        for linear in linears:
            _set(linear.weight, linear.weight.double() @ q)
    for layer in decoder.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _set(linear.weight, q.T @ linear.weight.double())
            if linear.bias is not None:
                _set(linear.bias, linear.bias.double() @ q)


def fold_r2(decoder: Decoder, q: Tensor) -> None:
    """Rotate every value head by ``q`` [head_dim, head_dim]; o_proj undoes it head by head.

    ``q`` [layers, head_dim, head_dim] gives each layer a matrix of its own.
    """
    c, q = decoder.config, q.to(decoder.embed_tokens.weight.device)
    for layer, matrix in zip(decoder.layers, q.expand(c.num_layers, -1, -1), strict=True):
        v, o = layer.self_attn.v_proj, layer.self_attn.o_proj
        heads = v.weight.double().view(c.num_kv_heads, c.head_dim, c.hidden_size)
        _set(v.weight, (matrix.T @ heads).reshape(v.weight.shape))
        if v.bias is not None:
            _set(v.bias, (v.bias.double().view(c.num_kv_heads, c.head_dim) @ matrix).reshape(-1))
        columns = o.weight.double().view(c.hidden_size, c.num_heads, c.head_dim)
        _set(o.weight, (columns @ matrix).reshape(o.weight.shape))


def fold_r4(decoder: Decoder) -> None:
    """Hadamard on down_proj's input, executed online, and its inverse in the weight: ``x H (W H)ᵀ``.

    The two halves are one function: neither can be had without the other.
    """
    h = torch.from_numpy(hadamard_factors(decoder.config.intermediate_size).matrix())
    h = h.to(decoder.embed_tokens.weight.device)
    for layer in decoder.layers:
        _set(layer.mlp.down_proj.weight, layer.mlp.down_proj.weight.double() @ h)
    insert_online_rotations(decoder, ("R4",))
