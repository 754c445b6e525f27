"""What holds before DVC touches an output: params.yaml is valid, no other job is at work here, DVC's state is private.

Stages find this Python by the name `python`.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelstock.files import held
from modelstock.params import load_params

FORCED = Path("scratch/forced")
LOCK = Path(".dvc/tmp/modelstock.lock")
SITE = Path(".dvc/tmp/site")


def _private() -> None:
    """Let DVC keep what it knows about files in a private folder: its own choice is one that everyone may write to."""
    SITE.mkdir(parents=True, exist_ok=True)
    SITE.chmod(0o700)
    os.environ.setdefault("DVC_SITE_CACHE_DIR", str(SITE.absolute()))


def _find_our_python() -> None:
    """Let stages, which call `python`, find this one first."""
    folder, path = str(Path(sys.executable).parent), os.environ.get("PATH", "")
    if path.split(os.pathsep)[0] != folder:
        os.environ["PATH"] = f"{folder}{os.pathsep}{path}"


@contextmanager
def scratch(name: str, *, forced: bool) -> Iterator[dict[str, str]]:
    """What stages find in their environment in the block: nothing, or, where they are forced to run, an empty scratch
    folder, so that they run all their steps, also where a kill has left a resume point."""
    if not forced:
        yield {}
        return
    folder = FORCED.absolute() / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield {"MODELSTOCK_SCRATCH": str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ready(command: str) -> Iterator[None]:
    """Check params.yaml, set what DVC and its stages find in the environment, and hold the workspace's lock.

    Raises:
        ParamsError: as load_params. DVC deletes a stage's outputs before the stage could refuse.
        BusyError: another job is at work here.
    """
    if Path("params.yaml").exists():
        load_params()
    _private()
    _find_our_python()
    with held(LOCK, command):
        yield
