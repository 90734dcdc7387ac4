"""Run the IR of a bundle on this CPU, with the interface of :class:`pq_export.runtime.OrtDecoder`."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np

from pq_export.errors import PqExportError
from pq_export.rewrite.last_logits import NUM_LOGITS
from pq_export.runtime import State
from pq_export.targets.openvino_compile import FOLDER, IR_NAME, PROPERTIES, find_openvino


class OpenVinoDecoder:
    """An IR as :func:`pq_export.targets.openvino_compile.make_ir` writes it, compiled with its properties.

    ``ir``: path of ``model.xml``. ``threads``: None leaves their number to OpenVINO.
    """

    def __init__(self, ir: Path, threads: int | None = None):
        find_openvino()
        openvino = importlib.import_module("openvino")
        properties = PROPERTIES | ({} if threads is None else {"INFERENCE_NUM_THREADS": str(threads)})
        try:
            compiled = openvino.Core().compile_model(str(ir), "CPU", properties)
        except RuntimeError as error:  # what OpenVINO's own exceptions arrive as
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            message = lines[-1][:300] if lines else "no reason given"
            raise PqExportError(
                f"OpenVINO cannot load it ({message})", where=ir, cure="Build the bundle again."
            ) from None
        self._request = compiled.create_infer_request()
        self._outputs = {output.get_any_name(): output for output in compiled.outputs}
        inputs = {value.get_any_name(): value for value in compiled.inputs}
        self._cache = {
            name: (value.get_element_type().to_dtype(), value.get_partial_shape())
            for name, value in inputs.items()
            if name.startswith("past_key_values.")
        }
        self.steps_logits = NUM_LOGITS in inputs

    def empty(self, batch: int = 1) -> State:
        """A state with nothing in it."""
        past = {
            name: np.zeros((batch, shape[1].get_length(), 0, shape[3].get_length()), dtype)
            for name, (dtype, shape) in self._cache.items()
        }
        return State(past, np.zeros((batch, 0), np.int64))

    def step(
        self, input_ids: np.ndarray, state: State, *, last_only: bool = False, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, State, list[np.ndarray]]:
        """Run ``input_ids`` [B, S] after ``state``: logits [B, S or 1, vocab], the new state, and nothing.

        ``mask`` [B, S] marks real tokens with 1 (default: all); positions count real tokens.
        """
        attention_mask = np.concatenate([state.attention_mask, np.ones_like(input_ids) if mask is None else mask], 1)
        positions = np.maximum(attention_mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1] :]
        feeds = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions,
            **state.past,
        }
        if self.steps_logits:
            feeds[NUM_LOGITS] = np.full(1, int(last_only), np.int64)  # 0 keeps all
        self._request.infer(feeds)
        # Copies: the next call writes to the same memory.
        outputs = {name: self._request.get_tensor(output).data.copy() for name, output in self._outputs.items()}
        past = {name: outputs[name.replace("past_key_values", "present")] for name in self._cache}
        return outputs["logits"], State(past, attention_mask), []


def open_ir(directory: Path, threads: int | None = None) -> OpenVinoDecoder:
    """The IR of the bundle in ``directory``."""
    return OpenVinoDecoder(directory / FOLDER / IR_NAME, threads)
