"""Files that are whole or absent, and whose bytes repeat; and where files lie on this machine."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelstock.errors import BusyError, ParamsError, RoomError

# A full disk, a quota, a limit of file sizes.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# How libraries that write by themselves report one: safetensors repeats the system's text, torch has its own.
_FULL_TEXTS = (*map(os.strerror, _FULL), "unexpected pos", "PytorchStreamWriter failed writing")

# What may name a split: a file's name on every system, and one that DVC can tell from its own `.` and `@`.
NAME = r"[a-z0-9][a-z0-9_-]{0,99}"
# Resume points and caches, each named for all that it depends on: removing it costs time and nothing else. A stage that
# is forced to run has an empty folder of its own: it goes on from nothing.
SCRATCH = Path(os.environ.get("MODELSTOCK_SCRATCH") or "scratch")


def project() -> Path:
    """The project's folder; that of the project itself in a copy of it that DVC makes for an experiment.

    `dvc exp run --temp` and `--queue` remove their copy, with everything in it that DVC does not know.
    """
    root, here = os.environ.get("DVC_ROOT"), Path.cwd()
    copies = Path(os.path.realpath(root)) / ".dvc/tmp/exps" if root else None
    return Path(root) if root and copies in here.resolve().parents else here


def moved_folders() -> dict[Path, Path]:
    """Where folders that settings and manifests name lie on this machine: MODELSTOCK_PATHS, `from=to` pairs.

    Raises:
        ParamsError: it says something else, or two things of one folder.
    """
    folders: dict[Path, Path] = {}
    text = os.environ.get("MODELSTOCK_PATHS", "")
    for pair in text.split(os.pathsep) if text else []:
        named, _, here = pair.partition("=")
        problem = None
        if not os.path.isabs(named) or not os.path.isabs(here) or "=" in here:
            problem = repr(pair)
        elif folders.setdefault(Path(named), Path(here)) != Path(here):
            problem = f"two places for {named}"
        if problem:
            raise ParamsError(
                "MODELSTOCK_PATHS",
                got=problem,
                expected=f"/from=/to with absolute paths, pairs separated by {os.pathsep!r}, each folder once",
                cure="correct it",
            )
    return folders


def on_this_machine(path: Path | str) -> Path:
    """Where a file or folder lies here: in the longest of `moved_folders` that its absolute path begins with, if any.

    Raises:
        ParamsError: see `moved_folders`.
    """
    path = Path(path)
    around = [named for named in moved_folders() if path.is_absolute() and path.is_relative_to(named)]
    if not around:
        return path
    named = max(around, key=lambda folder: len(folder.parts))
    return moved_folders()[named] / path.relative_to(named)


def as_named(lines: Iterable[str], path: Path | str) -> list[str]:
    """Lines to be kept about a file, with its path as it is named: so every machine writes the same."""
    here, named = (" ".join(str(text).split()) for text in (on_this_machine(path), path))
    return [line if on_this_machine(path) == Path(path) else line.replace(here, named) for line in lines]


def is_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of room, also where a library wraps the system's error."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(text in str(error) for text in _FULL_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_room(path: Path, error: BaseException) -> RoomError:
    """A write of `path` that failed for want of room, as one line: its folder, and the bytes written and free."""
    folder = path.parent
    facts = [error.strerror or "no room" if isinstance(error, OSError) else os.strerror(errno.ENOSPC)]
    if path.is_file():
        facts.append(f"{path.stat().st_size:,} bytes written of a file")
    if folder.is_dir():
        facts.append(f"{shutil.disk_usage(folder).free:,} bytes free")
    return RoomError(
        folder, got=", ".join(facts), expected="room for it", cure="make room, raise the limit, or write elsewhere"
    )


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Writes of `path` that fail for want of room are one line.

    Raises:
        RoomError: one did.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, RoomError) or not is_full(error):
            raise
        raise no_room(path, error) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a sibling temporary path; on success it is flushed to disk and renamed to `path`, else removed.

    A process killed inside the block leaves `path` as it was. The temporary name carries the process
    id, so two writers never share one.

    Raises:
        RoomError: there is no room for the file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(path: Path, command: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock for the block, as `command`. It ends with the process, however that ends.

    Raises:
        BusyError: another process holds it, and `wait` is not set; which one, and since when.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.read(lock, 4096).decode(errors="replace")
            raise BusyError(
                Path.cwd(),
                got=f"another job at work: {holder or 'it has just begun'}",
                expected="one at a time",
                cure="wait for its end, or end that process",
            ) from error
        os.ftruncate(lock, 0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(lock, f"process {os.getpid()}, `{command}`, since {now}".encode())
        yield
    finally:
        os.close(lock)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or, on another file system, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def dump_json(value: Any) -> str:
    """JSON with sorted keys and a final newline; NaN and infinity are refused: no reader agrees on them."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `dump_json(value)` to `path`, whole or not at all."""
    text = dump_json(value)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the sha256 of its other members, so that a change is noticed; see `is_intact`."""
    plain = json.loads(dump_json(value))  # what a reader finds: text as names, lists for tuples
    return {**plain, "sha256": hashlib.sha256(dump_json(plain).encode()).hexdigest()}


def is_intact(value: object) -> bool:
    """Whether a JSON object is what `sealed` gave."""
    return isinstance(value, dict) and value == sealed({name: v for name, v in value.items() if name != "sha256"})


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
