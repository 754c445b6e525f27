"""The one reader of tar archives: what it lists is all of an archive, or the archive is refused.

tarfile itself takes the first thing that is no member for the end of an archive. Here the end must be one: two blocks
of zeros, and nothing but zeros after them. So an archive that is damaged or ends early is not taken for a smaller one,
and archives that were joined are not taken for the first of them.
"""

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from modelstock.errors import DataError

Member = tuple[tarfile.TarFile, tarfile.TarInfo, str]  # an archive, one of its heads, and that file's path
AGAIN = "get the archive again, or leave the file out of it"
_DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError)
_PADDING = 64 << 20  # bytes of zeros after an archive's end


def refuse(place: object, got: str, expected: str, cure: str = AGAIN) -> DataError:
    """The refusal of an archive or of something in it."""
    return DataError(place, got=got, expected=expected, cure=cure)


def safe_path(archive: Path, name: str) -> str:
    """A member's path without `.` and empty parts; one that leads out of the archive is refused."""
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        raise refuse(f"{archive}, member {name!r}", "a path that leads out of the archive", "relative paths without ..")
    return "/".join(part for part in name.split("/") if part not in ("", "."))


class _Part:
    """What tarfile needs of a file, up to its byte `end` where given; `last` is what was read last."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, end: int | None) -> None:
        self._stream, self._end, self.last = stream, end, b""

    def read(self, size: int = -1) -> bytes:
        if self._end is not None:
            left = max(0, self._end - self._stream.tell())
            size = left if size < 0 else min(size, left)
        self.last = self._stream.read(size)
        return self.last

    def seek(self, place: int, whence: int = 0) -> int:
        return self._stream.seek(place, whence)

    def tell(self) -> int:
        return self._stream.tell()


def members(archive: Path, stream: IO[bytes] | gzip.GzipFile, end: int | None = None) -> Iterator[Member]:
    """The files of a tar archive that begins where `stream` is, each with its checked path.

    `end`: the stream's first byte that is not the archive's.

    Raises:
        DataError: a damaged archive, one that ends early or has something after its end, a path that leads out of it,
            or a member that is neither file nor folder.
    """
    part = _Part(stream, end)
    try:
        with tarfile.open(fileobj=part, mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()  # else the heads of a million members stay in memory
                name = safe_path(archive, member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse() or member.size < 0:
                    raise refuse(f"{archive}, member {name}", "a link, device or sparse file", "files and folders")
                yield tar, member, name
            whole = part.tell() == tar.offset + tarfile.BLOCKSIZE and _is_zeros(part.last)
            whole = whole and _is_zeros(part.read(tarfile.BLOCKSIZE))
    except _DAMAGE as error:
        raise refuse(archive, f"a damaged archive ({error})", "a whole one", "get the archive again") from error
    if not whole:
        raise refuse(archive, "an archive that ends early", "a whole one", "get the archive again")
    _check_rest(archive, part)


def _is_zeros(block: bytes) -> bool:
    return len(block) == tarfile.BLOCKSIZE and not block.strip(b"\0")


def _check_rest(archive: Path, part: _Part) -> None:
    """Nothing but zeros may follow the end of an archive."""
    read = 0
    try:
        while block := part.read(1 << 20):
            read += len(block)
            if block.strip(b"\0") or read > _PADDING:
                raise refuse(
                    archive,
                    "data after the end of the archive, as where archives were joined",
                    "one archive",
                    "unpack it with tar --ignore-zeros and name the folder, or get the archive again",
                )
    except (EOFError, OSError, zlib.error) as error:
        raise refuse(archive, f"damage ({error})", "a whole archive", "get the archive again") from error
