"""Outputs appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pq_export.errors import PqExportError


def check_output(path: Path, force: bool, source: Path | None = None) -> None:
    """Refuse, before any work, an output that could not or should not be written. ``source`` is what is read."""
    if path.name in ("", ".."):
        raise PqExportError("is not a name for a new directory", where=path, cure="Give another -o.")
    if source is not None and source.exists() and source.resolve().is_relative_to(path.resolve()):
        raise PqExportError("holds the input, which writing would delete", where=path, cure="Give another -o.")
    if path.is_file() or path.is_symlink():
        raise PqExportError("is a file; the output is a directory", where=path, cure="Give another -o.")
    if path.is_dir() and any(path.iterdir()) and not force:
        raise PqExportError("already exists", where=path, cure="Give another -o, or --force to replace it.")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise PqExportError("is a file, so nothing can be written below it", where=parent, cure="Give another -o.")
    probe = path if path.is_dir() else parent
    if not os.access(probe, os.W_OK | os.X_OK) or not os.access(parent, os.W_OK | os.X_OK):
        raise PqExportError("is not writable", where=probe, cure="Give another -o or change its permissions.")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A fresh directory beside ``path`` that becomes ``path`` when the block ends well, else vanishes."""
    part = path.with_name(f".{path.name}.writing")
    with errors_of(path):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    try:
        with errors_of(path):
            yield part
            replace_directory(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def replace_directory(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; an old directory there is moved away first and then removed."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write one file so that it is either the old or the new content."""
    part = path.with_name(f".{path.name}.writing")
    try:
        with errors_of(path):
            part.write_bytes(content)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into one line that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        cures = {
            errno.ENOSPC: "Free some space, or give an -o on another disk.",
            errno.EDQUOT: "Free some space, or give an -o on another disk.",
            errno.EACCES: "Give an -o that you may write.",
            errno.EROFS: "Give an -o that you may write.",
        }
        raise PqExportError(
            f"cannot be written: {error.strerror}", where=path, cure=cures.get(error.errno, "")
        ) from None
