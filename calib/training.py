"""What every step that learns by gradient shares: batches, a forward pass with gradients, losses, guards.

Logits of a large vocabulary are never held whole: losses go over the tokens in chunks and recompute each
chunk's logits in the backward pass. Layers are recomputed likewise (Chen et al., arXiv 1604.06174), so a
step needs the activations of one layer and the streams between layers.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from pq_export.decoder import Decoder, KVPair

Head = Callable[[Tensor], Tensor]  # hidden states [N, hidden] -> logits [N, vocab]
RunLayer = Callable[[int, Tensor, KVPair, Tensor], Tensor]  # layer index, x, rope, mask -> the layer's output

Note = Callable[[str], None]  # a line for the user

RISE_LIMIT = 4.0  # a loss this many times the first one ...
RISE_PATIENCE = 5  # ... for this many steps in a row means that training has diverged


def batches(count: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Indices int64 [min(batch, count)] of each of ``steps`` batches out of ``count`` crops.

    Crops come in shuffled epochs, which a batch may straddle. Drawn on the CPU, so every device trains on the
    same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, queue = min(batch, count), torch.zeros(0, dtype=torch.int64)
    for _ in range(steps):
        if len(queue) < batch:
            queue = torch.cat((queue, torch.randperm(count, generator=generator)))
        yield queue[:batch]
        queue = queue[batch:]


def cosine(steps: int, floor: float = 0.1, warm_up: int = 0) -> Callable[[int], float]:
    """Factor on the learning rate at a step, from 1 to ``floor`` after ``warm_up`` rising steps: for ``LambdaLR``."""

    def factor(step: int) -> float:
        falling = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(step / max(steps, 1), 1.0)))
        return falling * min(1.0, (step + 1) / (warm_up + 1))

    return factor


def autocast(device: torch.device, bits: int = 4) -> AbstractContextManager[object]:
    """bf16 products on a GPU; nothing on a CPU, where bf16 is slower than fp32.

    ``bits``: fewest of the activations. Steps of 8 bits are as fine as what bf16 resolves: fp32 then (TF32 under
    :func:`tf32`).
    """
    if device.type != "cuda" or 8 <= bits < 16:
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16)


@contextlib.contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """fp32 products on a GPU in TF32: ten bits of mantissa, three more than bf16, at several times fp32's speed."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def twin(decoder: Decoder) -> Decoder:
    """A decoder with modules of its own over the same tensors: quantizers in one leave the other as it was."""
    shared = (*decoder.parameters(), *decoder.buffers())
    return copy.deepcopy(decoder, {id(tensor): tensor for tensor in shared})


def run_layers(
    decoder: Decoder,
    ids: Tensor,
    checkpoint: bool = True,
    *,
    hidden: Tensor | None = None,
    run: RunLayer | None = None,
) -> Tensor:
    """Hidden states [B, S, hidden] behind the last layer of ``ids`` [B, S], with gradients.

    Like :func:`pq_export.calib.outliers.hidden_states`: empty cache, no final norm, no lm_head.
    ``checkpoint`` recomputes each layer in the backward pass instead of keeping its activations.
    ``hidden`` replaces the embeddings and ``run`` the call of a layer.
    """
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    rope, mask = decoder.context(positions, torch.ones_like(ids), 0)
    past = decoder.empty_past(len(ids))

    def plain(index: int, x: Tensor, rope: KVPair, mask: Tensor) -> Tensor:
        return decoder.layers[index](x, rope, mask, past[index])[0]

    run = run or plain
    hidden = decoder.embed(ids) if hidden is None else hidden
    for index in range(len(decoder.layers)):
        if checkpoint and torch.is_grad_enabled():
            hidden = recompute(run, index, hidden, rope, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = run(index, hidden, rope, mask)
    return hidden


def kl_divergence(
    reference_hidden: Tensor, hidden: Tensor, reference_head: Head, head: Head, chunk: int = 2048
) -> Tensor:
    """KL(reference || model) in nats, mean over tokens: scalar fp32.

    ``reference_hidden`` and ``hidden`` [..., hidden] precede the final norm; the heads are that norm and
    lm_head. No gradient reaches the reference. Logits are fp32 even under autocast: rounded to bf16 their
    error would be as large as an 8-bit model's.
    """

    def total(expected: Tensor, actual: Tensor) -> Tensor:
        with torch.autocast(actual.device.type, enabled=False):
            with torch.no_grad():
                target = reference_head(expected.float()).log_softmax(-1)
            return F.kl_div(head(actual.float()).log_softmax(-1), target, reduction="sum", log_target=True)

    return _mean_over_rows(total, chunk, reference_hidden.flatten(0, -2), hidden.flatten(0, -2))


def next_token_loss(hidden: Tensor, ids: Tensor, head: Head, chunk: int = 2048) -> Tensor:
    """Cross entropy in nats of each next token of ``ids`` [B, S] given ``hidden`` [B, S, hidden]: scalar fp32."""

    def total(rows: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return F.cross_entropy(head(rows.float()), targets, reduction="sum")

    return _mean_over_rows(total, chunk, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _mean_over_rows(total: Callable[[Tensor, Tensor], Tensor], chunk: int, first: Tensor, second: Tensor) -> Tensor:
    """``total`` of all rows over their number, in chunks whose insides are recomputed in the backward pass."""
    loss = torch.zeros((), device=first.device)
    for a, b in zip(first.split(chunk), second.split(chunk), strict=True):
        if torch.is_grad_enabled():
            loss = loss + recompute(total, a, b, use_reentrant=False, preserve_rng_state=False)
        else:
            loss = loss + total(a, b)
    return loss / len(first)


class BestKeeper:
    """Remembers the parameters that had the smallest loss."""

    def __init__(self) -> None:
        self.loss = math.inf
        self._best: list[tuple[Tensor, Tensor]] = []

    def offer(self, loss: float, parameters: Iterable[Tensor]) -> bool:
        """Keep copies of ``parameters`` if ``loss`` is the smallest so far (NaN never is); says whether."""
        if not loss < self.loss:
            return False
        self.loss = loss
        if self._best:  # the same parameters every time: copied in place, so that memory does not double
            for parameter, value in self._best:
                value.copy_(parameter.detach())
        else:
            self._best = [(parameter, parameter.detach().clone()) for parameter in parameters]
        return True

    @torch.no_grad()
    def restore(self) -> None:
        """Write the best values back into the parameters they were copied from; nothing if there are none."""
        for parameter, value in self._best:
            parameter.copy_(value)


class Diverged(Exception):
    """Training went wrong; the message says how. Its caller keeps the best so far and goes on."""


class DivergenceGuard:
    """Raises :class:`Diverged` once a loss is not finite, or stays far above the first for several steps."""

    def __init__(self, limit: float = RISE_LIMIT, patience: int = RISE_PATIENCE):
        self.limit, self.patience = limit, patience
        self.first: float | None = None
        self._steps = self._high = 0

    def check(self, loss: float) -> None:
        self._steps += 1
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {self._steps}")
        self.first = loss if self.first is None else self.first
        self._high = self._high + 1 if loss > self.limit * self.first else 0
        if self._high >= self.patience:
            raise Diverged(
                f"the loss {loss:.3g} at step {self._steps} is over {self.limit:g} times the first, {self.first:.3g}"
            )


def check_positive(options: object, *names: str) -> None:
    """Raise ValueError for an option that is not at least 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(options, name)}")


def check_rates(options: object, *names: str) -> None:
    """Raise ValueError for a learning rate that is negative or not finite, or where all are 0."""
    rates = {name: getattr(options, name) for name in names}
    for name, rate in rates.items():
        if not 0.0 <= rate < math.inf:
            raise ValueError(f"{name} must be 0 or a positive number, not {rate}")
    if not any(rates.values()):
        raise ValueError(f"{', '.join(names)}: all are 0, so that nothing is learned")
