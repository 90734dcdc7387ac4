"""The process in which :mod:`pq_export.targets.tosa_reference` runs graphs: ``python tosa_worker.py REQUEST``.

The request, a JSON file, has ``files``, TOSA graphs, a ``folder`` and ``result``. Number n gets the input ``n.x.npy``
of the folder; its output goes, as bytes, to ``n.y.npy``. Imports nothing of pq_export: it needs NumPy and tosa-tools.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np


def main(path: Path) -> None:
    import tosa_reference_model

    request = json.loads(path.read_text(encoding="utf-8"))
    folder = Path(request["folder"])
    for number, file in enumerate(request["files"]):
        x = np.load(folder / f"{number}.x.npy")
        outputs, status = tosa_reference_model.run(Path(file).read_bytes(), [x], tosa_level="EIGHTK")[:2]
        if status != tosa_reference_model.GraphStatus.TOSA_VALID:
            raise SystemExit(f"{file}: {status}")
        np.save(folder / f"{number}.y.npy", np.frombuffer(bytes(outputs[0]), np.uint8))
    Path(request["result"]).write_text("{}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
