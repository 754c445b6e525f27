"""Files that are whole or absent, and whose bytes repeat; and where files lie that only save time."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Resume points and caches, each named for all that it depends on: removing it costs time and nothing else.
SCRATCH = Path("scratch")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a sibling temporary path; on success it is flushed to disk and renamed to `path`, else removed.

    A process killed inside the block leaves `path` as it was. The temporary name carries the process
    id, so two writers never share one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
