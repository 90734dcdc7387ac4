"""Models through one process of TensorRT for RTX."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

PROCESS = Path(__file__).with_name("rtx_process.py")


@dataclass
class Rtx:
    """``rtx([(model, ["SM86"]), ...])`` -> what ``rtx_process.py`` says of each, in one process for all."""

    library: Path
    environment: dict[str, str]
    directory: Path

    def __call__(self, tasks: list[tuple[onnx.ModelProto, list[str]]]) -> list[dict[str, Any]]:
        written = []
        for i, (model, targets) in enumerate(tasks):
            path = self.directory / f"{i}.onnx"
            onnx.save(model, path)
            written.append({"onnx": str(path), "targets": targets})
        command = [sys.executable, str(PROCESS), str(self.library), json.dumps(written)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
        return json.loads(done.stdout.splitlines()[-1])
