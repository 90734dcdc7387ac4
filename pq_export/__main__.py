"""``python -m pq_export`` is ``pq-export``."""

from pq_export.cli import main

main()
