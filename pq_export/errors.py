"""The errors a user can cause or cure, and the exit codes of the command line."""

from __future__ import annotations

EXIT_ERROR, EXIT_USAGE, EXIT_BELOW_THRESHOLD = 1, 2, 3
EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT


class PqExportError(Exception):
    """Something the user can act on: shown as one line, without a traceback, exit code 1.

    ``what`` happened, ``where`` (a path, tensor or layer name; may be empty) and the ``cure``.
    """

    exit_code = EXIT_ERROR

    def __init__(self, what: str, *, where: object = "", cure: str = ""):
        self.what, self.where, self.cure = what, str(where), cure
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return " ".join(f"{text}. {self.cure}".split()) if self.cure else " ".join(text.split())


class UsageError(PqExportError):
    """The command line contradicts itself: exit code 2."""

    exit_code = EXIT_USAGE


class Interrupted(PqExportError):
    """Ctrl-C at a point where going on takes another command than the one that was interrupted."""

    exit_code = EXIT_INTERRUPTED


class IntegrityError(PqExportError):
    """A file is damaged, altered, from a newer version, or belongs to something else."""
