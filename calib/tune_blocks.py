"""Block-wise fine-tuning (PrefixQuant, section 5.3; EfficientQAT's Block-AP, arXiv 2407.11062).

Weights, scales and norm gains of a block are trained until its output on the quantized stream is close to
what the floating-point block makes of the floating-point stream. With ``window`` > 1 the last blocks are
trained together, overlapping, so that one can undo what another loses (CBQ, arXiv 2312.07950).

Unlike the published code it keeps the epoch with the best validation loss, clips gradients, and starts from
the codes that rounding chose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.block import Block, StagedBlock
from pq_export.calib.fit import FitOptions, Split, fit
from pq_export.calib.trainable_layer import make_trainable, settle
from pq_export.calib.training import Note, autocast, check_positive

HELD_OUT = 8  # one crop in so many judges


@dataclass(frozen=True)
class TuneBlocksOptions(FitOptions):  # type: ignore[misc]  # mypy cannot follow package-dir
    """``epochs`` over the crops, judged after each; ``window``: blocks trained together. Else :class:`FitOptions`."""

    epochs: int = 10
    window: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "epochs", "window")


def tune_blocks(
    blocks: list[Block], options: TuneBlocksOptions, seed: int, note: Note, warn: Note | None = None
) -> None:
    """Train ``blocks``, consecutive ones, against the floating-point output of the last, and settle them.

    A loss that diverges ends training early: the best state so far stays.
    """
    first, last = blocks[0], blocks[-1]
    name = f"layers {first.index}..{last.index}"
    x, target = first.x[: options.samples], last.reference_y[: options.samples]
    trainable = make_trainable((b.layer, b.reference, b.found, b.bits) for b in blocks)
    staged = [b.staged() for b in blocks]
    lowest = min(bits for b in blocks for bits in b.bits.activation.values())
    size = target.square().mean()

    def loss_of(rows: Tensor) -> Tensor:
        with autocast(x.device, lowest):
            y = _run(staged, x[rows])
        return (y.float() - target[rows]).square().mean() / size

    split = Split.of(len(x), HELD_OUT)
    epoch = -(-split.training // min(options.batch, split.training))
    history = fit(
        trainable,
        options,
        loss_of,
        split,
        x.device,
        steps=options.epochs * epoch,
        every=epoch,
        seed=seed,
        note=lambda text: (warn or note)(f"{name}: {text}"),
    )
    for block in blocks:
        settle(block.layer, block.reference, block.found, block.bits)
    note(f"{name}: validation error {history[0]:.3g} -> {min(history):.3g}")
    with torch.no_grad():
        for earlier, later in itertools.pairwise(blocks):
            later.x = earlier.staged().run(earlier.x)


def _run(staged: list[StagedBlock], x: Tensor) -> Tensor:
    for block in staged:
        x = block.run(x)
    return x
