"""Run graphs of fixed shapes as a decoder: padded prefill, decode, and a cache that the host keeps and shifts.

A bundle for a static-only accelerator has two graphs over the same weights: ``prefill`` of S tokens and ``decode`` of
one. Both read a cache of C tokens and write the codes of the new tokens only; all but ids and positions are codes::

    input_ids, position_ids [1, S]    attention_bias [1, 1, S, C + S]    past_key_values.N.key/value [1, H, C, D]
    logits [1, S, vocab]              present.N.key/value [1, H, S, D]

The host fills the cache from its column 0 on. A prompt goes through ``prefill`` in chunks; the last one is padded on
the right, and the bias hides what is padding or not yet filled. The prefix is inside the graphs. Where the cache is
full the oldest tokens leave it, never the prefix: attention then sees the prefix and a window of the last C tokens.
Positions go on counting, as in ``model.onnx``. Until the first token has left, results are those of an unbounded
cache; after that it is an approximation, which models without sliding-window attention were not trained for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pq_export.errors import IntegrityError, PqExportError

FACTS_NAME = "static/static.json"
GRAPHS = ("prefill", "decode")


class Session(Protocol):
    """A graph that can run: onnxruntime's session has this form, and so has a simulator's."""

    def run(self, names: list[str], feeds: dict[str, np.ndarray], /) -> Sequence[Any]: ...


@dataclass(frozen=True)
class Quantized:
    """Codes of one tensor: ``value = (code - zero_point) * scale``."""

    dtype: np.dtype[Any]
    scale: float
    zero_point: int

    def values(self, codes: np.ndarray) -> np.ndarray:
        """float32 of ``codes``."""
        return (codes.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)


@dataclass(frozen=True)
class StaticFacts:
    """What a host must know of a pair of graphs; ``static.json`` in the bundle.

    Lengths in tokens; ``cache_len`` is without the prefix. ``visible`` and ``hidden``: codes of ``attention_bias``.
    ``cache``: input -> type, value of empty columns and shape [1, H, C, D]. ``logits`` is None where they are float.
    """

    prefill_len: int
    cache_len: int
    prefix_len: int
    logits: Quantized | None
    bias_dtype: np.dtype[Any]
    visible: float
    hidden: float
    cache: dict[str, tuple[np.dtype[Any], int, tuple[int, int, int, int]]]

    @classmethod
    def from_dict(cls, document: dict[str, Any], heads: int, head_dim: int) -> StaticFacts:
        """``document`` as ``static.json`` holds it; ``heads`` and ``head_dim`` are of the cache."""
        logits, bias, length = document["logits"], document["attention_bias"], int(document["cache_len"])
        quantized = None
        if logits.get("scale") is not None:
            quantized = Quantized(np.dtype(logits["dtype"]), float(logits["scale"]), int(logits["zero_point"]))
        return cls(
            prefill_len=int(document["prefill_len"]),
            cache_len=length,
            prefix_len=int(document["prefix_len"]),
            logits=quantized,
            bias_dtype=np.dtype(bias["dtype"]),
            visible=bias["visible"],
            hidden=bias["hidden"],
            cache={
                name: (np.dtype(entry["dtype"]), int(entry["zero_point"] or 0), (1, heads, length, head_dim))
                for name, entry in document["cache"].items()
            },
        )

    @classmethod
    def read(cls, directory: Path, config: Mapping[str, Any]) -> StaticFacts:
        """Of the bundle in ``directory`` whose ``pq_config.json`` is ``config``."""
        path = directory / FACTS_NAME
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_dict(document, config["kv_cache"]["heads"], config["kv_cache"]["head_dim"])
        except FileNotFoundError:
            raise PqExportError(
                "has no graphs of fixed shapes", where=directory, cure="Build it for a target such as qnn-htp."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(f"cannot be read: {error}", where=path, cure="Build the bundle again.") from None


@dataclass(frozen=True)
class CachedSequence:
    """One sequence: its cache [1, H, C, D] by input, how many of its columns are filled, and tokens seen in all."""

    cache: dict[str, np.ndarray]
    filled: int
    seen: int


@dataclass(frozen=True)
class StaticState:
    """One batch of sequences, each with a cache of its own."""

    sequences: tuple[CachedSequence, ...]


class StaticDecoder:
    """Graphs of fixed shapes with the interface of :class:`pq_export.runtime.OrtDecoder`.

    ``sessions``: "prefill" and "decode". Sequences of a batch run one after the other.
    """

    def __init__(self, facts: StaticFacts, sessions: Mapping[str, Session]):
        self.facts = facts
        self.runs = dict.fromkeys(GRAPHS, 0)
        self._sessions = sessions
        self._present = [name.replace("past_key_values", "present") for name in facts.cache]

    def empty(self, batch: int = 1) -> StaticState:
        """A state with nothing in it."""
        cache = {name: np.full(shape, zero, dtype) for name, (dtype, zero, shape) in self.facts.cache.items()}
        return StaticState((CachedSequence(cache, 0, 0),) * batch)

    def step(
        self, input_ids: np.ndarray, state: StaticState, *, last_only: bool = False, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, StaticState, list[np.ndarray]]:
        """Run ``input_ids`` [B, S] after ``state``: logits [B, S or 1, vocab] in float32, the new state, nothing.

        ``mask`` [B, S] marks real tokens with 1 (default: all); others are left out, their logits are 0.
        """
        rows, sequences = [], []
        for index, sequence in enumerate(state.sequences):
            real = np.ones(input_ids.shape[1], bool) if mask is None else mask[index].astype(bool)
            if not real.any():
                raise PqExportError("a sequence of a batch has no tokens to run")
            logits, sequence = self._run(input_ids[index][real], sequence, last_only)
            if not last_only:
                spread = np.zeros((len(real), logits.shape[1]), np.float32)
                spread[real] = logits
                logits = spread
            rows.append(logits)
            sequences.append(sequence)
        return np.stack(rows), StaticState(tuple(sequences)), []

    def _run(self, ids: np.ndarray, sequence: CachedSequence, last_only: bool) -> tuple[np.ndarray, CachedSequence]:
        """Logits [n or 1, vocab] of the tokens ``ids`` [n]."""
        parts = []
        for start in range(0, len(ids), self.facts.prefill_len):
            chunk = ids[start : start + self.facts.prefill_len]
            codes, sequence = self._run_chunk(chunk, sequence)
            parts.append(codes[-1:] if last_only else codes)
        codes = parts[-1] if last_only else np.concatenate(parts)
        logits = self.facts.logits
        return codes.astype(np.float32) if logits is None else logits.values(codes), sequence

    def _run_chunk(self, ids: np.ndarray, sequence: CachedSequence) -> tuple[np.ndarray, CachedSequence]:
        """Logits codes [n, vocab] of the tokens ``ids`` [n], which fit one graph."""
        graph = "decode" if len(ids) == 1 else "prefill"
        length = 1 if len(ids) == 1 else self.facts.prefill_len
        self.runs[graph] += 1
        feeds = {**chunk_inputs(self.facts, ids, sequence, length), **sequence.cache}
        logits, *presents = self._sessions[graph].run(["logits", *self._present], feeds)
        new = dict(zip(self.facts.cache, presents, strict=True))
        return logits[0, : len(ids)], appended(sequence, new, len(ids))


def chunk_inputs(facts: StaticFacts, ids: np.ndarray, sequence: CachedSequence, length: int) -> dict[str, np.ndarray]:
    """``input_ids``, ``position_ids`` and ``attention_bias`` for ``ids`` [n] in a graph of ``length`` tokens.

    Padding stands behind the tokens; no token sees it, and it sees itself alone, whose results nobody reads.
    """
    count = len(ids)
    padded = np.zeros((1, length), np.int32)
    padded[0, :count] = ids
    positions = np.minimum(sequence.seen + np.arange(length), sequence.seen + count - 1).astype(np.int32)
    new = np.tri(length, dtype=bool)
    new[count:] = np.eye(length, dtype=bool)[count:]
    old = np.zeros((length, facts.cache_len), bool)
    old[:count, : sequence.filled] = True
    bias = np.where(np.concatenate([old, new], 1), facts.visible, facts.hidden).astype(facts.bias_dtype)
    return {"input_ids": padded, "position_ids": positions[None], "attention_bias": bias[None, None]}


def appended(sequence: CachedSequence, new: Mapping[str, np.ndarray], count: int) -> CachedSequence:
    """``sequence`` with the first ``count`` columns of ``new`` [1, H, S, D]; the oldest columns make room for them."""
    length = next(iter(sequence.cache.values())).shape[2] if sequence.cache else count
    kept = min(sequence.filled, length - min(count, length))
    taken = min(count, length)
    cache = {}
    for name, old in sequence.cache.items():
        buffer = old.copy()
        buffer[:, :, :kept] = old[:, :, sequence.filled - kept : sequence.filled]
        buffer[:, :, kept : kept + taken] = new[name][:, :, count - taken : count]
        cache[name] = buffer
    return replace(sequence, cache=cache, filled=kept + taken, seen=sequence.seen + count)


def static_paths(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Graph -> its file in the bundle, as ``pq_config.json`` lists them."""
    static = config.get("static")
    graphs = static.get("graphs") if isinstance(static, dict) else None
    if not isinstance(graphs, dict) or set(graphs) != set(GRAPHS):
        raise IntegrityError(
            f"does not list the graphs {' and '.join(GRAPHS)}", where=directory, cure="Build the bundle again."
        )
    return graphs


def onnxruntime_sessions(directory: Path, config: Mapping[str, Any], threads: int | None = None) -> dict[str, Session]:
    """The bundle's graphs of fixed shapes in onnxruntime, node by node as they are written: the reference."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # What it fuses rounds elsewhere: a quantized softmax or sum differs from its definition by several codes.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads:
        options.intra_op_num_threads = threads
    sessions: dict[str, Session] = {}
    for name, path in static_paths(directory, config).items():
        try:
            sessions[name] = ort.InferenceSession(str(directory / path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base class
            message = " ".join(str(error).split())[:300]
            raise PqExportError(
                f"onnxruntime cannot load it ({message})", where=directory / path, cure="Build it again."
            ) from None
    return sessions
