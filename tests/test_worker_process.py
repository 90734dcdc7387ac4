"""Compilers that run in processes of their own: their logs, and what they say of themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pq_export.targets import worker_process
from pq_export.targets.worker_process import new_log


def test_two_commands_write_two_logs(tmp_path: Path) -> None:
    first, second, third = (new_log(tmp_path, "sm8650.log") for _ in range(3))
    assert [path.name for path in (first, second, third)] == ["sm8650.log", "sm8650-2.log", "sm8650-3.log"]
    first.unlink()
    assert new_log(tmp_path, "sm8650.log") == first and new_log(tmp_path, "q_proj.1.log").name == "q_proj.1.log"
    assert new_log(tmp_path, "q_proj.1.log").name == "q_proj.1-2.log"


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux alone counts it this way")
@pytest.mark.parametrize("worker", ["openvino", "qnn", "rknn", "rtx", "trt"])
def test_a_worker_counts_its_own_memory(worker: str) -> None:
    """ru_maxrss would be what this process needed, were that more."""
    path = Path(worker_process.__file__).with_name(f"{worker}_worker.py")
    script = f"import runpy; print(runpy.run_path({str(path)!r})['peak_rss']())"
    ballast = np.ones(100_000_000)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 5_000_000 < int(done.stdout) < ballast.nbytes / 2
