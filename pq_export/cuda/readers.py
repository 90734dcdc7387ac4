"""A :class:`Source` from a bundle's ONNX or from a :class:`Calibration`.

A bundle that onnxruntime runs is read by the names of its initializers (:mod:`pq_export.rewrite`).
"""

from __future__ import annotations

import json

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from pq_export.bundle import Bundle
from pq_export.calibration import KV_SITES, SITES, Calibration, input_site
from pq_export.cuda.source import Sizes, Source
from pq_export.decoder import RotaryTable
from pq_export.errors import IntegrityError, PqExportError
from pq_export.precision import Precision
from pq_export.quantizer import unpack_int4
from pq_export.targets import find_target

FLOAT_SUFFIXES = (".weight", ".key_offset", "norm.bias", ".prefix.key", ".prefix.value")


def calibration_source(calibration: Calibration) -> Source:
    """``calibration`` as it is; nothing is copied."""
    c, d = calibration, calibration.decoder
    tables = RotaryTable(d)

    def scale(linear: str) -> np.ndarray:
        return np.float32(c.input_scale(linear)) * c.tensors[f"{linear}.scale"]

    return Source(
        where="calibration",
        sizes=Sizes(
            d.vocab_size,
            d.hidden_size,
            d.intermediate_size,
            d.num_layers,
            d.num_heads,
            d.num_kv_heads,
            d.head_dim,
            d.rms_norm_eps,
        ),
        floats={name: value for name, value in c.tensors.items() if name.endswith(FLOAT_SUFFIXES)},
        codes=c.weight_codes,
        scale=scale,
        bias=lambda linear: c.tensors.get(f"{linear}.bias"),
        weight_bits=c.weight_bits,
        activation_bits=c.activation_bits,
        kv_bits=c.kv_bits,
        activation_scales=c.activation_scales,
        kv_scales=c.kv_scales,
        cos=tables.cos.numpy(),
        sin=tables.sin.numpy(),
        online=c.rotation.online,
        prefix_length=len(c.prefix.token_ids),
    )


def bundle_source(bundle: Bundle) -> Source:
    """The initializers of ``bundle``'s ONNX; raises :class:`IntegrityError` where one is missing.

    Sizes follow from shapes; the norms' epsilon is read from the bundle's ``config.json``.
    """
    where = bundle.model_path
    if not find_target(bundle.config["target"]).native:
        raise PqExportError(
            f"its graph is for target {bundle.config['target']}",
            where=bundle.directory,
            cure="Build the calibration with --target ort.",
        )
    model = onnx.load(where)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    precision, overrides = Precision.parse(bundle.config["precision"]), bundle.overrides

    def array(name: str) -> np.ndarray:
        if name not in stored:
            raise IntegrityError(f"has no initializer '{name}'", where=where, cure="Build the bundle again.")
        return _array(stored[name])

    def scale(linear: str) -> np.ndarray:
        if f"{linear}.combined_scale" in stored:
            return array(f"{linear}.combined_scale")
        site = input_site(linear)
        return array(f"{site}.scale") * array(f"{linear}.scale")

    layers = range(bundle.config["num_layers"])
    sites = [f"layers.{i}.{site}" for i in layers for site in SITES]
    kv_sites = [f"layers.{i}.{site}" for i in layers for site in KV_SITES]
    return Source(
        where=str(bundle.directory),
        sizes=_sizes(bundle, model, stored),
        floats={n: _float_array(n, stored[n]) for n in stored if n.endswith(FLOAT_SUFFIXES)},
        codes=lambda linear: np.ascontiguousarray(array(f"{linear}.codes").T),
        scale=scale,
        bias=lambda linear: array(f"{linear}.bias") if f"{linear}.bias" in stored else None,
        weight_bits=lambda linear: overrides.get(linear, precision.weight_bits),
        activation_bits=lambda site: overrides.get(site, precision.activation_bits),
        kv_bits=lambda site: overrides.get(site, precision.kv_bits),
        activation_scales={s: float(array(f"{s}.scale")) for s in sites if f"{s}.scale" in stored},
        kv_scales={s: tuple(array(f"{s}.scale").reshape(-1).tolist()) for s in kv_sites if f"{s}.scale" in stored},
        cos=array("rotary.cos"),
        sin=array("rotary.sin"),
        online=tuple(bundle.config["rotation"]["online"]),
        prefix_length=bundle.config["prefix"]["length"],
    )


def _array(tensor: TensorProto) -> np.ndarray:
    """Values; INT4 ones as int8."""
    if tensor.data_type == TensorProto.INT4:
        return unpack_int4(np.frombuffer(tensor.raw_data, np.uint8), tuple(tensor.dims))
    return numpy_helper.to_array(tensor)


def _float_array(name: str, tensor: TensorProto) -> np.ndarray:
    values = _array(tensor)
    return values[0] if ".prefix." in name else values  # [1, G, p, D] in the graph


def _sizes(bundle: Bundle, model: onnx.ModelProto, stored: dict[str, TensorProto]) -> Sizes:
    past = next((i for i in model.graph.input if i.name == "past_key_values.0.key"), None)
    embedding, q, gate = (
        stored.get(name)
        for name in ("embed_tokens.weight", "layers.0.self_attn.q_proj.codes", "layers.0.mlp.gate_proj.codes")
    )
    if past is None or embedding is None or q is None or gate is None:
        raise IntegrityError(
            f"holds no integer weights by their names (target {bundle.config.get('target')})",
            where=bundle.model_path,
            cure="Build the calibration with --target ort.",
        )
    path = bundle.directory / "config.json"
    try:
        eps = float(json.loads(path.read_text(encoding="utf-8"))["rms_norm_eps"])
    except (OSError, ValueError, KeyError, TypeError):
        raise IntegrityError("gives no rms_norm_eps", where=path, cure="Build the bundle again.") from None
    dims = past.type.tensor_type.shape.dim
    heads, head_dim = dims[1].dim_value, dims[3].dim_value
    return Sizes(
        vocab_size=embedding.dims[0],
        hidden_size=embedding.dims[1],
        intermediate_size=gate.dims[1],
        num_layers=bundle.config["num_layers"],
        num_heads=q.dims[1] // head_dim,
        num_kv_heads=heads,
        head_dim=head_dim,
        rms_norm_eps=eps,
    )
