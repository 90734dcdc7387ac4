"""Run the command line in this process, as a user would see it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import pytest

from pq_export.cli import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class Runner:
    """``pq("targets")`` -> exit code, standard output and standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *args: object) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["pq-export", *map(str, args)])
        self._capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = self._capsys.readouterr()
        return Result(int(str(code)), out, err)

    def refuses(self, *args: object, code: int = 1, says: tuple[str, ...] = ()) -> str:
        """The command must fail with ``code`` and one clear line that holds all of ``says``."""
        result = self(*args)
        assert result.code == code, result
        assert "Traceback" not in result.err
        lines = [line for line in result.err.splitlines() if "error:" in line.lower()]
        assert len(lines) == 1, result.err
        for part in says:
            assert part in lines[0], lines[0]
        return lines[0]
