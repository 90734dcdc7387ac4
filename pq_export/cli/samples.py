"""Text that shows a target of fixed shapes the ranges of what calibration gave no scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pq_export.calibration import ASSETS_NAME, Calibration
from pq_export.errors import PqExportError
from pq_export.stages import Stages

SAMPLES, SAMPLE_LENGTH = 8, 256  # windows, and their tokens


def sample_windows(calibration: Calibration, calibration_directory: Path, stages: Stages) -> np.ndarray:
    """Windows [n, S] of token ids of the text that was calibrated on, or of the built-in one if that is not here."""
    from transformers import AutoTokenizer

    from pq_export.calib.text import builtin_text, random_crops, read_texts, tokenize

    try:
        text = "\n".join(read_texts(calibration.plan["calib_data"]).values())
    except PqExportError as error:  # calibrated elsewhere: the text need not be here any more
        stages.progress.warn(f"ranges are those of the built-in text ({error.what})")
        text = builtin_text()
    tokenizer = AutoTokenizer.from_pretrained(calibration_directory / ASSETS_NAME, local_files_only=True)
    tokens = tokenize(tokenizer, text)
    context = calibration.decoder.max_position_embeddings - len(calibration.prefix.token_ids)
    length = min(SAMPLE_LENGTH, context, len(tokens) // 2)
    return np.asarray(random_crops(tokens, SAMPLES, length, calibration.plan["seed"]).numpy())
