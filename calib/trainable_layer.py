"""A quantized layer made trainable, and back: weights under their quantizers, scales, norm gains and biases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from pq_export.calib.block import NORMS, LayerBits, LayerScales, get_linear, install
from pq_export.calib.fake_quant import StaticQuantizer, SteppedLinear, site_quantizer
from pq_export.calibration import KV_SITES, SITE_OF_LINEAR, SITES
from pq_export.decoder import DecoderLayer
from pq_export.quantizer import code_range


@dataclass
class Trainable:
    """Parameters: ``steps`` in units of a weight's step, ``shifts``: logarithms of scales, ``gains`` and biases."""

    steps: list[nn.Parameter] = field(default_factory=list)
    shifts: list[nn.Parameter] = field(default_factory=list)
    gains: list[nn.Parameter] = field(default_factory=list)

    def all(self) -> list[nn.Parameter]:
        """Those that are trained: of kinds whose learning rate is 0 nothing is kept or computed."""
        return [p for p in (*self.steps, *self.shifts, *self.gains) if p.requires_grad]

    def optimizer(self, weight_lr: float, scale_lr: float, norm_lr: float, fused: bool) -> torch.optim.Optimizer:
        """Adam without weight decay, one learning rate a kind; a kind with rate 0 is frozen."""
        kinds = ((self.steps, weight_lr), (self.shifts, scale_lr), (self.gains, norm_lr))
        for parameters, lr in kinds:
            for parameter in parameters:
                parameter.requires_grad_(lr > 0)
        groups = [{"params": parameters, "lr": lr} for parameters, lr in kinds if parameters and lr > 0]
        # The second moment forgets fast: a few hundred updates are all there are.
        return torch.optim.Adam(groups, betas=(0.9, 0.99), fused=fused)


def make_trainable(layers: Iterable[tuple[DecoderLayer, DecoderLayer, LayerScales, LayerBits]]) -> Trainable:
    """Replace the linears of quantized layers by :class:`SteppedLinear`; :meth:`Trainable.optimizer` unfreezes them.

    Each item: the quantized layer, its floating-point original, what was found for it, its bits.
    """
    trainable = Trainable()
    for layer, reference, found, bits in layers:
        for name in SITE_OF_LINEAR:
            bias = get_linear(layer, name).bias  # its own: rounding may have corrected it
            linear = SteppedLinear(
                get_linear(reference, name).weight.detach(),
                found.codes[name],
                found.weight[name],
                None if bias is None else bias.detach().clone(),
                bits.weight[name],
            )
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, linear)
            trainable.steps.append(linear.steps)
            trainable.shifts.append(linear.shift)
        for site in (*SITES, *KV_SITES):
            if isinstance(quantizer := site_quantizer(layer, site), StaticQuantizer):
                trainable.shifts.append(quantizer.shift)
        trainable.gains += [layer.get_parameter(name) for name in _trained(layer)]
    return trainable


def _trained(layer: DecoderLayer) -> list[str]:
    """Floating-point parameters that train: gains of norms, and the biases of norms and linears that have one."""
    modules = (*NORMS, *SITE_OF_LINEAR)
    biases = [f"{name}.bias" for name in modules if getattr(layer.get_submodule(name), "bias", None) is not None]
    return [*(f"{name}.weight" for name in NORMS), *biases]


@torch.no_grad()
def settle(layer: DecoderLayer, reference: DecoderLayer, found: LayerScales, bits: LayerBits) -> None:
    """Take the trained values into ``found`` and give the layer plain linears and constant quantizers again."""
    for name in SITE_OF_LINEAR:
        stepped = layer.get_submodule(name)
        assert isinstance(stepped, SteppedLinear)
        codes = stepped.codes().clamp(*code_range(bits.weight[name]))
        found.weight[name], found.codes[name] = stepped.scale.detach().clone(), codes.to(torch.int8)
        parent, _, leaf = name.rpartition(".")
        original = get_linear(reference, name)
        plain = nn.Linear(original.in_features, original.out_features, original.bias is not None, device="meta")
        plain.weight = nn.Parameter(original.weight.detach(), requires_grad=False)
        if stepped.bias is not None:
            plain.bias = nn.Parameter(stepped.bias.detach().clone(), requires_grad=False)
        setattr(layer.get_submodule(parent), leaf, plain)
    for site in (*SITES, *KV_SITES):
        if isinstance(quantizer := site_quantizer(layer, site), StaticQuantizer):
            scales = found.kv if site in KV_SITES else found.activation
            scales[site] = quantizer.scale.detach().clone().reshape(scales[site].shape)
    names = _trained(layer)
    for name in names:
        found.parameters[name] = layer.get_parameter(name).requires_grad_(False).detach().clone()
    install(layer, found, bits)
