"""Prefix tuning: the keys and values of the prefix, trained so that the quantized decoder follows the original.

The second half of CushionCache (Son et al., arXiv 2406.12016): after the prefix tokens are chosen their KV is
no longer tied to them. It is the one part of the graph that stays in FP16, every query of every layer reads
it, and tuning it costs nothing at runtime. The paper's loss adds the quantization error of activations to the
language model's loss on the calibration text. Here KL to the unquantized decoder takes the latter's place: a
prefix that learns the text also tells the model what kind of text to expect, which lowers perplexity on such text
and is no accuracy. ``target: text`` is the paper's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pq_export.calib.fake_quant import StaticQuantizer, quantizers
from pq_export.calib.outliers import hidden_states
from pq_export.calib.training import (
    BestKeeper,
    Diverged,
    DivergenceGuard,
    Note,
    RunLayer,
    autocast,
    batches,
    cosine,
    kl_divergence,
    next_token_loss,
    run_layers,
)
from pq_export.calibration import KV_SITES
from pq_export.decoder import Decoder, KVPair
from pq_export.errors import PqExportError

HELD_OUT_SHARE = 8  # one of so many crops judges and does not train
TINY = 1e-30  # stands for the power of values that are all zero
FP16_LIMIT = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class PrefixTuningOptions:
    """``lr`` is relative: a step changes a layer's keys, or values, by at most this share of their root mean square.

    ``target``: "model" follows the unquantized decoder's distributions, "text" the tokens of the calibration text.
    ``error_weight`` weighs the mean relative squared error of all quantizers against that, in nats; 0 leaves it out.
    Every ``validate_every`` steps, and at the end, the held-out crops decide what is kept.
    """

    steps: int = 100
    batch: int = 8
    lr: float = 0.01
    target: str = "model"
    error_weight: float = 0.0
    gradient_norm: float = 1.0
    validate_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for bad, what in (
            (self.steps < 1, f"steps {self.steps} is not at least 1"),
            (self.batch < 1, f"batch {self.batch} is not at least 1"),
            (not 0 < self.lr < math.inf, f"lr {self.lr} is not positive"),
            (self.target not in ("model", "text"), f"target '{self.target}' is not model or text"),
            (not 0 <= self.error_weight < math.inf, f"error_weight {self.error_weight} is negative"),
            (not self.gradient_norm > 0, f"gradient_norm {self.gradient_norm} is not positive"),
            (self.validate_every < 1, f"validate_every {self.validate_every} is not at least 1"),
        ):
            if bad:
                raise PqExportError(what, where="prefix tuning")


class TrainedPrefix:
    """Keys and values of all layers as ``start + unit · delta``: ``delta`` is what Adam trains.

    ``unit`` is the root mean square of the layer's keys or values, so that one learning rate serves all.
    """

    def __init__(self, decoder: Decoder):
        self.start: list[Tensor] = []
        for layer in decoder.layers:
            key, value = layer.self_attn.prefix_key, layer.self_attn.prefix_value
            assert key is not None and value is not None
            self.start += [key.float(), value.float()]
        self.unit = [tensor.square().mean().sqrt() for tensor in self.start]
        self.delta = [torch.zeros_like(tensor).requires_grad_(True) for tensor in self.start]

    def pairs(self) -> list[KVPair]:
        """What ships: FP16 values [1, G, p, D] as fp32, with the gradient of the unrounded ones."""
        rounded = []
        for start, unit, delta in zip(self.start, self.unit, self.delta, strict=True):
            exact = (start + unit * delta).clamp(-FP16_LIMIT, FP16_LIMIT)
            rounded.append(exact + (exact.half().float() - exact).detach())
        return list(zip(rounded[::2], rounded[1::2], strict=True))


@torch.enable_grad()
def tune_prefix(
    decoder: Decoder,
    reference: Decoder,
    crops: Tensor,
    options: PrefixTuningOptions | None = None,
    progress: Callable[[int], None] = lambda done: None,
    note: Note = lambda text: None,
    warn: Note | None = None,
) -> list[KVPair]:
    """Train the prefix KV of the quantized ``decoder``; returns it ([1, G, p, D], fp32 of FP16 values) and sets it.

    ``reference`` is the decoder in floating point with a prefix of its own; ``crops`` int64 [N, S]. The
    prefix with the smallest loss on held-out crops is kept, the one that came in among them; if training
    diverges, ``warn`` (else ``note``) says so. Raises :class:`PqExportError` without a prefix, or with fewer than 2
    crops.
    """
    options, device = options or PrefixTuningOptions(), decoder.embed_tokens.weight.device
    if decoder.prefix_length == 0:
        raise PqExportError(
            "there is no prefix to tune", where="prefix tuning", cure="Leave this step out, or choose a prefix."
        )
    if len(crops) < 2:
        raise PqExportError("needs at least 2 crops, one to validate", where="prefix tuning")
    held_out = crops[:: min(HELD_OUT_SHARE, len(crops))]
    training = crops[torch.arange(len(crops)) % min(HELD_OUT_SHARE, len(crops)) != 0]
    prefix, guard, keeper = TrainedPrefix(decoder), DivergenceGuard(), BestKeeper()
    optimizer = torch.optim.Adam(prefix.delta, lr=options.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(options.steps))

    def validate() -> None:
        keeper.offer(_validate(decoder, reference, prefix, held_out, options), prefix.delta)

    validate()
    before = keeper.loss
    try:
        for step, rows in enumerate(batches(len(training), options.batch, options.steps, options.seed), 1):
            decoder.set_prefix(prefix.pairs())
            loss = _loss(decoder, reference, training[rows].to(device), options)
            guard.check(loss.item())
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(prefix.delta, options.gradient_norm)
            if not norm.isfinite():
                raise Diverged(f"a gradient is not finite at step {step}")
            optimizer.step()
            schedule.step()
            if step % options.validate_every == 0 or step == options.steps:
                validate()
            progress(1)
    except Diverged as diverged:
        (warn or note)(f"prefix tuning stopped: {diverged}; the best prefix so far is kept")
    keeper.restore()
    note(f"prefix tuning: held-out loss {before:.4g} -> {keeper.loss:.4g}")
    with torch.no_grad():
        pairs = prefix.pairs()
    decoder.set_prefix(pairs)
    return pairs


@torch.no_grad()
def _validate(
    decoder: Decoder, reference: Decoder, prefix: TrainedPrefix, crops: Tensor, options: PrefixTuningOptions
) -> float:
    """Mean loss over ``crops``, batch by batch."""
    decoder.set_prefix(prefix.pairs())
    total = 0.0
    for ids in crops.split(options.batch):
        total += _loss(decoder, reference, ids.to(prefix.start[0].device), options).item() * len(ids)
    return total / len(crops)


def lowest_activation_bits(decoder: Decoder) -> int:
    """Fewest bits of any input of a linear, 16 where none is quantized; keys and values do not count."""
    return min((q.bits for name, q in quantizers(decoder) if not name.endswith(KV_SITES)), default=16)


def _loss(decoder: Decoder, reference: Decoder, ids: Tensor, options: PrefixTuningOptions) -> Tensor:
    errors = dict[int, Tensor]()
    with autocast(ids.device, lowest_activation_bits(decoder)):
        hidden = run_layers(decoder, ids, run=_observed(decoder, errors) if options.error_weight else None)
        if options.target == "text":
            loss = next_token_loss(hidden, ids, decoder.logits)
        else:
            loss = kl_divergence(hidden_states(reference, ids), hidden, reference.logits, decoder.logits)
    return loss + options.error_weight * torch.stack(list(errors.values())).mean() if errors else loss


def _observed(decoder: Decoder, errors: dict[int, Tensor]) -> RunLayer:
    """Run a layer and put the mean relative squared error of its quantizers into ``errors``.

    The hooks live inside the call: a recomputation in the backward pass meets the same ones.
    """

    def run(index: int, x: Tensor, rope: KVPair, mask: Tensor) -> Tensor:
        layer, seen = decoder.layers[index], list[Tensor]()

        def see(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            power = args[0].detach().float().square().mean().clamp_min(TINY)
            seen.append((output - args[0]).float().square().mean() / power)

        handles = [m.register_forward_hook(see) for m in layer.modules() if isinstance(m, StaticQuantizer)]
        try:
            hidden = layer(x, rope, mask, decoder.empty_past(len(x))[index])[0]
        finally:
            for handle in handles:
                handle.remove()
        if seen:
            errors[index] = torch.stack(seen).mean()
        return hidden

    return run
