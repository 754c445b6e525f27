"""How the commands of flows end: an error that a user can meet is one line on stderr and exit code 1."""

import sys

import typer

from modelstock.errors import ModelstockError


def run_command(app: typer.Typer) -> None:
    """Run a command with this process's arguments."""
    try:
        app(standalone_mode=True)
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
