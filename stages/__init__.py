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

from modelstock.errors import AskedToEnd, ModelstockError
from modelstock.files import SCRATCH, held, moved_folders, project
from modelstock.notices import printed
from modelstock.params import load_params
from modelstock.stopping import end


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a stage that runs already: a DVC that was killed leaves it running, and the next DVC starts it again."""
    if os.environ.get("LOCAL_RANK", "0") != "0":  # the first of several processes holds the lock for all
        yield
        return
    words = [Path(sys.argv[0]).stem, *sys.argv[1:]]
    copy = project() != Path.cwd()  # experiments share resume points, and their stages wait for each other
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]
    with held(Path("scratch/running") / f"{words[0]}-{digest}", shlex.join(words), wait=copy):
        yield


def _reach_project() -> None:
    """In the copy that DVC makes for an experiment: resume points, and data that git does not carry, of the project."""
    root = project()
    if root == Path.cwd():
        return
    (root / SCRATCH).mkdir(exist_ok=True)
    for path in (SCRATCH, *load_params().named_files()):
        if not path.is_absolute() and ".." not in path.parts and not path.exists() and (root / path).exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(root / path)


def run(main: Callable[..., Any]) -> None:
    """Run a stage's `main` as a command; an error a user can fix is one line on stderr and exit code 1.

    One that was asked to end and has saved what it has ends with a line and EX_TEMPFAIL; see modelstock.stopping.
    """
    try:
        with printed():
            moved_folders()  # a wrong value is refused also where nothing asks for it
            _reach_project()
            with _alone():
                typer.run(main)
    except AskedToEnd as error:
        end([Path(sys.argv[0]).stem, *sys.argv[1:2]], error)
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
