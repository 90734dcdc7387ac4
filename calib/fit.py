"""The training loop of the fine-tuning steps: best validation kept, gradients clipped, divergence noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.trainable_layer import Trainable
from pq_export.calib.training import (
    BestKeeper,
    Diverged,
    DivergenceGuard,
    batches,
    check_positive,
    check_rates,
    cosine,
)

LossOf = Callable[[Tensor], Tensor]  # rows int64 [n] of the crops -> mean loss, scalar
PATIENCE = 2  # validations in a row that may be far above the first


@dataclass(frozen=True)
class FitOptions:
    """What every fine-tuning step can be told; ``samples`` crops, some of them held out.

    Learning rates are dimensionless: ``weight_lr`` in quantization steps an update, ``scale_lr`` and ``norm_lr``
    relative; a kind whose rate is 0 is frozen. ``grad_clip``: largest norm of the gradient.
    """

    samples: int = 128
    batch: int = 8
    weight_lr: float = 2e-3
    scale_lr: float = 1e-3
    norm_lr: float = 1e-3
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "samples", "batch")
        check_rates(self, "weight_lr", "scale_lr", "norm_lr")
        if not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip must be positive, not {self.grad_clip}")


@dataclass(frozen=True)
class Split:
    """The first ``training`` crops train, the others judge; a single crop does both."""

    training: int
    total: int

    @classmethod
    def of(cls, total: int, share: int) -> Split:
        """Hold one crop in ``share`` out, and at least one."""
        return cls(total - max(1, total // share) if total > 1 else total, total)

    def judging(self, device: torch.device) -> Tensor:
        """Rows of the crops that judge."""
        return torch.arange(self.training if self.training < self.total else 0, self.total, device=device)


def fit(
    trainable: Trainable,
    options: FitOptions,
    loss_of: LossOf,
    split: Split,
    device: torch.device,
    *,
    steps: int,
    every: int,
    seed: int,
    warm_up: int = 0,
    note: Callable[[str], None],
    progress: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Train for ``steps`` updates, judge each ``every``; the parameters end in the best state that was judged.

    Returns the validation losses, the first of before training. A loss that diverges ends training early, and
    ``note`` says so.
    """
    optimizer = trainable.optimizer(options.weight_lr, options.scale_lr, options.norm_lr, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, warm_up=warm_up))
    judging = split.judging(device)

    @torch.no_grad()
    def validation() -> float:
        losses = [loss_of(part) * len(part) for part in judging.split(options.batch)]
        return (torch.stack(losses).sum() / len(judging)).item()

    best, guard = BestKeeper(), DivergenceGuard(patience=PATIENCE)
    history = [validation()]
    best.offer(history[0], trainable.all())
    try:
        guard.check(history[0])  # a rise is measured from here
        with torch.enable_grad():
            for step, rows in enumerate(batches(split.training, options.batch, steps, seed), 1):
                loss = loss_of(rows.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable.all(), options.grad_clip)
                optimizer.step()
                schedule.step()
                if step % every == 0 or step == steps:
                    history.append(validation())
                    guard.check(history[-1])
                    best.offer(history[-1], trainable.all())
                progress(1)
    except Diverged as reason:
        note(f"{reason}; the best state so far is kept")
    best.restore()
    return history
