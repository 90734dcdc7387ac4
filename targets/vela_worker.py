"""The process in which :mod:`pq_export.targets.vela` runs Vela: ``python vela_worker.py REQUEST``.

The request, a JSON file, has Vela's ``arguments`` and ``result``. Imports nothing of pq_export.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(path: Path) -> int:
    from ethosu.vela.vela import main as vela

    request = json.loads(path.read_text(encoding="utf-8"))
    code = vela(request["arguments"]) or 0
    if not code:
        Path(request["result"]).write_text("{}", encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
