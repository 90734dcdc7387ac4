"""Running out of memory, said with the stage it happened in and what lowers it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from pq_export.errors import PqExportError
from pq_export.stages import Stages

CURES = {
    "load checkpoint": "Use a machine with more memory, or --num-layers for a trial.",
    "load calibration": "Use a machine with more memory.",
    "evaluate": "Use a smaller --window.",
    "rewrite weights": "Use a machine with more memory, or --num-layers for a trial.",
    "quantize blocks": "Use fewer --calib-samples, a smaller --seq-len, or a smaller 'samples' in the recipe's steps.",
    "learn rotations": "Use a smaller 'batch' in the recipe's learn_rotations, or a smaller --seq-len.",
    "tune model": "Set 'checkpoint: true' or a smaller 'batch' in the recipe's tune_model, or 'weight_lr: 0'.",
    "tune prefix": "Use a smaller 'batch' in the recipe's tune_prefix, or a smaller --seq-len.",
}
OTHERWISE = "Use a smaller --seq-len, fewer --calib-samples, or fewer 'search_samples' in the recipe."
# What PyTorch says in a plain RuntimeError: its CPU allocator on Linux and elsewhere, cuBLAS, and CUDA itself.
SIGNS = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")


@contextlib.contextmanager
def memory_errors(stages: Stages) -> Iterator[None]:
    """Turn an allocation that failed into a :class:`PqExportError` that names the stage and the cure."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise _error(stages) from None
    except RuntimeError as error:
        if not any(sign in str(error) for sign in SIGNS):
            raise
        raise _error(stages) from None


def _error(stages: Stages) -> PqExportError:
    name = stages.records[-1].name if stages.records else "calibration"
    return PqExportError("ran out of memory", where=f"stage '{name}'", cure=CURES.get(name, OTHERWISE))
