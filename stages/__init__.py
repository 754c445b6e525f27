"""DVC's stages: one file, one reproducible step. Each reads params and inputs, makes one core call, writes outputs."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from modelstock.errors import ModelstockError
from modelstock.notices import printed


def run(main: Callable[..., Any]) -> None:
    """Run a stage's `main` as a command; an error a user can fix is one line on stderr and exit code 1."""
    try:
        with printed():
            typer.run(main)
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
