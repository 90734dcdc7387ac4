"""Weight rounding that compensates its own error: GPTQ (Frantar et al., arXiv 2210.17323), refined.

A linear's codes minimise ``‖Y - X̂ Ŵᵀ‖²``, where ``X̂`` is what the linear will really read: the quantized
stream, behind the prefix, after its activation quantizer. The target ``Y`` is what the floating-point
model computes from its own stream (GPTAQ, arXiv 2504.02692; QEP, arXiv 2504.09629), so that a linear also
takes back what the blocks before it lost; ``propagation`` says how far: 0 is plain GPTQ.

After GPTQ's pass, coordinate descent over the columns (QuantEase, arXiv 2309.01885) and a closed-form
refit of each channel's scale lower the same objective further; neither can raise it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.block import BATCH, Block, StagedBlock, get_linear
from pq_export.calib.clip_search import search_weight
from pq_export.calib.cuda_graph import Graphed
from pq_export.calib.fake_quant import site_quantizer
from pq_export.calibration import SITE_OF_LINEAR, SITES
from pq_export.errors import PqExportError
from pq_export.quantizer import code_range

MAX_DAMPING = 1.0  # of the mean diagonal; a Hessian that needs more says nothing


@dataclass(frozen=True)
class GptqOptions:
    """``damping``: added to the Hessian's diagonal, in units of its mean. ``block``: columns that are updated
    at once. ``refine``: rounds of scale refit and coordinate descent. ``propagation``: 0..1, see the module.
    ``samples``: crops for the Hessians (None: all calibration crops).
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    refine: int = 3
    propagation: float = 0.5
    samples: int | None = None

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("damping", self.damping, 0.0, MAX_DAMPING),
            ("propagation", self.propagation, 0.0, 1.0),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be between {least:g} and {most:g}, not {value}")
        for name, count, fewest in (("block", self.block, 1), ("refine", self.refine, 0), ("samples", self.samples, 1)):
            if count is not None and count < fewest:
                raise ValueError(f"{name} must be at least {fewest}, not {count}")


@torch.no_grad()
def gptq_block(block: Block, options: GptqOptions, samples: int) -> None:
    """Round all linears of ``block`` in order of execution, each on the inputs that the earlier ones leave it.

    Activation and KV scales must be there; weight scales start from a search on the same objective.
    """
    quantized = _Walk(block.staged(), block.x[:samples])
    reference = _Walk(block.staged_reference(), block.reference_x[:samples])
    for site in SITES:
        x, x_reference = quantized.input_of(site), reference.input_of(site)
        residual = reference.stream - quantized.stream if site in ("self_attn.o_input", "mlp.down_input") else None
        gram, cross, lost = _statistics(x, x_reference, residual, site_quantizer(block.layer, site))
        names = [name for name, of in SITE_OF_LINEAR.items() if of == site]
        for bits in sorted({block.bits.weight[name] for name in names}):
            together = [name for name in names if block.bits.weight[name] == bits]
            weight = torch.cat([get_linear(block.reference, name).weight for name in together])
            target = _target(weight, gram, cross, lost, options)
            scale, _ = search_weight(target, gram, bits)
            codes, scale = round_weight(target, scale, gram, bits, options)
            sizes = [len(get_linear(block.reference, name).weight) for name in together]
            for name, own_codes, own_scale in zip(together, codes.split(sizes), scale.split(sizes), strict=True):
                block.set_weight(name, own_scale, own_codes)
        quantized.advance(site)
        reference.advance(site)


class _Walk:
    """One stream on its way through a block, from site to site."""

    def __init__(self, staged: StagedBlock, x: Tensor):
        self.staged, self.stream, self.inputs = staged, x, x

    def input_of(self, site: str) -> Tensor:
        """What the site's quantizer reads [N, S, in]."""
        layer = self.staged.layer
        if site == "self_attn.qkv_input":
            self.inputs = layer.input_layernorm(self.stream)
        elif site == "mlp.gate_up_input":
            self.inputs = layer.post_attention_layernorm(self.stream)
        return self.inputs

    def advance(self, site: str) -> None:
        """Pass the linears of ``site``."""
        if site == "self_attn.qkv_input":
            self.inputs = self.staged.context(self.stream)
        elif site == "self_attn.o_input":
            self.stream = self.staged.residual(self.stream, self.inputs)
        elif site == "mlp.gate_up_input":
            self.inputs = self.staged.inner(self.stream)


def _statistics(
    x: Tensor, reference: Tensor, residual: Tensor | None, quantizer: torch.nn.Module
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``X̂ᵀX̂`` [in, in], ``XᵀX̂`` [in, in] and ``RᵀX̂`` [out, in], in fp32 sums of batches added in fp64."""
    size = x.shape[-1]
    gram = x.new_zeros(size, size, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    lost = None if residual is None else x.new_zeros(residual.shape[-1], size, dtype=torch.float64)
    for start in range(0, len(x), BATCH):
        part = slice(start, start + BATCH)
        flat = quantizer(x[part]).flatten(0, -2)
        gram += flat.T @ flat
        cross += reference[part].flatten(0, -2).T @ flat
        if lost is not None and residual is not None:
            lost += residual[part].flatten(0, -2).T @ flat
    return gram.float(), cross.float(), None if lost is None else lost.float()


def _target(weight: Tensor, gram: Tensor, cross: Tensor, lost: Tensor | None, options: GptqOptions) -> Tensor:
    """The floating-point weight that comes closest to the reference output on the quantized inputs.

    Ridge regression towards the original weight: ``W' = (W·C + R + λW)(G + λI)⁻¹``, then ``propagation`` of
    the way from W to W'.
    """
    if options.propagation == 0.0:
        return weight
    w, damp = weight.double(), options.damping * gram.diagonal().double().mean()
    # W' - W = (W (C - G) + R)(G + λI)⁻¹
    right = w @ (cross.double() - gram.double())
    if lost is not None:
        right = right + lost.double()
    factor = _cholesky(gram, damp)
    change = torch.cholesky_solve(right.T, factor).T
    return (w + options.propagation * change).to(weight.dtype)


def _cholesky(gram: Tensor, damp: Tensor) -> Tensor:
    """Lower Cholesky factor of ``gram + damp·I`` in fp64; the damping grows until there is one."""
    g, mean = gram.double(), gram.diagonal().double().mean().clamp_min(1e-30)
    damp = torch.maximum(damp, 1e-8 * mean)
    identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
    while torch.isfinite(mean) and damp <= MAX_DAMPING * mean:
        factor, info = torch.linalg.cholesky_ex(g + damp * identity)
        if info.item() == 0:
            return factor
        damp = damp * 10
    raise PqExportError(
        "has a Hessian that no damping makes positive definite: its calibration inputs are not finite or all zero",
        where="gptq",
        cure="Use other calibration text (--calib-data).",
    )


def round_weight(weight: Tensor, scale: Tensor, gram: Tensor, bits: int, options: GptqOptions) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and scale [out] that make ``(W - Ŵ) G (W - Ŵ)ᵀ`` small for each row.

    ``weight`` [out, in]; ``scale`` [out]; ``gram`` [in, in]. Starts from GPTQ, goes on with coordinate descent.
    """
    codes = gptq(weight, scale, gram, bits, options)
    for _ in range(options.refine):
        scale = refit_scale(weight, codes, scale, gram)
        codes = coordinate_descent(weight, codes, scale, gram, bits, options.block)
    return codes, scale


def gptq(weight: Tensor, scale: Tensor, gram: Tensor, bits: int, options: GptqOptions) -> Tensor:
    """GPTQ's codes [out, in] for fixed per-channel scales (algorithm 1; act-order: largest diagonal first)."""
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if options.act_order else None
    w, g = (weight, gram) if order is None else (weight[:, order], gram[order][:, order])
    factor = _cholesky(g, options.damping * g.diagonal().double().mean())
    # Rows of the upper Cholesky factor of the inverse Hessian say how a column's error spreads.
    spread = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).to(weight.dtype)
    w, codes, size = w.clone(), torch.empty_like(weight), w.shape[1]
    for start in range(0, size, options.block):
        stop = min(start + options.block, size)
        own = spread[start:stop, start:stop]
        codes[:, start:stop], errors = _ROUND_COLUMNS[bits](w[:, start:stop], scale, own)
        w[:, stop:] -= errors @ spread[start:stop, stop:]
    if order is None:
        return codes
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored


def _round_columns(weight: Tensor, scale: Tensor, spread: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes of a block of columns [out, n], each after the errors of those before it, and what is left of them."""
    low, high = code_range(bits)
    part, codes, errors = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        column = part[:, i]
        codes[:, i] = code = torch.round(column / scale).clamp_(low, high)
        errors[:, i] = error = (column - code * scale) / spread[i, i]
        part[:, i:] -= error[:, None] * spread[i, i:]
    return codes, errors


def refit_scale(weight: Tensor, codes: Tensor, scale: Tensor, gram: Tensor) -> Tensor:
    """The scale [out] that is best for the codes: ``(w G qᵀ) / (q G qᵀ)``; the old one where that is not positive."""
    product = codes @ gram
    best = (product * weight).sum(1) / (product * codes).sum(1)
    return torch.where(torch.isfinite(best) & (best > 0), best, scale)


def coordinate_descent(weight: Tensor, codes: Tensor, scale: Tensor, gram: Tensor, bits: int, block: int) -> Tensor:
    """One sweep: each column in turn takes the codes that are best given all others."""
    codes, size = codes.clone(), weight.shape[1]
    diagonal = gram.diagonal()
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)  # a dead input: its slope is 0
    slope = (weight - codes * scale[:, None]) @ gram  # [out, in]: minus half the gradient
    for start in range(0, size, block):
        stop = min(start + block, size)
        codes[:, start:stop], moved = _DESCEND_COLUMNS[bits](
            codes[:, start:stop], slope[:, start:stop], scale, gram[start:stop, start:stop], diagonal[start:stop]
        )
        slope -= moved @ gram[start:stop]
    return codes


def _descend_columns(
    codes: Tensor, slope: Tensor, scale: Tensor, gram: Tensor, diagonal: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """New codes of a block of columns [out, n] and by how much their values moved."""
    low, high = code_range(bits)
    codes, slope, moved = codes.clone(), slope.clone(), torch.empty_like(slope)
    for i in range(codes.shape[1]):
        new = torch.round(codes[:, i] + slope[:, i] / (diagonal[i] * scale)).clamp_(low, high)
        moved[:, i] = change = (new - codes[:, i]) * scale
        slope -= change[:, None] * gram[i]
        codes[:, i] = new
    return codes, moved


_ROUND_COLUMNS = {bits: Graphed(functools.partial(_round_columns, bits=bits)) for bits in (4, 8)}
_DESCEND_COLUMNS = {bits: Graphed(functools.partial(_descend_columns, bits=bits)) for bits in (4, 8)}
