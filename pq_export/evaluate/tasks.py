"""Run tasks of lm-eval on a subject. Imported only where lm-eval is installed."""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from pq_export.errors import PqExportError, UsageError
from pq_export.evaluate.adapter import Adapter
from pq_export.evaluate.subject import Subject
from pq_export.stages import Stages


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    ``filter`` is how lm-eval read the answer ("none": as it is); ``stderr`` may be missing; ``samples`` are
    the documents used.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    num_fewshot: int | None


class Tasks(TaskManager):  # type: ignore[misc]  # lm-eval is untyped
    """lm-eval's own tasks and those whose YAML files lie in ``include_path``; loading fails with one line.

    ``defaults``: False leaves lm-eval's own out, whose index takes seconds.
    """

    def __init__(self, include_path: Path | None = None, defaults: bool = True):
        if include_path is not None and not include_path.is_dir():
            raise UsageError("is not a directory", where=include_path, cure="Give the folder of your task YAML files.")
        with _quiet():
            super().__init__(
                include_path=None if include_path is None else str(include_path), include_defaults=defaults
            )

    def named(self, names: list[str]) -> list[str]:
        """The tasks, groups and tags that ``names`` mean; ``*`` stands for anything.

        Raises :class:`UsageError` for a name that does not exist.
        """
        for name in names:
            if not self.match_tasks([name]):
                near = difflib.get_close_matches(name, self.all_tasks)
                cure = f"Near it: {', '.join(near)}." if near else "'lm-eval ls tasks' lists them."
                raise UsageError(f"unknown task '{name}'", cure=f"{cure} Your own need --include-path.")
        return list(self.match_tasks(names))

    def load(self, tasks: Any) -> Any:
        """lm-eval calls this; a newer one, at least."""
        with _one_line(tasks):
            return super().load(tasks)

    def load_task_or_group(self, tasks: Any = None) -> Any:
        """The same in lm-eval up to 0.4.11."""
        with _one_line(tasks):
            return super().load_task_or_group(tasks)


def evaluate(
    subject: Subject,
    tasks: Tasks,
    names: list[str],
    stages: Stages,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
) -> tuple[list[TaskScore], int]:
    """Scores of the tasks ``names``, and how many requests lost their beginning to the context's length.

    ``limit``: the first documents of each task only. ``num_fewshot``: examples in front of each question
    (None: as the task says). Raises :class:`PqExportError` where a task's dataset cannot be loaded.
    """
    with _quiet(), stages.stage(f"evaluate {', '.join(names)}"):
        model = Adapter(subject, batch_size, stages.progress)
        results = simple_evaluate(
            model, tasks=names, num_fewshot=num_fewshot, limit=limit, task_manager=tasks, log_samples=False
        )
    return scores_of(results), model.truncated


@contextlib.contextmanager
def _one_line(tasks: Any) -> Iterator[None]:
    """Loading a task fetches its dataset, which fails in the ways of five libraries."""
    name = ", ".join(map(str, tasks)) if isinstance(tasks, list) else str(tasks)
    try:
        yield
    except PqExportError:
        raise
    except ImportError as error:
        raise PqExportError(f"needs the package {error.name}", where=name, cure=f"pip install {error.name}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise PqExportError(
            f"the task or its dataset cannot be loaded ({type(error).__name__}: {reason})",
            where=name,
            cure="Check the network and the task's YAML file.",
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries say on standard error what our own progress, table and errors say."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "evaluate", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def scores_of(results: dict[str, Any]) -> list[TaskScore]:
    """Scores from the dictionary that lm-eval returns."""
    scores = []
    for task, row in results["results"].items():
        for key, value in row.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = row.get(f"{metric}_stderr,{filter_name}")
            samples = results.get("n-samples", {}).get(task, {}).get("effective") or row.get("sample_len", 0)
            scores.append(
                TaskScore(
                    task,
                    metric,
                    filter_name,
                    float(value),
                    float(stderr) if isinstance(stderr, (int, float)) else None,
                    int(samples),
                    results.get("n-shot", {}).get(task),
                )
            )
    return scores
