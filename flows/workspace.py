"""What holds before DVC touches an output: params.yaml is valid, no other job is at work here, DVC's state is private.

`python -m flows.workspace COMMAND...` makes sure of it and then becomes the command, which holds the lock to its end.
"""

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelstock.errors import ModelstockError
from modelstock.files import held
from modelstock.params import load_params

LOCK = Path(".dvc/tmp/modelstock.lock")
SITE = Path(".dvc/tmp/site")


def _private() -> None:
    """Let DVC keep what it knows about files in a private folder: its own choice is one that everyone may write to."""
    SITE.mkdir(parents=True, exist_ok=True)
    SITE.chmod(0o700)
    os.environ.setdefault("DVC_SITE_CACHE_DIR", str(SITE.absolute()))


@contextmanager
def ready(command: str) -> Iterator[int]:
    """Check params.yaml, and hold the workspace's lock for the block; yields the lock's file descriptor.

    Raises:
        ParamsError: as load_params. DVC deletes a stage's outputs before the stage could refuse.
        BusyError: another job is at work here.
    """
    if Path("params.yaml").exists():
        load_params()
    _private()
    with held(LOCK, command) as lock:
        yield lock


def main(command: list[str]) -> None:
    """Become the command; the lock goes with it."""
    with ready(shlex.join([Path(command[0]).name, *command[1:]])) as lock:
        os.set_inheritable(lock, True)
        sys.stdout.flush()
        os.execvp(command[0], command)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
