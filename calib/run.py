"""State of one calibration while it goes: what the steps of a recipe read and change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pq_export.calib.block import LayerBits, LayerScales
from pq_export.calib.checkpoint import Checkpoint
from pq_export.calib.outliers import compute_prefix_kv
from pq_export.calib.work import WorkDirectory
from pq_export.calibration import Rotation
from pq_export.decoder import Decoder
from pq_export.plan import Plan
from pq_export.stages import Stages


@dataclass
class Run:
    """One calibration. ``decoder`` is the checkpoint's, rewritten and then quantized in place.

    crops
        Token ids [N, S]; the first ``plan.calib_samples`` are what ranges and Hessians see.
    ranges
        ``layers.N.<site>`` -> max |x| of the unquantized model.
    overrides
        ``layers.N.<linear or site>`` -> bits, where they are not the precision's.
    reference
        The floating-point model with the prefix, kept where a step needs it as a teacher.
    statistics
        For the report.
    """

    checkpoint: Checkpoint
    plan: Plan
    stages: Stages
    work: WorkDirectory
    crops: Tensor
    rotation: Rotation
    token_ids: tuple[int, ...] = ()
    ranges: dict[str, Tensor] = field(default_factory=dict)
    overrides: dict[str, int] = field(default_factory=dict)
    layers: list[LayerScales] = field(default_factory=list)
    reference: Decoder | None = None
    statistics: dict[str, Any] = field(default_factory=dict)

    @property
    def decoder(self) -> Decoder:
        return self.checkpoint.decoder

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def calibration_crops(self) -> Tensor:
        return self.crops[: self.plan.calib_samples]

    def bits(self, index: int) -> LayerBits:
        """Bits of layer ``index``."""
        return LayerBits.of(self.plan.precision, self.overrides, index)

    def set_prefix(self) -> None:
        """Compute the prefix KV anew: it depends on the weights and rotations of the moment."""
        self.decoder.set_prefix(compute_prefix_kv(self.decoder, self.token_ids) if self.token_ids else None)
