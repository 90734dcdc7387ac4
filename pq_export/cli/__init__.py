"""The command line. Heavy imports live inside the commands: ``--help`` answers at once."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point: user errors become one line, Ctrl-C says how to go on."""
    # The libraries' own progress bars would write over ours; tqdm reads this when it is imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from pq_export.cli.app import cli
    from pq_export.errors import PqExportError

    try:
        cli.main(standalone_mode=True)
    except PqExportError as error:
        print(f"pq-export: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\npq-export: interrupted. Finished stages are kept; the same command goes on from them.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
