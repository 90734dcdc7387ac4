"""A context binary's arithmetic, in Qualcomm's simulator, beside the same graphs in onnxruntime.

QNN 2.51 computes wrong numbers for some shapes although its compiler, its list of layers and a strict session are
content: the cosine of the logits is then 0.3 to 0.8 for whole runs of tokens. The graphs avoid the two forms that are
known (:func:`~pq_export.targets.static_float.repeat_rotary_tables` and ``unstack_queries``); this is for others. Right
graphs differ by rounding, which single tokens at a boundary blow up, but not half of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pq_export.errors import PqExportError
from pq_export.static_runtime import StaticDecoder, StaticFacts, onnxruntime_sessions
from pq_export.targets.profile import Soc
from pq_export.targets.qnn_simulator import RUN_TIMEOUT, Simulator

DECODED = 3  # tokens
LEAST_COSINE = 0.9  # a median below it is an error of the compiler, not rounding


@dataclass(frozen=True)
class Compared:
    """Cosine of the simulator's logits and onnxruntime's: medians of both halves of a prefill, and of decoded tokens.

    ``seconds``: how long the graphs ran in the simulator.
    """

    prefill: tuple[float, float]
    decode: float
    seconds: float

    @property
    def least(self) -> float:
        return min(*self.prefill, self.decode)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_simulated(
    directory: Path,
    config: Mapping[str, Any],
    soc: Soc,
    samples: np.ndarray,
    layers: Path | None = None,
    *,
    timeout: float = RUN_TIMEOUT,
) -> Compared:
    """Run a prefill of token ids of ``samples``, and three tokens more, through the graphs that ``config`` lists.

    ``layers``: the listing of the binary that the simulator has to run. Raises :class:`PqExportError` where the
    simulator computes something else than the graphs say.
    """
    facts = StaticFacts.read(directory, config)
    ids = np.resize(samples, facts.prefill_len + DECODED).astype(np.int64)
    reference = _logits(StaticDecoder(facts, onnxruntime_sessions(directory, config)), ids)
    graphs = {name: directory / path for name, path in config["static"]["graphs"].items()}
    with Simulator(graphs, soc, layers, timeout=timeout) as simulator:
        simulated = _logits(StaticDecoder(facts, simulator.graphs(list(graphs))), ids)
        seconds = simulator.seconds
    cosines = _cosines(simulated, reference)
    whole = facts.prefill_len
    medians = [float(np.median(part)) for part in (*np.array_split(cosines[:whole], 2), cosines[whole:])]
    compared = Compared((medians[0], medians[1]), medians[2], seconds)
    if not compared.least >= LEAST_COSINE:
        what = "decode" if compared.decode == compared.least else f"a prefill of {whole} tokens"
        raise PqExportError(
            f"QNN takes the graphs for {soc.name} and computes wrong numbers: in {what} the logits' cosine to "
            f"onnxruntime's is {compared.least:.2f}",
            cure="Use another --prefill-len; it depends on that and on the number and width of heads.",
        )
    return compared


def _logits(decoder: StaticDecoder, ids: np.ndarray) -> np.ndarray:
    """[S + 3, vocab]: a whole chunk at once, then token by token, each graph behind its own cache."""
    whole = decoder.facts.prefill_len
    logits, state, _ = decoder.step(ids[None, :whole], decoder.empty())
    rows = [logits[0]]
    for token in ids[whole:]:
        logits, state, _ = decoder.step(token.reshape(1, 1), state)
        rows.append(logits[0])
    return np.concatenate(rows)


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / np.maximum(norms, np.finfo(np.float64).tiny))
