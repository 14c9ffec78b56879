"""The command line: ``python -m overspill`` and ``overspill``."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Runs the command line of this process; the answer is its exit status."""
    from overspill import _native

    run = getattr(_native, "run", None)
    if run is None:
        told = "overspill: this build has no command line: `pip install .` in a clone of the repository builds one"
        print(told, file=sys.stderr)
        return 2
    # Python would hold the signal back until the command is over; the command has its own way to end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return int(run(["overspill", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
