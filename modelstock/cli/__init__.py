"""The command `modelstock`."""

from modelstock.cli.main import main

__all__ = ["main"]
