"""Learned rounding: whether each weight goes up or down, decided by gradient on the block's output.

AdaRound (Nagel et al., arXiv 2004.10568) with BRECQ's block-wise loss (Li et al., arXiv 2102.05426); CBQ
(arXiv 2312.07950) does the same over windows of blocks. ``Ŵ = (⌊W/s⌋ + h(V)) · s`` with the rectified sigmoid
``h``, which a penalty drives to 0 or 1. Scales stay; the start is what rounding chose before (GPTQ's codes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pq_export.calib.block import Block, get_linear
from pq_export.calib.fake_quant import CELL_MARGIN
from pq_export.calib.training import Diverged, DivergenceGuard, Note, autocast, batches, check_positive, check_rates
from pq_export.calibration import SITE_OF_LINEAR
from pq_export.quantizer import code_range

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # AdaRound's ζ and γ: the sigmoid reaches 0 and 1
WARM_UP = 0.2  # share of the steps before the penalty acts
SHARPNESS = (20.0, 2.0)  # AdaRound's β, from the first penalised step to the last


@dataclass(frozen=True)
class LearnedRoundingOptions:
    """``samples`` crops; ``lr`` of the rounding variables; ``penalty``: weight of the rounding term beside the
    normalised output error.
    """

    samples: int = 128
    steps: int = 400
    batch: int = 8
    lr: float = 1e-2
    penalty: float = 1e-2

    def __post_init__(self) -> None:
        check_positive(self, "samples", "steps", "batch")
        check_rates(self, "lr")
        if not 0.0 <= self.penalty < math.inf:
            raise ValueError(f"penalty must be 0 or a positive number, not {self.penalty}")


class SoftRoundedLinear(nn.Module):
    """A linear whose weight lies between two codes: ``(floor + h(V)) · scale``."""

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int):
        """weight [out, in] in floating point; codes [out, in]; scale [out]; bias [out]."""
        super().__init__()
        self.bits, self.scale, self.bias = bits, scale, bias
        codes, margin = codes.to(scale.dtype), 0.5 - CELL_MARGIN
        steps = torch.maximum(torch.minimum(weight / scale[:, None], codes + margin), codes - margin)
        self.floor = steps.floor()
        share = (steps - self.floor - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.variable = nn.Parameter(torch.logit(share))

    def share(self) -> Tensor:
        """h(V) in [0, 1]."""
        return (torch.sigmoid(self.variable) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0.0, 1.0)

    def codes(self) -> Tensor:
        """The decision: integers [out, in] as floats."""
        return (self.floor + (self.share() >= 0.5)).clamp(*code_range(self.bits))

    def penalty(self, sharpness: float) -> Tensor:
        """Mean of ``1 - |2h - 1|^β``: 0 where all is decided."""
        return (1.0 - (2.0 * self.share() - 1.0).abs().pow(sharpness)).mean()

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.floor + self.share()).clamp(*code_range(self.bits)) * self.scale[:, None]
        return F.linear(x, weight, self.bias)


def learned_rounding(
    block: Block, options: LearnedRoundingOptions, seed: int, note: Note, warn: Note | None = None
) -> None:
    """Learn the codes of all linears of ``block`` together and set them.

    The old codes stay if the learned ones are not better on the block's output over the same crops, or if training
    diverges.
    """
    x, target = block.x[: options.samples], block.reference_y[: options.samples]
    before = {name: block.found.codes[name].clone() for name in SITE_OF_LINEAR}
    error_before = _error(block, x, target)
    soft = {
        name: SoftRoundedLinear(
            get_linear(block.reference, name).weight.detach(),
            codes,
            block.found.weight[name],
            get_linear(block.layer, name).bias,
            block.bits.weight[name],
        )
        for name, codes in before.items()
    }
    plain = {name: get_linear(block.layer, name) for name in soft}
    _place(block, soft)
    try:
        with torch.enable_grad():
            _train(block, soft, x, target, options, seed)
        learned = {name: linear.codes().detach() for name, linear in soft.items()}
    except Diverged as reason:
        (warn or note)(f"layer {block.index}: learned rounding: {reason}; the codes stay as they were")
        learned = before
    _place(block, plain)
    for name, codes in learned.items():
        block.set_weight(name, block.found.weight[name], codes)
    error = _error(block, x, target)
    if error > error_before:
        for name, codes in before.items():
            block.set_weight(name, block.found.weight[name], codes)
        error = error_before
    note(f"layer {block.index}: learned rounding: output error {error_before:.3g} -> {error:.3g}")


def _train(
    block: Block,
    soft: dict[str, SoftRoundedLinear],
    x: Tensor,
    target: Tensor,
    options: LearnedRoundingOptions,
    seed: int,
) -> None:
    optimizer = torch.optim.Adam([linear.variable for linear in soft.values()], lr=options.lr)
    staged, size, guard = block.staged(), target.square().mean(), DivergenceGuard()
    warm_up = int(WARM_UP * options.steps)
    for step, rows in enumerate(batches(len(x), options.batch, options.steps, seed)):
        picked = rows.to(x.device)
        with autocast(x.device, min(block.bits.activation.values())):
            y = staged.run(x[picked])
        error = (y.float() - target[picked]).square().mean() / size
        loss = error
        if step >= warm_up:
            progress = (step - warm_up) / max(1, options.steps - warm_up - 1)
            sharpness = SHARPNESS[0] + (SHARPNESS[1] - SHARPNESS[0]) * progress
            rounding = torch.stack([linear.penalty(sharpness) for linear in soft.values()]).mean()
            loss = error + options.penalty * rounding
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step + 1 == options.steps:  # reading a loss waits for the device
            guard.check(error.item())


def _place(block: Block, linears: dict[str, SoftRoundedLinear] | dict[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        parent, _, leaf = name.rpartition(".")
        setattr(block.layer.get_submodule(parent), leaf, linear)


@torch.no_grad()
def _error(block: Block, x: Tensor, target: Tensor) -> float:
    return ((block.staged().run(x) - target).square().mean() / target.square().mean()).item()
