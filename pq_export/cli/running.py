"""What the commands run in: the screen, the stages, and what is said of failures that have a stage or a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from pq_export.cli.console import Screen
from pq_export.stages import Stages


@contextlib.contextmanager
def running_stages(flags: dict[str, Any]) -> Iterator[Stages]:
    """Stages on the screen, for a command; running out of memory is said with the stage."""
    from pq_export.calib.memory import memory_errors
    from pq_export.calib.recipe import StepError

    with Screen(flags["as_json"], flags["verbose"]) as screen:
        stages = Stages(screen)
        try:
            with memory_errors(stages):
                yield stages
        except StepError as error:
            raise error.in_recipe(flags.get("recipe")) from None
