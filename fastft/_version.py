"""The version, read from the installed package so that it is written once, in pyproject.toml."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastft")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"
