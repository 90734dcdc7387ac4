"""Block-wise fine-tuning (PrefixQuant, section 5.3; EfficientQAT's Block-AP, arXiv 2407.11062).

Weights, scales and norm gains of a block are trained until its output on the quantized stream is close to
what the floating-point block makes of the floating-point stream. With ``window`` > 1 the last blocks are
trained together, overlapping, so that one can undo what another loses (CBQ, arXiv 2312.07950).

Unlike the published code it keeps the epoch with the best validation loss, clips gradients, and starts from
the codes that rounding chose.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.block import BATCH, Block, StagedBlock
from pq_export.calib.trainable_layer import make_trainable, settle
from pq_export.calib.training import (
    BestKeeper,
    Diverged,
    DivergenceGuard,
    autocast,
    batches,
    check_positive,
    check_rates,
    cosine,
)


@dataclass(frozen=True)
class TuneBlocksOptions:
    """``samples`` crops, an eighth of them for validation; ``window``: blocks trained together.

    Learning rates are dimensionless: ``weight_lr`` in quantization steps an update, ``scale_lr`` and ``norm_lr``
    relative. ``grad_clip``: largest norm of the gradient of the normalised loss.
    """

    samples: int = 128
    epochs: int = 10
    batch: int = 8
    window: int = 1
    weight_lr: float = 2e-3
    scale_lr: float = 1e-3
    norm_lr: float = 1e-3
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "samples", "epochs", "batch", "window")
        check_rates(self, "weight_lr", "scale_lr", "norm_lr")
        if not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip must be positive, not {self.grad_clip}")


def tune_blocks(blocks: list[Block], options: TuneBlocksOptions, seed: int, note: Callable[[str], None]) -> None:
    """Train ``blocks``, consecutive ones, against the floating-point output of the last, and settle them.

    A loss that diverges ends training early: the best state so far stays.
    """
    first, last = blocks[0], blocks[-1]
    x, target = first.x[: options.samples], last.reference_y[: options.samples]
    held_out = max(1, len(x) // 8) if len(x) > 1 else 0
    trainable = make_trainable((b.layer, b.reference, b.found, b.bits) for b in blocks)
    optimizer = trainable.optimizer(options.weight_lr, options.scale_lr, options.norm_lr, fused=x.device.type == "cuda")
    count = len(x) - held_out
    steps = options.epochs * -(-count // min(options.batch, count))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
    staged = [b.staged() for b in blocks]
    lowest = min(bits for b in blocks for bits in b.bits.activation.values())
    size = target.square().mean()

    def loss_of(rows: Tensor | slice) -> Tensor:
        with autocast(x.device, lowest):
            y = _run(staged, x[rows])
        return (y.float() - target[rows]).square().mean() / size

    @torch.no_grad()
    def validation() -> float:
        if not held_out:
            return loss_of(slice(None)).item()
        parts = range(count, len(x), BATCH)
        losses = [loss_of(slice(s, s + BATCH)) * len(x[s : s + BATCH]) for s in parts]
        return (torch.stack(losses).sum() / held_out).item()

    best, guard = BestKeeper(), DivergenceGuard(patience=2)
    before = validation()
    best.offer(before, trainable.all())
    try:
        guard.check(before)  # a rise is measured from here, not from the first epoch's end
        with torch.enable_grad():
            for step, rows in enumerate(batches(count, options.batch, steps, seed)):
                loss = loss_of(rows.to(x.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable.all(), options.grad_clip)
                optimizer.step()
                schedule.step()
                if (step + 1) % (steps // options.epochs) == 0:
                    current = validation()
                    guard.check(current)
                    best.offer(current, trainable.all())
    except Diverged as reason:
        note(f"layers {first.index}..{last.index}: {reason}; the best state so far is kept")
    best.restore()
    for block in blocks:
        settle(block.layer, block.reference, block.found, block.bits)
    note(f"layers {first.index}..{last.index}: validation error {before:.3g} -> {best.loss:.3g}")
    with torch.no_grad():
        for earlier, later in itertools.pairwise(blocks):
            later.x = earlier.staged().run(earlier.x)


def _run(staged: list[StagedBlock], x: Tensor) -> Tensor:
    for block in staged:
        x = block.run(x)
    return x
