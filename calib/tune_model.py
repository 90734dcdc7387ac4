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

from pq_export.calib.fit import FitOptions, Split, fit
from pq_export.calib.run import Run
from pq_export.calib.trainable_layer import make_trainable, settle
from pq_export.calib.training import autocast, check_positive, kl_divergence, run_layers, tf32
from pq_export.decoder import Decoder

HELD_OUT = 16  # one crop in so many judges
VALIDATIONS = 10  # times that they do
WARM_UP = 20  # one step in so many raises the learning rates


@dataclass(frozen=True)
class TuneModelOptions(FitOptions):  # type: ignore[misc]  # mypy cannot follow package-dir
    """``steps`` updates of ``batch`` crops. ``checkpoint`` recomputes activations in the backward pass: a third more
    time and a fraction of the memory. The rest: :class:`FitOptions`.
    """

    samples: int = 512
    batch: int = 16
    scale_lr: float = 2e-3
    norm_lr: float = 2e-3
    steps: int = 400
    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "steps")


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
    layers = [
        (layer, original, found, run.bits(index))
        for index, (layer, original, found) in enumerate(zip(decoder.layers, reference.layers, run.layers, strict=True))
    ]
    trainable = make_trainable(layers)
    lowest = min(bits for *_, own in layers for bits in own.activation.values())

    def loss_of(rows: Tensor) -> Tensor:
        with autocast(ids.device, lowest):
            actual = run_layers(decoder, ids[rows], options.checkpoint)
        return kl_divergence(expected[rows], actual, reference.logits, decoder.logits)

    history = fit(
        trainable,
        options,
        loss_of,
        Split.of(len(ids), HELD_OUT),
        ids.device,
        steps=options.steps,
        every=max(1, options.steps // VALIDATIONS),
        seed=run.plan.seed,
        warm_up=options.steps // WARM_UP,
        note=lambda text: run.stages.progress.warn(f"end-to-end tuning: {text}"),
        progress=advance,
    )
    for layer in layers:
        settle(*layer)
    return history
