"""Entry point of the installed command, and of ``python -m partlens``."""

from __future__ import annotations

import sys


def start() -> None:
    """Run the command line; Ctrl-C ends it in one line from the first import on."""
    try:
        from partlens.cli import program

        program()
    except KeyboardInterrupt:
        sys.stderr.write("partlens: stopped\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    start()
