"""Entry point of the installed command, and of ``python -m partlens``."""

from __future__ import annotations

import sys


def program() -> None:
    """Run the command line; Ctrl-C ends it in one line from the first import on."""
    try:
        from partlens.cli import main

        code = main()
    except KeyboardInterrupt:
        sys.stderr.write("partlens: stopped\n")
        code = 130
    raise SystemExit(code)


if __name__ == "__main__":
    program()
