"""Outputs appear whole or not at all, and an output that cannot be written is refused in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pq_export.errors import EXIT_ERROR, PqExportError
from pq_export.files import check_output, errors_of, new_directory, replace_directory, write_atomically


def tree(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): p.read_text() if p.is_file() else "/" for p in sorted(path.rglob("*"))}


def old_output(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    (path / "old.txt").write_text("old")
    return path


def test_new_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_directory(path) as directory:
        (directory / "a.txt").write_text("a")
        assert directory != path and not path.exists()
        assert directory.stat().st_dev == tmp_path.stat().st_dev  # a rename, not a copy
    assert tree(tmp_path) == {"deep": "/", "deep/out": "/", "deep/out/a.txt": "a"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, PqExportError])
def test_an_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), new_directory(tmp_path / "out") as directory:
        (directory / "a.txt").write_text("a")
        raise error("stop")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_exception_keeps_the_old_content(tmp_path: Path, error: type[BaseException]) -> None:
    path = old_output(tmp_path)
    with pytest.raises(error), new_directory(path) as directory:
        (directory / "a.txt").write_text("a")
        raise error("stop")
    assert tree(tmp_path) == {"out": "/", "out/old.txt": "old"}


def test_new_content_replaces_all_of_the_old(tmp_path: Path) -> None:
    path = old_output(tmp_path)
    with new_directory(path) as directory:
        (directory / "a.txt").write_text("a")
    assert tree(tmp_path) == {"out": "/", "out/a.txt": "a"}


def test_leavings_of_a_killed_run_do_not_leak_into_the_output(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(RuntimeError), new_directory(path) as directory:
        part = directory
        raise RuntimeError
    part.mkdir()
    (part / "half.txt").write_text("half")
    with new_directory(path) as directory:
        (directory / "a.txt").write_text("a")
    assert tree(tmp_path) == {"out": "/", "out/a.txt": "a"}


def test_a_failed_rename_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new directory cannot take the old one's place (say, the path became a mount point): the old one stays."""
    path = old_output(tmp_path)
    rename = os.rename

    def fails_onto_output(source: Path, target: Path) -> None:
        if Path(target) == path and Path(source).name.endswith(".writing"):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails_onto_output)
    monkeypatch.setattr(os, "replace", fails_onto_output)
    with pytest.raises(PqExportError), new_directory(path) as directory:
        (directory / "a.txt").write_text("a")
    assert path.is_dir() and tree(path) == {"old.txt": "old"}


def test_replace_directory(tmp_path: Path) -> None:
    path, new = old_output(tmp_path), tmp_path / "new"
    new.mkdir()
    (new / "n.txt").write_text("n")
    replace_directory(new, path)
    assert tree(tmp_path) == {"out": "/", "out/n.txt": "n"}


def test_output_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    for force in (False, True):
        with pytest.raises(PqExportError, match="is a file"):
            check_output(path, force)
    assert path.read_text() == "mine"


def test_output_that_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "target")
    with pytest.raises(PqExportError) as caught:
        check_output(tmp_path / "out", force=True)
    assert str(tmp_path / "out") in str(caught.value)


def test_output_that_holds_something(tmp_path: Path) -> None:
    path = old_output(tmp_path)
    with pytest.raises(PqExportError, match="already exists") as caught:
        check_output(path, force=False)
    assert "--force" in str(caught.value) and caught.value.exit_code == EXIT_ERROR
    check_output(path, force=True)
    assert tree(tmp_path) == {"out": "/", "out/old.txt": "old"}  # looking changes nothing


def test_outputs_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new", "deep/down/new"):
        check_output(tmp_path / name, force=False)
    assert tree(tmp_path) == {"empty": "/"}


def test_relative_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_output(Path("out"), force=False)
    with new_directory(Path("out")) as directory:
        (directory / "a.txt").write_text("a")
    assert tree(tmp_path) == {"out": "/", "out/a.txt": "a"}


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PqExportError, match="nothing can be written below"):
        check_output(tmp_path / "file" / "deep" / "out", force=False)


@pytest.mark.parametrize("name", ["out", "deep/down/out"])
def test_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    parent = tmp_path / "locked"
    parent.mkdir()
    if os.geteuid() == 0:  # root may write everywhere: say otherwise
        access = os.access
        monkeypatch.setattr(os, "access", lambda p, mode, **k: Path(p) != parent and access(p, mode, **k))
    else:
        parent.chmod(0o555)
    with pytest.raises(PqExportError, match="not writable") as caught:
        check_output(parent / name, force=False)
    assert str(parent) in str(caught.value)
    check_output(tmp_path / "elsewhere", force=False)


def test_output_that_exists_in_an_unwritable_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacing a directory renames it, which its parent must allow."""
    parent = tmp_path / "locked"
    (parent / "out").mkdir(parents=True)
    if os.geteuid() == 0:
        access = os.access
        monkeypatch.setattr(os, "access", lambda p, mode, **k: Path(p) != parent and access(p, mode, **k))
    else:
        parent.chmod(0o555)
    with pytest.raises(PqExportError, match="not writable"):
        check_output(parent / "out", force=True)


def full_disk(*args: object, **kwargs: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_in_a_directory_names_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old_output(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(PqExportError) as caught, new_directory(path) as directory:
            (directory / "a.bin").write_bytes(b"a")
    message = str(caught.value)
    assert str(path) in message and ".writing" not in message and "\n" not in message
    assert os.strerror(errno.ENOSPC) in message and "Free some space" in message
    assert tree(tmp_path) == {"out": "/", "out/old.txt": "old"}


def test_full_disk_in_a_file_names_it_and_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layer.json"
    write_atomically(path, b"old")
    real = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        real(self, content[:1])
        return full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(PqExportError, match=r"layer\.json: cannot be written"):
            write_atomically(path, b"new")
    assert tree(tmp_path) == {"layer.json": "old"}
    write_atomically(path, b"new")
    assert tree(tmp_path) == {"layer.json": "new"}


def test_a_file_is_never_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "layer.json"
    path.write_bytes(b"old")
    before = path.stat().st_ino
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and path.stat().st_ino != before


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), errors_of(tmp_path):
        _ = 1 // 0
    with pytest.raises(OSError, match="no number") as caught, errors_of(tmp_path):
        raise OSError("no number")
    assert not isinstance(caught.value, PqExportError)
