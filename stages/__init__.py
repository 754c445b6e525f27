"""DVC's stages: one file, one reproducible step. Each reads params and inputs, makes one core call, writes outputs."""

import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from modelstock.errors import ModelstockError
from modelstock.files import SCRATCH, held
from modelstock.notices import printed


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a stage that runs already: a DVC that was killed leaves it running, and the next DVC starts it again."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # the first of several processes holds the lock for all
        yield
        return
    words = [Path(sys.argv[0]).stem, *sys.argv[1:]]
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
    with held(SCRATCH / "running" / f"{words[0]}-{digest}", shlex.join(words)):
        yield


def run(main: Callable[..., Any]) -> None:
    """Run a stage's `main` as a command; an error a user can fix is one line on stderr and exit code 1."""
    try:
        with printed(), _alone():
            typer.run(main)
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
