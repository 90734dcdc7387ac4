"""A bundle in onnxruntime, whatever it was made for: as it is, or as the target says it reads in standard operators."""

from __future__ import annotations

import onnx

from pq_export.bundle import Bundle
from pq_export.runtime import OrtDecoder, decoder_of, session_options
from pq_export.targets import find_target


def executable_model(bundle: Bundle) -> onnx.ModelProto:
    """The bundle's graph in operators that onnxruntime has, weights inside."""
    return find_target(bundle.config["target"]).executable(onnx.load(bundle.model_path))


def open_decoder(bundle: Bundle, threads: int | None = None) -> OrtDecoder:
    """A session over the bundle's graph; the file itself where onnxruntime reads it."""
    options = session_options(bundle.max_weight_bits, threads)
    if find_target(bundle.config["target"]).native:
        return OrtDecoder(bundle.model_path, options)
    return decoder_of(executable_model(bundle), options)
