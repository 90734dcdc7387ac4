"""What a person sees: progress with an estimate, and tables. Progress goes to standard error."""

from __future__ import annotations

import json
import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Screen:
    """A progress display on a terminal, one line a stage elsewhere; nothing at all with ``--json``."""

    def __init__(self, quiet: bool = False, verbose: bool = False):
        self._console = Console(stderr=True, quiet=quiet)
        # With --json too, which is about standard output. One console where there is a progress display to go around.
        self._warnings = Console(stderr=True) if quiet else self._console
        self._verbose = verbose
        self._task: Any = None
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None and kind is None:
            self._finish_task()
        self._progress.stop()

    def _finish_task(self) -> None:
        task = self._progress.tasks[self._progress.task_ids.index(self._task)]
        self._progress.update(self._task, total=task.total or 1, completed=task.total or 1)

    def start(self, title: str, total: int | None) -> None:
        if not self._console.is_terminal:
            self._console.print(f"- {escape(title)}", highlight=False)
            return
        if self._task is not None:
            self._finish_task()
        self._task = self._progress.add_task(escape(title), total=total)

    def advance(self, steps: int = 1) -> None:
        if self._task is not None:
            self._progress.advance(self._task, steps)

    def note(self, text: str) -> None:
        if self._verbose:
            self._console.print(f"    {escape(text)}", highlight=False)

    def warn(self, text: str) -> None:
        self._warnings.print(f"warning: {escape(text)}", highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    json.dump(document, sys.stdout, indent=1)
    sys.stdout.write("\n")


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is text and the others numbers; cells are not markup."""
    result = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        result.add_row(*(escape(cell) for cell in row))
    return result


def output_console() -> Console:
    """Standard output for results; as wide as its tables need when it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def bytes_text(count: float) -> str:
    """``123456789`` -> ``117.7 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def seconds_text(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 60 else f"{whole // 60} min {whole % 60:02d} s"
