"""End-to-end tuning of the quantized model against the floating-point one (EfficientQAT's E2E-QP, arXiv
2407.11062, with LLM-QAT's distillation, arXiv 2305.17888).

All weights under their quantizers, scales and norm gains are trained to lower KL(floating point ‖ quantized)
of the next-token distributions; the text is only a carrier, its tokens are no targets. ``weight_lr: 0`` trains
scales and gains only, which is E2E-QP and needs little memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.run import Run
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
    kl_divergence,
    run_layers,
    tf32,
)
from pq_export.decoder import Decoder

VALIDATIONS = 10  # times that the held-out crops are judged


@dataclass(frozen=True)
class TuneModelOptions:
    """``samples`` crops, a sixteenth of them for validation; ``steps`` updates of ``batch`` crops.

    Learning rates as in tune_blocks. ``checkpoint`` recomputes activations in the backward pass: a third more time
    and a fraction of the memory.
    """

    samples: int = 512
    steps: int = 1000
    batch: int = 16
    weight_lr: float = 1e-3
    scale_lr: float = 1e-3
    norm_lr: float = 1e-3
    grad_clip: float = 1.0
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_positive(self, "samples", "steps", "batch")
        check_rates(self, "weight_lr", "scale_lr", "norm_lr")
        if not self.grad_clip > 0.0:
            raise ValueError(f"grad_clip must be positive, not {self.grad_clip}")


def tune_model(run: Run, options: TuneModelOptions) -> None:
    """Train ``run.decoder``, quantized in place, against ``run.reference``, and settle it."""
    decoder, reference = run.decoder, run.reference
    assert reference is not None
    with run.stages.stage("tune model", options.steps) as advance, tf32(run.device):
        history = _train(run, decoder, reference, options, advance)
    run.statistics["tune_model"] = {"validation_kl": history}


def _train(
    run: Run, decoder: Decoder, reference: Decoder, options: TuneModelOptions, advance: Callable[..., None]
) -> list[float]:
    """Validation losses, the first before training; the decoder is settled in its best state."""
    ids = run.crops[: options.samples].to(run.device)
    # The teacher sees the same crops in every epoch: its hidden states are computed once.
    expected = torch.cat([run_layers(reference, part) for part in ids.split(options.batch)])
    held_out = max(1, len(ids) // 16) if len(ids) > 1 else 0
    count = len(ids) - held_out
    trainable = make_trainable(
        (layer, original, found, run.bits(index))
        for index, (layer, original, found) in enumerate(zip(decoder.layers, reference.layers, run.layers, strict=True))
    )
    optimizer = trainable.optimizer(
        options.weight_lr, options.scale_lr, options.norm_lr, fused=ids.device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(options.steps, warm_up=options.steps // 20))
    lowest = min(bits for index in range(len(run.layers)) for bits in run.bits(index).activation.values())

    def loss_of(rows: Tensor) -> Tensor:
        with autocast(ids.device, lowest):
            actual = run_layers(decoder, ids[rows], options.checkpoint)
        return kl_divergence(expected[rows], actual, reference.logits, decoder.logits)

    @torch.no_grad()
    def validation() -> float:
        judged = torch.arange(count if held_out else 0, len(ids), device=ids.device)
        losses = [loss_of(part) * len(part) for part in judged.split(options.batch)]
        return (torch.stack(losses).sum() / len(judged)).item()

    best, guard = BestKeeper(), DivergenceGuard(patience=2)
    history = [validation()]
    best.offer(history[0], trainable.all())
    every = max(1, options.steps // VALIDATIONS)
    try:
        guard.check(history[0])  # a rise is measured from here
        with torch.enable_grad():
            for step, rows in enumerate(batches(count, options.batch, options.steps, run.plan.seed)):
                loss = loss_of(rows.to(ids.device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable.all(), options.grad_clip)
                optimizer.step()
                schedule.step()
                if (step + 1) % every == 0 or step + 1 == options.steps:
                    history.append(validation())
                    guard.check(history[-1])
                    best.offer(history[-1], trainable.all())
                advance(1)
    except Diverged as reason:
        run.stages.progress.note(f"end-to-end tuning: {reason}; the best state so far is kept")
    best.restore()
    for index, (layer, original, found) in enumerate(zip(decoder.layers, reference.layers, run.layers, strict=True)):
        settle(layer, original, found, run.bits(index))
    return history
