"""The ``ringfence`` command, also as ``python -m ringfence.cli``."""

from __future__ import annotations

from typing import NoReturn

from ringfence.cli.bytecode import keep_bytecode


def main() -> NoReturn:
    """Run the command line and exit with its status."""
    keep_bytecode()
    from ringfence.cli import app

    app.main()


if __name__ == "__main__":
    main()
