"""`python -m pepr_profiler` is the command line too."""

from __future__ import annotations

import sys


def main() -> None:
    """The console script."""
    from pepr_profiler.commands import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
