"""CushionCache's greedy search (Son et al., arXiv 2406.12016, section 4.1), with a small budget.

Token after token is put in front of the text: the one that lowers the activation quantization error of the
tokens behind it most. The paper tries the whole vocabulary on one long sequence, for hours; here the
candidates are BOS and the most frequent tokens of the calibration text. Its second half, tuning of the prefix
KV by gradient, is a calibration step of its own and not part of this baseline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pq_export.calib.baselines.qfep import frequent_ids
from pq_export.calib.fake_quant import site_quantizer
from pq_export.calib.outliers import hidden_states
from pq_export.calibration import SITES
from pq_export.decoder import Decoder
from pq_export.quantizer import fake_quantize, scale_from_max


@dataclass(frozen=True)
class CushionOptions:
    """Budget of the search: ``candidates`` ids for each of at most ``max_tokens`` places, judged on the first
    ``length`` tokens of ``samples`` crops. It ends once the best candidate keeps more than ``stop`` of the error.
    """

    candidates: int = 48
    max_tokens: int = 4
    samples: int = 2
    length: int = 128
    stop: float = 0.98


@torch.no_grad()
def cushion_prefix(
    decoder: Decoder,
    crops: Tensor,
    bos: int | None,
    bits: int,
    options: CushionOptions = CushionOptions(),
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[int, ...]:
    """Token ids of the prefix, maybe none; ``crops`` [N, S] int64. ``bits`` are those of the activations.

    ``progress`` is called once for each of ``options.max_tokens`` places at most.
    """
    texts = crops[: options.samples, : options.length]
    pool = [*([] if bos is None else [bos]), *frequent_ids(crops, bos, options.candidates)]
    prefix: tuple[int, ...] = ()
    error = quantization_error(decoder, prefix, texts, bits)
    for _ in range(options.max_tokens):
        errors = [quantization_error(decoder, (*prefix, token), texts, bits) for token in pool]
        best = min(range(len(pool)), key=errors.__getitem__)
        progress(1)
        if not errors[best] <= options.stop * error:
            break
        prefix, error = (*prefix, pool[best]), errors[best]
    return prefix


@torch.no_grad()
def quantization_error(decoder: Decoder, prefix: tuple[int, ...], texts: Tensor, bits: int) -> float:
    """Relative error of quantized linear inputs behind ``prefix``, the mean over layers, sites and tokens.

    Each site is quantized per tensor, with the scale of its largest magnitude. Tokens count alike: in one sum
    of squares a massive token would hide what its scale does to all others.
    """
    device, errors = decoder.embed_tokens.weight.device, []

    def see(x: Tensor) -> None:
        x = x[:, len(prefix) :]
        difference = fake_quantize(x, scale_from_max(x.abs().max(), bits), bits) - x
        errors.append((difference.square().sum(-1) / x.square().sum(-1).clamp_min(1e-30)).mean().item())

    handles = [
        site_quantizer(layer, site).register_forward_pre_hook(lambda module, args: see(args[0]))
        for layer in decoder.layers
        for site in SITES
    ]
    try:
        head = torch.tensor([prefix], dtype=texts.dtype).expand(len(texts), -1)
        hidden_states(decoder, torch.cat((head, texts), 1).to(device))
    finally:
        for handle in handles:
            handle.remove()
    return sum(errors) / len(errors)
