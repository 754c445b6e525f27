"""What holds before DVC touches an output: params.yaml is valid, no other job is at work here, DVC's files are whole.

Stages find this Python by the name `python`.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelstock.files import held
from modelstock.params import load_params

FORCED = Path("scratch/forced")
RWLOCK = Path(".dvc/tmp/rwlock")
DVC_LOCK = Path("dvc.lock")
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


def _set_torn_files_aside() -> None:
    """Move aside what DVC writes in place and a kill has left in part: DVC would refuse to start.

    The list of files in use says nothing of a process that is dead; of the stages that a torn dvc.lock no longer names,
    DVC's run-cache has what they wrote.
    """
    if RWLOCK.is_file() and not _parses(RWLOCK):
        from dvc.lock import make_lock
        from dvc.rwlock import RWLOCK_LOCK

        folder = str(RWLOCK.parent)
        with make_lock(f"{folder}/{RWLOCK_LOCK}", tmp_dir=folder):  # nobody writes it meanwhile
            if not _parses(RWLOCK):
                RWLOCK.unlink(missing_ok=True)
    if DVC_LOCK.is_file() and not _parses(DVC_LOCK):
        torn = DVC_LOCK.with_suffix(".lock.torn")
        os.replace(DVC_LOCK, torn)
        line = f"cut short, as by a kill: moved to {torn}; DVC takes the stages that have run from its run-cache"
        print(f"{DVC_LOCK}: {line}", file=sys.stderr)


def _parses(file: Path) -> bool:
    """Whether DVC can read a file of its own; a conflict that git has written into it is for DVC to refuse."""
    from dvc.rwlock import SCHEMA
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.serialize import parse_yaml

    text = file.read_text(encoding="utf-8", errors="replace")
    if "<<<<<<<" in text:
        return True
    try:
        schema, content = (
            (SCHEMA, json.loads(text)) if file == RWLOCK else (COMPILED_LOCKFILE_SCHEMA, parse_yaml(text, str(file)))
        )
        schema(content)
    except Exception:  # whatever the parsers and DVC's schema raise
        return False
    return True


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
        _set_torn_files_aside()
        yield
