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
    import click

    from pq_export.cli.app import cli
    from pq_export.errors import EXIT_INTERRUPTED, PqExportError

    try:
        code = cli.main(standalone_mode=False)
        if isinstance(code, int):  # --help and --version end through click's own exit
            sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except PqExportError as error:
        print(f"pq-export: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print(
            "\npq-export: interrupted. Finished stages are kept; the same command goes on from them.", file=sys.stderr
        )
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as in `pq-export generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # an unreadable directory, a name that is too long, ...
        print(f"pq-export: error: {error.filename or ''}: {error.strerror or error}", file=sys.stderr)
        sys.exit(1)
