"""A bundle in onnxruntime, whatever it was made for: as it is, or as the target says it reads in standard operators.

One for a static-only accelerator also runs as its graphs of fixed shapes, in onnxruntime or in the accelerator's
simulator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import onnx

from pq_export.bundle import Bundle
from pq_export.errors import UsageError
from pq_export.runtime import OrtDecoder, decoder_of, session_options
from pq_export.static_runtime import StaticDecoder, StaticFacts, onnxruntime_sessions
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


@contextlib.contextmanager
def running_decoder(
    bundle: Bundle, run_on: str | None = None, soc: str | None = None, threads: int | None = None
) -> Iterator[Any]:
    """The bundle as a decoder: an ``OrtDecoder``, or a ``StaticDecoder`` with the same methods.

    ``run_on``: "model" for ``model.onnx``, "static" for the graphs of fixed shapes in onnxruntime, "simulator" for the
    simulator of the accelerator ``soc``, "runtime" for the target's own runtime on this machine; None is the simulator
    where the target has one, else "model".
    """
    target = find_target(bundle.config["target"])
    run_on = run_on or ("model" if target.simulate is None else "simulator")
    if soc is not None and run_on != "simulator":
        raise UsageError("--soc is for a simulator", cure="Leave it out, or use --on simulator.")
    if run_on == "model":
        yield open_decoder(bundle, threads)
        return
    if run_on == "runtime":
        if target.open_runtime is None:
            raise UsageError(f"target {target.name} has no runtime of its own here", cure="Use --on model.")
        yield target.open_runtime(bundle.directory, threads)
        return
    if run_on == "simulator" and target.simulate is None:
        raise UsageError(f"target {target.name} has no simulator here", cure="Use --on model.")
    facts = StaticFacts.read(bundle.directory, bundle.config)
    if run_on == "static" or target.simulate is None:
        yield StaticDecoder(facts, onnxruntime_sessions(bundle.directory, bundle.config, threads))
        return
    with target.simulate(bundle.directory, bundle.config, soc) as simulation:
        yield StaticDecoder(facts, simulation.graphs(list(bundle.config["static"]["graphs"])))
