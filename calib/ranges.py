"""Static ranges: the true maximum of every quantizer's input over the calibration set.

Maxima, not a moving average: a scale search can shrink a range later but never see what was forgotten.
The prefix stands in front, so no outlier token is among the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pq_export.calib.outliers import OutlierObserver, OutlierStatistics, hidden_states
from pq_export.decoder import Decoder

Ranges = dict[str, Tensor]


@torch.no_grad()
def collect_ranges(
    decoder: Decoder, crops: Tensor, batch: int = 4, progress: Callable[[int], None] = lambda done: None
) -> tuple[Ranges, OutlierStatistics]:
    """``layers.N.<site>`` -> max |x| (scalar; [G] for keys and values), and outliers with the prefix on.

    ``crops`` [N, S] run through the unquantized rewritten model.
    """
    ranges: Ranges = {}

    def see(name: str, x: Tensor, axes: tuple[int, ...]) -> None:
        peak = x.abs().amax(axes)
        ranges[name] = torch.maximum(ranges[name], peak) if name in ranges else peak

    handles: list[Any] = []
    for index, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        sites = {
            "self_attn.qkv_input": (attention.q_proj, (0, 1, 2)),
            "self_attn.o_input": (attention.o_proj, (0, 1, 2)),
            "mlp.gate_up_input": (mlp.gate_proj, (0, 1, 2)),
            "mlp.down_input": (mlp.down_proj, (0, 1, 2)),
            "self_attn.key": (attention.key_quantizer, (0, 2, 3)),
            "self_attn.value": (attention.value_quantizer, (0, 2, 3)),
        }
        for site, (module, axes) in sites.items():
            handles.append(
                module.register_forward_pre_hook(lambda m, args, n=f"layers.{index}.{site}", a=axes: see(n, args[0], a))
            )
    try:
        with OutlierObserver(decoder) as observer:
            for start in range(0, len(crops), batch):
                ids = crops[start : start + batch].to(decoder.embed_tokens.weight.device)
                observer.begin(ids)
                hidden_states(decoder, ids)
                progress(len(ids))
    finally:
        for handle in handles:
            handle.remove()
    return {name: peak.cpu() for name, peak in ranges.items()}, observer.statistics
