"""Pass: give the parameters that stay in floating point their values.

``<parameter>`` (dangling graph input)  ->  initializer; FP16 ones are cast to FP32 where they are used.
The embedding is gathered in FP16 and only its rows are cast. The rotary tables are computed here.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from pq_export.decoder import DecoderConfig, RotaryTable
from pq_export.export.fp_graph import FPGraph
from pq_export.rewrite.edit import cast, reconnect


def bind_float_parameters(fp: FPGraph, tensors: dict[str, np.ndarray], config: DecoderConfig) -> None:
    """Bind every parameter found in ``tensors`` and drop it from the graph's inputs."""
    tables = RotaryTable(config)
    values = {**tensors, "rotary.cos": tables.cos.numpy(), "rotary.sin": tables.sin.numpy()}
    for parameter in [t for t in fp.graph.inputs if t.name in fp.parameters]:
        fp.graph.inputs.remove(parameter)
        if parameter.name not in values or not parameter.outputs:
            continue
        value = values[parameter.name]
        constant = gs.Constant(parameter.name, np.ascontiguousarray(value))
        consumers = list(parameter.outputs)
        if value.dtype != np.float16:
            reconnect(parameter, constant)
        elif all(node.op == "Gather" for node in consumers):
            reconnect(parameter, constant)
            for node in consumers:
                rows = node.outputs[0]
                readers = list(rows.outputs)
                rows.dtype = np.dtype(np.float16)
                wide = cast(fp.graph, rows, "float32", f"{rows.name}_fp32")
                reconnect(rows, wide, readers)
        else:
            reconnect(parameter, cast(fp.graph, constant, "float32", f"{parameter.name}_fp32"))
