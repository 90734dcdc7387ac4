"""Whether a text may be evaluated on: what was calibrated on may not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pq_export.errors import PqExportError
from pq_export.stages import Stages


def refuse_contamination(tokenizer: Any, text: Path | None, count: int, calib_data: str, stages: Stages) -> None:
    """Raise :class:`UsageError` if the first ``count`` tokens of the evaluation ``text`` were calibrated on.

    A smaller overlap is a warning.
    """
    from pq_export.calib.text import read_text, read_texts, tokenize
    from pq_export.validate.contamination import NGRAM, assert_uncontaminated

    if text is None:  # the built-in texts share nothing
        return
    name, tokens = text.name, tokenize(tokenizer, read_text(str(text)))[: max(count, NGRAM)]

    try:
        sources = read_texts(calib_data)
    except PqExportError as error:  # calibrated elsewhere: the text need not be here any more
        stages.progress.warn(f"{name} is not compared with the calibration text ({error.what})")
        return
    for source, content in sources.items():
        assert_uncontaminated(
            tokenize(tokenizer, content),
            tokens,
            calibration=source,
            evaluation=name,
            note=stages.progress.warn,
            decode=tokenizer.decode,
        )
