"""Folders and archives as lists of files, read where they are: nothing is unpacked.

A container lists its files once and then gives the bytes of any of them, in any process. What could write or read
elsewhere is refused while listing, before any image is read: absolute paths and `..`, links out of a folder, links and
devices in an archive, files that unpack to more than 256 MiB or to 100 times their size.
"""

import gzip
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from modelstock.errors import DataError

LIMIT = 256 << 20  # bytes of one file
RATIO = 100  # of unpacked to packed size
Member = tuple[tarfile.TarFile, tarfile.TarInfo, str]  # an archive, one of its heads, and that file's path
_AGAIN = "get the archive again, or leave the file out of it"


class File(NamedTuple):
    """A file of a container: its path there, its size in bytes, and what the container finds it by."""

    path: str
    size: int
    place: tuple[int, ...]


class Container(Protocol):
    """Files of one source. `place` names it in messages."""

    @property
    def place(self) -> Path:
        """The path it was opened by."""

    def files(self) -> Iterable[File]:
        """Every file, in the container's own order.

        Raises:
            DataError: a container that is damaged, or holds what is refused.
        """

    def read(self, file: File) -> bytes:
        """The bytes of one file."""


def _refuse(place: object, got: str, expected: str, cure: str = _AGAIN) -> DataError:
    return DataError(place, got=got, expected=expected, cure=cure)


def _safe(archive: Path, name: str) -> str:
    """A member's path without `.` and empty parts; one that leads out of the archive is refused."""
    parts = re.split(r"[/\\]", name)
    if name.startswith(("/", "\\")) or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name):
        raise _refuse(
            f"{archive}, member {name!r}", "a path that leads out of the archive", "relative paths without .."
        )
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _small(place: str, size: int) -> None:
    if size > LIMIT:
        raise _refuse(place, f"{size} bytes", f"at most {LIMIT >> 20} MiB a file")


@dataclass(frozen=True)
class Folder:
    """A folder and what is below it."""

    place: Path

    def files(self) -> Iterator[File]:
        """Every file below, hidden ones too, in the order of their names."""
        root = self.place.resolve()  # the folder itself may be a link

        def visit(folder: Path, prefix: str, above: tuple[Path, ...]) -> Iterator[File]:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                name = prefix + entry.name
                if entry.is_symlink():
                    target = Path(entry.path).resolve()
                    if not target.is_relative_to(root) or not target.exists() or target in above:
                        raise _refuse(
                            f"{self.place}, link {name}",
                            f"a link to {os.readlink(entry.path)}",
                            "links to files and folders within the source",
                            "copy the files, or name their folder",
                        )
                if entry.is_dir():
                    yield from visit(Path(entry.path), f"{name}/", (*above, Path(entry.path).resolve()))
                elif entry.is_file():
                    facts = entry.stat()
                    _small(entry.path, facts.st_size)
                    yield File(name, facts.st_size, (facts.st_mtime_ns,))
                else:
                    raise _refuse(entry.path, "neither file nor folder", "files and folders", "remove it")

        return visit(root, "", (root,))

    def read(self, file: File) -> bytes:
        """The bytes of one file."""
        return (self.place / file.path).read_bytes()


def _members(archive: Path, stream: IO[bytes] | gzip.GzipFile) -> Iterator[Member]:
    """The files of a tar archive that begins where `stream` is, each with its checked path."""
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else the heads of a million members stay in memory
                name = _safe(archive, member.name)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise _refuse(f"{archive}, member {name}", "a link, device or sparse file", "files and folders")
                yield tar, member, name
            # Where an archive is cut or damaged, tarfile takes that for its end: two blocks of zeros are the end.
            whole = stream.tell() == tar.offset + tarfile.BLOCKSIZE and not stream.read(tarfile.BLOCKSIZE).strip(b"\0")
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _refuse(archive, f"a damaged archive ({error})", "a whole one", "get the archive again") from error
    if not whole:
        raise _refuse(archive, "an archive that ends early", "a whole one", "get the archive again")


@dataclass(frozen=True)
class Tars:
    """Plain tar archives. `place` is one of them, or a folder of them, whose names then come first in paths.

    A single archive may be one of archives, as ImageNet's training set is published: files are read by their offset
    in the outer one. A file's place: the archive, and the first byte in it.
    """

    place: Path
    paths: tuple[Path, ...]

    def files(self) -> Iterator[File]:
        """Every file of every archive."""
        return (file for number, path in enumerate(self.paths) for file in self._files(number, path))

    def _files(self, number: int, path: Path) -> Iterator[File]:
        single = path == self.place
        with open(path, "rb") as outer, open(path, "rb") as inner:
            for _, member, name in _members(path, outer):
                end = member.offset_data + member.size
                if not name.endswith(".tar"):
                    _small(f"{path}, member {name}", member.size)
                    yield File(name if single else f"{path.stem}/{name}", member.size, (number, member.offset_data))
                    continue
                inner.seek(member.offset_data)
                for _, nested, leaf in _members(path / name, inner) if single else ():
                    if leaf.endswith(".tar") or nested.offset_data + nested.size > end:
                        raise _refuse(f"{path}, member {name}/{leaf}", "a third level", "archives in an archive")
                    _small(f"{path}, member {name}/{leaf}", nested.size)
                    yield File(f"{name.removesuffix('.tar')}/{leaf}", nested.size, (number, nested.offset_data))
                if not single:
                    raise _refuse(f"{path}, member {name}", "an archive in an archive in a folder", "images")

    def read(self, file: File) -> bytes:
        """The bytes of one file."""
        stream = _opened(self.paths[file.place[0]])
        stream.seek(file.place[1])
        content = stream.read(file.size)
        if len(content) < file.size:
            raise EOFError(f"{self.paths[file.place[0]]} ends early")
        return content


@lru_cache(maxsize=8)
def _kept_open(path: Path, stamp: tuple[int, ...]) -> IO[bytes]:
    return open(path, "rb")


def _stamp(path: Path) -> tuple[int, ...]:
    """What tells a file from one that has replaced it."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _opened(path: Path) -> IO[bytes]:
    return _kept_open(path, _stamp(path))


@dataclass(frozen=True)
class TarGz:
    """A compressed tar archive: it can only be read from its start. A file's place: its number among the files."""

    place: Path

    def files(self) -> Iterator[File]:
        """Every file; the whole archive is read and its checksum tested."""
        for number, (_, member, name) in enumerate(self._members()):
            _small(f"{self.place}, member {name}", member.size)
            yield File(name, member.size, (number,))

    def _members(self) -> Iterator[Member]:
        with gzip.open(self.place) as stream:
            yield from _members(self.place, stream)
            try:
                while stream.read(1 << 20):
                    pass
            except (EOFError, OSError, zlib.error) as error:
                raise _refuse(self.place, f"damage ({error})", "a whole archive", "get the archive again") from error

    def contents(self) -> Iterator[tuple[int, IO[bytes]]]:
        """Every file's number and its bytes, in one pass."""
        for number, (tar, member, _) in enumerate(self._members()):
            stream = tar.extractfile(member)
            assert stream is not None  # a file
            yield number, stream

    def read(self, file: File) -> bytes:
        """The bytes of one file, found by reading all before it."""
        return next(stream.read() for number, stream in self.contents() if number == file.place[0])


@lru_cache(maxsize=2)
def _kept_listed(path: Path, stamp: tuple[int, ...]) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def _zip(path: Path) -> zipfile.ZipFile:
    return _kept_listed(path, _stamp(path))


@dataclass(frozen=True)
class Zip:
    """A zip archive, perhaps encrypted in the old way (ZipCrypto), which Python decrypts at a few MB/s.

    A file's place: its number in the archive's directory, and its checksum.
    """

    place: Path
    password: str | None = None

    def files(self) -> list[File]:
        """Every file.

        Raises:
            DataError: also a missing or wrong password.
        """
        found = []
        members = _zip(self.place).infolist()
        for number, member in enumerate(members):
            name, where = _safe(self.place, member.filename), f"{self.place}, member {member.filename}"
            if stat.S_ISLNK(member.external_attr >> 16):
                raise _refuse(where, "a link", "files and folders")
            if member.is_dir():
                continue
            _small(where, member.file_size)
            if member.file_size > RATIO * max(1, member.compress_size):
                raise _refuse(
                    where, f"{member.file_size} bytes out of {member.compress_size}", f"at most {RATIO} times"
                )
            if member.compress_type == 99:
                raise _refuse(where, "AES encryption", "ZipCrypto or none", "unpack the archive and name its folder")
            found.append(File(name, member.file_size, (number, member.CRC)))
        locked = [file for file in found if members[file.place[0]].flag_bits & 1]
        if locked:
            if self.password is None:
                raise _refuse(self.place, "an encrypted archive", "its password", "name it as `password` of the split")
            try:
                self.read(min(locked, key=lambda file: file.size))
            except (RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise _refuse(
                    self.place,
                    "a password that does not open it",
                    "the one it was published with",
                    "correct `password`",
                ) from error
        return found

    def read(self, file: File) -> bytes:
        """The bytes of one file; no more than its declared size, whatever it unpacks to."""
        archive = _zip(self.place)
        password = None if self.password is None else self.password.encode()
        with archive.open(archive.infolist()[file.place[0]], pwd=password) as stream:
            content = stream.read(file.size + 1)
        if len(content) != file.size:
            raise EOFError(f"{self.place} ends early")
        return content


@lru_cache(maxsize=2)
def _rows(path: Path, column: str | None) -> Any:
    library = import_module("datasets")
    rows = library.load_from_disk(str(path))
    # The bytes as they were stored, rather than a decoded picture.
    return rows if column is None else rows.cast_column(column, library.Image(decode=False))


@dataclass(frozen=True)
class Rows:
    """A folder of the library `datasets`, with one column of images and one of labels. A file's place: its row."""

    place: Path

    def __post_init__(self) -> None:
        if find_spec("datasets") is None:
            raise _refuse(
                self.place,
                "a folder of the library datasets, which is not installed",
                "modelstock[datasets]",
                "pip install 'modelstock[datasets]'",
            )

    def columns(self) -> tuple[str, str]:
        """The names of the columns of images and labels.

        Raises:
            DataError: none or several of either.
        """
        features = _rows(self.place, None).features
        images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        labels = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
        labels = labels or [name for name, kind in features.items() if "int" in str(getattr(kind, "dtype", ""))]
        if len(images) != 1 or len(labels) != 1:
            raise _refuse(
                self.place,
                f"{len(images)} columns of images and {len(labels)} of labels",
                "one of each",
                "drop the others with datasets.Dataset.select_columns",
            )
        return images[0], labels[0]

    def labels(self) -> tuple[list[int], list[str] | None]:
        """Each row's label, and the labels' names where they have some."""
        rows, (_, column) = _rows(self.place, None), self.columns()
        return list(rows[column]), getattr(rows.features[column], "names", None)

    def files(self) -> list[File]:
        """Every row; sizes are not known."""
        return [File(f"{row:08d}", 0, (row,)) for row in range(len(_rows(self.place, None)))]

    def read(self, file: File) -> bytes:
        """The bytes of a row's image, as they were stored."""
        image, _ = self.columns()
        found = _rows(self.place, image)[file.place[0]][image]
        content: bytes = found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()
        return content


def open_container(path: Path, password: str | None = None) -> Container:
    """What is at `path`, by its content.

    Raises:
        DataError: nothing, or nothing that is known.
    """
    expected = "a folder, a .tar, .tar.gz or .zip archive, webdataset shards, or a folder of the library datasets"
    cure = "correct the split's path"
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise _refuse(path, "several splits of the library datasets", "one", "name the folder of one of them")
        if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
            return Rows(path)
        tars = sorted(file for file in path.glob("*.tar") if not file.name.startswith("."))
        return Tars(path, tuple(tars)) if tars else Folder(path)
    if not path.is_file():
        raise _refuse(path, "nothing there", expected, cure)
    with open(path, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    if head.startswith(b"\x1f\x8b"):
        return TarGz(path)
    if head.startswith(b"PK"):
        try:
            _zip(path)
        except zipfile.BadZipFile as error:
            raise _refuse(path, f"a damaged archive ({error})", "a whole one", "get the archive again") from error
        return Zip(path, password)
    if head[257:262] == b"ustar" or path.suffix == ".tar":
        return Tars(path, (path,))
    raise _refuse(path, f"a file that begins with {head[:4]!r}", expected, cure)
