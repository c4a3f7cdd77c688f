"""``python -m fastft``."""

from fastft.cli import app

app()
