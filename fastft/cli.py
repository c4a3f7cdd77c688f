"""Entry point of the command line. The commands are in ``fastft.commands``."""

from __future__ import annotations

import sys

__all__ = ["app"]


def app() -> None:
    """Runs ``fastft``; says what to install where only the kernels are."""
    try:
        from fastft.commands import app as commands
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "click"):
            raise
        sys.exit(
            f"fastft: the command line needs {error.name}, which is not installed. "
            "Run: pip install 'fastft[train]'"
        )
    commands(prog_name="fastft")


if __name__ == "__main__":
    app()
