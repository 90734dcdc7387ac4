"""Logs of compilers that run in processes of their own."""

from __future__ import annotations

from pathlib import Path

from pq_export.targets.worker_process import new_log


def test_two_commands_write_two_logs(tmp_path: Path) -> None:
    first, second, third = (new_log(tmp_path, "sm8650.log") for _ in range(3))
    assert [path.name for path in (first, second, third)] == ["sm8650.log", "sm8650-2.log", "sm8650-3.log"]
    first.unlink()
    assert new_log(tmp_path, "sm8650.log") == first and new_log(tmp_path, "q_proj.1.log").name == "q_proj.1.log"
    assert new_log(tmp_path, "q_proj.1.log").name == "q_proj.1-2.log"
