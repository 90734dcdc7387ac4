"""Run a bundle in onnxruntime: prefill, one-token decode through the quantized cache, sampling."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from pq_export.bundle import DATA_NAME, EXTERNAL_DATA_ABOVE, EXTERNAL_TENSOR_ABOVE, MODEL_NAME, Bundle
from pq_export.errors import PqExportError
from pq_export.rewrite.last_logits import NUM_LOGITS

ONNX_TO_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


def session_options(weight_bits: int = 8, threads: int | None = None, fuse: bool = True) -> ort.SessionOptions:
    """Options for the models that this project writes.

    ``weight_bits``: the most that weights of a linear have (:attr:`Bundle.max_weight_bits`).
    ``fuse``: False keeps onnxruntime from fusing nodes into operators of its own, which lack fp64 kernels.
    """
    options = ort.SessionOptions()
    if not fuse:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3  # onnxruntime warns about the optional input num_logits_to_keep
    if threads:
        options.intra_op_num_threads = threads
    if weight_bits == 8 and _saturating_cpu():
        # Without VNNI, x86 adds pairs of u8·s8 products in 16 bits, which 8-bit weights overflow.
        options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def _saturating_cpu() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "flags" in flags and "vnni" not in flags


@dataclass
class State:
    """One batch of sequences: the cache, and the mask over what it holds."""

    past: dict[str, np.ndarray]
    attention_mask: np.ndarray


class OrtDecoder:
    """A decoder graph in a session.

    ``model``: path or serialized bytes of a graph with this project's inputs and outputs.
    """

    def __init__(self, model: Path | bytes, options: ort.SessionOptions | None = None):
        source = str(model) if isinstance(model, Path) else model
        try:
            self.session = ort.InferenceSession(
                source, options or session_options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions share no base class
            where = model if isinstance(model, Path) else "the model"
            message = " ".join(str(error).split())[:300]
            raise PqExportError(
                f"onnxruntime cannot load it ({message})", where=where, cure="Build it again."
            ) from None
        self._cache_inputs = [i for i in self.session.get_inputs() if i.name.startswith("past_key_values.")]
        self._present = [i.name.replace("past_key_values", "present") for i in self._cache_inputs]
        self.steps_logits = any(i.name == NUM_LOGITS for i in self.session.get_overridable_initializers())

    def empty(self, batch: int = 1) -> State:
        """A state with nothing in it."""
        past = {}
        for value in self._cache_inputs:
            _, heads, _, head_dim = value.shape
            past[value.name] = np.zeros((batch, heads, 0, head_dim), ONNX_TO_NUMPY[value.type])
        return State(past, np.zeros((batch, 0), np.int64))

    def step(
        self,
        input_ids: np.ndarray,
        state: State,
        *,
        last_only: bool = False,
        mask: np.ndarray | None = None,
        extra: list[str] | None = None,
        feeds: dict[str, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, State, list[np.ndarray]]:
        """Run ``input_ids`` [B, S] after ``state``.

        Returns logits [B, S or 1, vocab], the new state, and the ``extra`` outputs. ``mask`` [B, S] marks
        real tokens with 1 (default: all); positions count real tokens.
        """
        new_mask = np.ones_like(input_ids) if mask is None else mask
        attention_mask = np.concatenate([state.attention_mask, new_mask], axis=1)
        positions = np.maximum(attention_mask.cumsum(1) - 1, 0)[:, -input_ids.shape[1] :]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions,
            **state.past,
            **(feeds or {}),
        }
        if last_only and self.steps_logits:
            inputs[NUM_LOGITS] = np.ones(1, np.int64)
        outputs = self.session.run(["logits", *self._present, *(extra or [])], inputs)
        count = 1 + len(self._present)
        past = dict(zip((i.name for i in self._cache_inputs), outputs[1:count], strict=True))
        return outputs[0], State(past, attention_mask), outputs[count:]


def decoder_of(model: onnx.ModelProto, options: ort.SessionOptions | None = None) -> OrtDecoder:
    """``model`` (consumed) in a session; above protobuf's 2 GB its weights go through a temporary file."""
    if sum(len(t.raw_data) for t in model.graph.initializer) <= EXTERNAL_DATA_ABOVE:
        return OrtDecoder(model.SerializeToString(), options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_NAME
        onnx.save(model, path, save_as_external_data=True, location=DATA_NAME, size_threshold=EXTERNAL_TENSOR_ABOVE)
        return OrtDecoder(path, options)


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_p`` keeps the smallest set of tokens with that probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def sample(logits: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """One token id from ``logits`` [vocab]."""
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    keep = order[: int(np.searchsorted(probabilities[order].cumsum(), sampling.top_p)) + 1]
    return int(rng.choice(keep, p=probabilities[keep] / probabilities[keep].sum()))


def generate(
    decoder: OrtDecoder, prompt: list[int], max_new_tokens: int, stop: set[int], sampling: Sampling | None = None
) -> Iterator[int]:
    """Prefill ``prompt`` and yield token ids one by one; a token of ``stop`` ends it and is not yielded."""
    sampling = sampling or Sampling()
    rng = np.random.default_rng(sampling.seed)
    ids, state = np.array([prompt], dtype=np.int64), decoder.empty()
    for _ in range(max_new_tokens):
        logits, state, _ = decoder.step(ids, state, last_only=True)
        token = sample(logits[0, -1], sampling, rng)
        if token in stop:
            return
        yield token
        ids = np.array([[token]], dtype=np.int64)


def load_tokenizer(bundle: Bundle) -> Any:
    """The bundle's own tokenizer; never reaches for a network."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(bundle.directory, local_files_only=True)


def prompt_ids(bundle: Bundle, tokenizer: Any, text: str, chat: bool) -> list[int]:
    """Token ids of a prompt. A BOS in front is taken away where the prefix in the graph holds it.

    With a chat template that uses the BOS token as a role marker (it occurs more than once), it stays.
    """
    if chat:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = bundle.config["bos_token_id"]
    if bos in bundle.config["prefix"]["token_ids"] and ids[:1] == [bos] and ids.count(bos) == 1:
        ids = ids[1:]
    if not ids:
        raise PqExportError("the prompt is empty", cure="Give some text with -p.")
    limit = bundle.config["max_position_embeddings"] - bundle.config["prefix"]["length"]
    if len(ids) >= limit:
        raise PqExportError(f"the prompt has {len(ids)} tokens; the context holds {limit}", cure="Shorten it.")
    return list(ids)


def stop_tokens(bundle: Bundle, tokenizer: Any) -> set[int]:
    """End-of-sequence ids from the generation config and the tokenizer."""
    import json

    path = bundle.directory / "generation_config.json"
    eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    ids = eos if isinstance(eos, list) else [eos]
    return {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}
