"""Learned R1 and R2: rotations that are folded into the weights and trained for the quantizers behind them.

SpinQuant (Liu et al., arXiv 2405.16406). A random Hadamard spreads outliers well; which rotation spreads
them best is found by gradient on the Stiefel manifold. Here a learned Q multiplies the Hadamard that is
already folded, starts at the identity and is the Cayley transform ``Q = (I - A)(I + A)⁻¹`` of a skew matrix A
that Adam trains: orthogonal at every step. (The paper's Cayley SGD got as far on small models, but what
step size suits it changes from model to model.) Unlike there activations are static, so their scales are
trained along, from clipped ranges.

During training weights stay where they are and each quantizer turns its own input there and back::

    x ──► Q1 ──► quantize ──► Q1ᵀ ──► q/k/v_proj, gate/up_proj         (down_proj's input and keys: no Q)
    v ──► Q2 ──► quantize ──► Q2ᵀ ──► cache;  context ──► Q2 ──► quantize ──► Q2ᵀ ──► o_proj  (head by head)

That is the function of the folded decoder, costs two small products a site, and leaves embedding, lm_head,
residual stream and prefix KV untouched until the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pq_export.calib.checkpoint import full_logits, probe_ids
from pq_export.calib.fake_quant import StaticQuantizer, quantizers, round_ste, set_site_quantizer
from pq_export.calib.outliers import hidden_states
from pq_export.calib.ranges import Ranges
from pq_export.calib.rewrites import assert_unchanged, fold_r1, fold_r2
from pq_export.calib.training import (
    BestKeeper,
    Diverged,
    DivergenceGuard,
    autocast,
    batches,
    cosine,
    kl_divergence,
    next_token_loss,
    run_layers,
    twin,
)
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.decoder import Decoder
from pq_export.errors import PqExportError
from pq_export.precision import Precision
from pq_export.quantizer import code_range, scale_from_max

# Which rotation turns a site's values, or a linear's input.
ROTATION_OF_SITE = {
    "self_attn.qkv_input": "R1",
    "self_attn.o_input": "R2",
    "self_attn.value": "R2",
    "mlp.gate_up_input": "R1",
}
LEARNABLE = ("R1", "R2")

START_FACTORS = {4: 0.6, 8: 0.95}  # of a site's range: about what a search finds
WEIGHT_FACTORS = {4: 0.8, 8: 1.0}  # of a row's range: what least squares wants of a normal distribution
SPREAD_POWER = 8  # of the power mean that stands for a range: 2 is blind to outliers, infinity sees but one
TINY = 1e-30  # stands for the magnitude of values that are all zero
SMOOTHING = 0.9  # share of the past in the smoothed loss that says which rotations are the last good ones
ORTHOGONALITY_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RotationOptions:
    """``batch`` crops a step; ``lr`` how far a row turns in one step at most, in radians; ``scale_lr`` the same of the
    logarithm of a scale; ``loss`` 'kl' to the unquantized decoder or 'ce' on the next token.

    ``quantize_weights`` rounds rotated weights to nearest as well; leave it off if GPTQ follows. It is always
    on where activations have 16 bits, or R1 would have nothing to learn from.
    """

    steps: int = 100
    batch: int = 8
    lr: float = 0.02
    scale_lr: float = 0.01
    loss: str = "kl"
    quantize_weights: bool = False
    learn: tuple[str, ...] = LEARNABLE
    seed: int = 0

    def __post_init__(self) -> None:
        for bad, what in (
            (self.steps < 1, f"steps {self.steps} is not at least 1"),
            (self.batch < 1, f"batch {self.batch} is not at least 1"),
            (not 0 < self.lr < math.inf, f"lr {self.lr} is not positive"),
            (not 0 <= self.scale_lr < math.inf, f"scale_lr {self.scale_lr} is negative"),
            (self.loss not in ("kl", "ce"), f"loss '{self.loss}' is neither kl nor ce"),
            (
                not self.learn or not set(self.learn) <= set(LEARNABLE),
                f"learn {list(self.learn)} is not R1, R2 or both",
            ),
        ):
            if bad:
                raise PqExportError(what, where="learned rotation")


class CayleyRotations(nn.Module):
    """``count`` orthogonal matrices [count, order, order] that start at the identity.

    The skew matrices are scaled so that a step of Adam of size ``lr`` in every entry turns a row by about
    ``lr`` radians, whatever the order.
    """

    def __init__(self, count: int, order: int, device: torch.device):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(count, order, order, device=device))

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        raw = self.raw.to(dtype) / (2.0 * math.sqrt(self.raw.shape[-1]))
        skew, eye = raw - raw.mT, torch.eye(raw.shape[-1], dtype=dtype, device=raw.device)
        return torch.linalg.solve(eye + skew, eye - skew)


class Rotations:
    """The matrices of the current step: ``matrix(name, layer)`` is R1's [hidden, hidden] or R2's [D, D], or None.

    ``refresh`` computes them once a step; every site of the forward pass, and of its recomputation, reads them.
    """

    def __init__(self, decoder: Decoder, learn: tuple[str, ...]):
        c, device = decoder.config, decoder.embed_tokens.weight.device
        sizes = {"R1": (1, c.hidden_size), "R2": (c.num_layers, c.head_dim)}
        self.learned = {name: CayleyRotations(*sizes[name], device) for name in sorted(learn)}
        self._current: dict[str, Tensor] = {}

    def parameters(self) -> list[Tensor]:
        return [rotations.raw for rotations in self.learned.values()]

    def refresh(self) -> None:
        self._current = {name: rotations() for name, rotations in self.learned.items()}

    def matrix(self, name: str | None, layer: int) -> Tensor | None:
        if name not in self._current:
            return None
        return self._current[name][0 if name == "R1" else layer]


def rotate(x: Tensor, q: Tensor | None) -> Tensor:
    """``x`` [..., n·D] times ``q`` [D, D], piece by piece of the last axis."""
    return x if q is None else (x.unflatten(-1, (-1, len(q))) @ q).flatten(-2)


class RotatedQuantizer(nn.Module):
    """Quantize in the rotated basis, and turn back. ``matrix`` gives the current [D, D] or None.

    The scale follows the range that the rotation leaves: ``scale · spread(x Q) / spread(x)``, exactly the
    static scale while Q is the identity. Rounding is straight-through, so that with a constant scale a
    rotation would learn to clip less, but never that flatter values could have a smaller step.
    """

    def __init__(self, quantizer: StaticQuantizer, matrix: Callable[[], Tensor | None]):
        super().__init__()
        self.quantizer, self.matrix = quantizer, matrix

    def forward(self, x: Tensor) -> Tensor:
        q = self.matrix()
        if q is None:
            return self.quantizer(x)
        rotated, per_head = rotate(x, q), self.quantizer.start.numel() > 1
        with torch.no_grad():
            before = spread(x, per_head)
        follow = spread(rotated, per_head) / before
        return rotate(self.quantizer(rotated / follow) * follow, q.T)


def spread(x: Tensor, per_head: bool) -> Tensor:
    """Power mean of |x|: a smooth stand-in for the maximum. Scalar, or [G, 1, 1] of ``x`` [B, G, S, D]."""
    axes = (0, 2, 3) if per_head else tuple(range(x.dim()))
    x = x.float()
    unit = x.detach().abs().amax().clamp_min(TINY)  # keeps the power finite
    mean = (x / unit).pow(SPREAD_POWER).mean(axes, keepdim=per_head).clamp_min(TINY)  # and its root's gradient
    return (mean[0] if per_head else mean).pow(1.0 / SPREAD_POWER) * unit


class RotatedLinear(nn.Module):
    """A linear whose weight is rounded to nearest in the rotated basis, and turned back.

    ``inner`` turns inputs [in] and ``outer`` outputs [out] of the weight [out, in]. One scale an output channel of
    the rotated weight; the gradient goes through the rounding, not through the scale.
    """

    def __init__(
        self, linear: nn.Linear, bits: int, inner: Callable[[], Tensor | None], outer: Callable[[], Tensor | None]
    ):
        super().__init__()
        self.linear, self.bits, self.inner, self.outer = linear, bits, inner, outer

    def weight(self) -> Tensor:
        inner, outer = self.inner(), self.outer()
        weight = rotate(rotate(self.linear.weight, inner).T, outer).T
        scale = scale_from_max(weight.detach().abs().amax(1, keepdim=True), self.bits) * WEIGHT_FACTORS[self.bits]
        rounded = round_ste((weight / scale).clamp(*code_range(self.bits))) * scale
        back = rotate(rounded, None if inner is None else inner.T)
        return rotate(back.T, None if outer is None else outer.T).T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(), self.linear.bias)


@torch.enable_grad()
def find_rotations(
    decoder: Decoder,
    crops: Tensor,
    ranges: Ranges,
    precision: Precision,
    options: RotationOptions | None = None,
    progress: Callable[[int], None] = lambda done: None,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Tensor], list[float]]:
    """Learn rotations of ``decoder``: fp64 ``R1`` [1, hidden, hidden], ``R2`` [L, D, D], and the loss of each step.

    ``decoder``: norms fused, rotated by the random Hadamards, in floating point, prefix KV set. ``crops`` int64
    [N, S]; ``ranges``: ``layers.N.<site>`` -> maximum, as :func:`pq_export.calib.ranges.collect_ranges` gives
    them. If training diverges, ``note`` says so, the last good rotations are returned and the curve is short.
    Raises :class:`PqExportError` if norms are not fused.
    """
    options, device = options or RotationOptions(), decoder.embed_tokens.weight.device
    _check(decoder, options)
    rotations = Rotations(decoder, options.learn)
    model = twin(decoder)
    _insert(model, rotations, ranges, precision, options)
    scales = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(
        [
            {"params": rotations.parameters(), "lr": options.lr},
            {"params": scales, "lr": options.scale_lr},
        ],
        betas=(0.9, 0.95),  # the second moment must settle within a hundred steps
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(options.steps, floor=0.0))
    guard, keeper, smoothed = DivergenceGuard(), BestKeeper(), math.nan
    losses: list[float] = []
    try:
        for rows in batches(len(crops), options.batch, options.steps, options.seed):
            rotations.refresh()
            loss = _loss(decoder, model, crops[rows].to(device), options.loss)
            value = loss.item()
            guard.check(value)
            smoothed = SMOOTHING * smoothed + (1.0 - SMOOTHING) * value if losses else value
            losses.append(value)
            keeper.offer(smoothed, rotations.parameters())
            optimizer.zero_grad()
            loss.backward()
            if not all(p.grad is None or p.grad.isfinite().all() for p in rotations.parameters()):
                raise Diverged(f"a gradient is not finite at step {len(losses)}")
            optimizer.step()
            schedule.step()
            progress(1)
    except Diverged as diverged:
        keeper.restore()
        note(f"learned rotation stopped: {diverged}; the rotations before that are kept")
    return {name: learned(torch.float64).detach() for name, learned in rotations.learned.items()}, losses


def _check(decoder: Decoder, options: RotationOptions) -> None:
    norms = [norm for layer in decoder.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    if "R1" in options.learn and any((norm.weight != 1).any() for norm in (*norms, decoder.norm)):
        raise PqExportError("R1 needs norms without gains", where="learned rotation", cure="Fuse the norms first.")
    if any(True for _ in quantizers(decoder)):
        raise PqExportError("the decoder is quantized already", where="learned rotation", cure="Learn rotations first.")


def _insert(
    model: Decoder, rotations: Rotations, ranges: Ranges, precision: Precision, options: RotationOptions
) -> None:
    """Put a quantizer of the current rotation at every site of ``model``, and into its weights if asked."""
    bits = {**dict.fromkeys(SITES, precision.activation_bits), **dict.fromkeys(KV_SITES, precision.kv_bits)}
    device = model.embed_tokens.weight.device

    def matrix(name: str | None, layer: int) -> Callable[[], Tensor | None]:
        return lambda: rotations.matrix(name, layer)

    for index, layer in enumerate(model.layers):
        for site, site_bits in bits.items():
            if site_bits == 16:
                continue
            peak = ranges[f"layers.{index}.{site}"].to(device)
            if site in KV_SITES:
                peak = (peak if precision.kv_per_head else peak.max().reshape(1))[:, None, None]
            quantizer = StaticQuantizer(scale_from_max(peak, site_bits) * START_FACTORS[site_bits], site_bits)
            quantizer.to(device).shift.requires_grad_(True)
            set_site_quantizer(layer, site, RotatedQuantizer(quantizer, matrix(ROTATION_OF_SITE.get(site), index)))
        if options.quantize_weights or precision.activation_bits == 16:
            for name, site in SITE_OF_LINEAR.items():
                inner, outer = ROTATION_OF_SITE.get(site), {"o_proj": "R1", "down_proj": "R1", "v_proj": "R2"}
                parent, _, leaf = name.rpartition(".")
                linear: Any = layer.get_submodule(name)
                rotated = RotatedLinear(
                    linear, precision.weight_bits, matrix(inner, index), matrix(outer.get(leaf), index)
                )
                setattr(layer.get_submodule(parent), leaf, rotated)


def _loss(decoder: Decoder, model: Decoder, ids: Tensor, kind: str) -> Tensor:
    with autocast(ids.device):
        hidden = run_layers(model, ids)
        if kind == "ce":
            return next_token_loss(hidden, ids, decoder.logits)
        return kl_divergence(hidden_states(decoder, ids), hidden, decoder.logits, decoder.logits)


@torch.no_grad()
def fold_rotations(decoder: Decoder, matrices: dict[str, Tensor]) -> None:
    """Multiply learned ``matrices`` (of :func:`find_rotations`) into weights and prefix values, in place.

    The prefix's values are rotated along, but are no longer FP16 values: compute the prefix KV again. Raises
    :class:`PqExportError` if the logits change.
    """
    device = decoder.embed_tokens.weight.device
    ids = probe_ids(decoder.config.vocab_size).to(device)
    reference = full_logits(decoder, ids)
    for name, matrix in sorted(matrices.items()):
        q = matrix.to(device)
        error = (q @ q.mT - torch.eye(q.shape[-1], dtype=q.dtype, device=device)).abs().max().item()
        if not error < ORTHOGONALITY_TOLERANCE:
            raise PqExportError(f"the learned {name} is off orthogonal by {error:.3g}: please report this defect")
        if name == "R1":
            fold_r1(decoder, q[0])
        else:
            fold_r2(decoder, q)
            for layer, own in zip(decoder.layers, q, strict=True):
                value = layer.self_attn.prefix_value
                if value is not None:
                    layer.self_attn.prefix_value = (value.double() @ own).to(value.dtype)
        assert_unchanged(full_logits(decoder, ids), reference, f"learned {name}")
