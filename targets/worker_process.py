"""A vendor's compiler in a process of its own: what it answers, or one line on why it gave no answer.

The worker is a script that is run by its path with one argument, a JSON file with its request. It writes its result, a
JSON object, to the path that the request calls ``result``: facts, or ``{"error": line, "where": name, "cure": line}``
for what the user can act on. Everything it prints goes to a log that outlives it. A crash of the compiler, a hang and
a lack of memory are then one line each, and the caller goes on.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pq_export.errors import PqExportError

LAST_WORDS = 300  # characters of a log's last line that are shown


@dataclass(frozen=True)
class Worker:
    """``command`` runs it, without the request's path. ``tool`` is its name in messages, ``timeout`` in seconds."""

    tool: str
    command: Sequence[str]
    timeout: float

    def run(
        self,
        request: dict[str, Any],
        folder: Path,
        log: Path,
        where: str,
        environment: Mapping[str, str] | None = None,
        *,
        inside: bool = False,
    ) -> dict[str, Any]:
        """The answer to ``request``; everything the worker leaves in ``folder`` is the caller's.

        ``inside``: it works in ``folder``, for tools that drop files where they are. Paths of the request are absolute.
        Raises :class:`PqExportError` that names ``where`` and the log.
        """
        see = f"The log: {log}."
        path, result = (folder.absolute() / name for name in ("request.json", "result.json"))
        path.write_text(json.dumps(request | {"result": str(result)}), encoding="utf-8")
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    [*self.command, str(path)],
                    cwd=folder if inside else None,
                    env=dict(os.environ if environment is None else environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise PqExportError(
                    f"{self.tool} cannot be started: {error.strerror}", where=self.command[0], cure=see
                ) from None
            with process:
                try:
                    code = process.wait(self.timeout)
                except BaseException as stop:  # also Ctrl-C, which does not reach another session
                    with contextlib.suppress(ProcessLookupError):  # it may just have ended
                        os.killpg(process.pid, signal.SIGKILL)  # with its children, one of which it may wait for
                    if isinstance(stop, subprocess.TimeoutExpired):
                        what = f"{self.tool} took more than {self.timeout:g} s"
                        raise PqExportError(what, where=where, cure=see) from None
                    raise
        if code < 0:
            raise PqExportError(f"{self.tool} ended by {signal_name(-code)}", where=where, cure=see)
        answer = _answer(result)
        if code or answer is None:
            raise PqExportError(f"{self.tool} failed: {last_line(log, code)}", where=where, cure=see)
        if "error" in answer:
            place = f"{where}, {answer['where']}" if answer.get("where") else where
            raise PqExportError(answer["error"].rstrip(". "), where=place, cure=f"{answer.get('cure', '')} {see}")
        return answer


def new_log(folder: Path, name: str) -> Path:
    """An empty file ``name`` in ``folder``, numbered where there is one: another command may be writing it."""
    for number in itertools.count(1):
        path = folder / (name if number == 1 else f"{Path(name).stem}-{number}{Path(name).suffix}")
        with contextlib.suppress(FileExistsError):
            path.open("xb").close()
            break
    return path


def _answer(path: Path) -> dict[str, Any] | None:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def signal_name(number: int) -> str:
    """``SIGKILL``, with what it means."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name}, which the kernel sends when memory runs out" if number == signal.SIGKILL else name


def last_line(log: Path, code: int) -> str:
    """The last line of a log, else the exit code."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:LAST_WORDS] if lines else f"exit code {code}"
