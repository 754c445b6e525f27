"""The command `modelstock`."""

from modelstock.cli.commands import main

__all__ = ["main"]
