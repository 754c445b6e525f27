"""Folders and archives as lists of files, read where they are: nothing is unpacked.

A container lists its files once and then gives the bytes of any of them, in any process. What could write or read
elsewhere is refused while listing, before any image is read: absolute paths and `..`, links out of a folder, links and
devices in an archive, files that unpack to more than 256 MiB, or to more than 64 MiB and 100 times their size. So is
what has no one meaning: archives beside folders or images, joined archives, and a path that comes twice.
"""

import gzip
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from modelstock.data.decoder import SUFFIXES
from modelstock.data.tars import Member, members, refuse, safe_path
from modelstock.errors import few

LIMIT = 256 << 20  # bytes of one file
RATIO = 100  # of unpacked to packed size, where that is suspicious at all:
FLOOR = 64 << 20  # bytes; a blank picture of a few megabytes packs to nearly nothing


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


def _small(place: str, size: int) -> None:
    if size > LIMIT:
        raise refuse(place, f"{size} bytes", f"at most {LIMIT >> 20} MiB a file")


_END, _END_SIZE = b"PK\5\6", 22  # what the end of a zip archive begins with, and its size without the comment
_MARKER = 4  # bytes before the first member, of archives that were made in several volumes
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")


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
                        raise refuse(
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
                    raise refuse(entry.path, "neither file nor folder", "files and folders", "remove it")

        return visit(root, "", (root,))

    def read(self, file: File) -> bytes:
        """The bytes of one file."""
        return (self.place / file.path).read_bytes()


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
            for _, member, name in members(path, outer):
                end = member.offset_data + member.size
                if not name.endswith(".tar"):
                    _small(f"{path}, member {name}", member.size)
                    yield File(name if single else f"{path.stem}/{name}", member.size, (number, member.offset_data))
                    continue
                inner.seek(member.offset_data)
                for _, nested, leaf in members(path / name, inner, end) if single else ():
                    if leaf.endswith(".tar"):
                        raise refuse(f"{path}, member {name}/{leaf}", "a third level", "archives in an archive")
                    _small(f"{path}, member {name}/{leaf}", nested.size)
                    yield File(f"{name.removesuffix('.tar')}/{leaf}", nested.size, (number, nested.offset_data))
                if not single:
                    raise refuse(f"{path}, member {name}", "an archive in an archive in a folder", "images")

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
        unpacked, packed = 0, self.place.stat().st_size
        for number, (_, member, name) in enumerate(self._members()):
            _small(f"{self.place}, member {name}", member.size)
            unpacked += member.size
            if unpacked > max(FLOOR, RATIO * packed):
                raise refuse(self.place, f"{unpacked} bytes and more out of {packed}", f"at most {RATIO} times")
            yield File(name, member.size, (number,))

    def _members(self) -> Iterator[Member]:
        with gzip.open(self.place) as stream:
            yield from members(self.place, stream)

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
    try:
        archive = zipfile.ZipFile(path)
        with open(path, "rb") as file:
            file.seek(-len(archive.comment) - _END_SIZE, os.SEEK_END)
            ends = file.read(len(_END)) == _END
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OSError) as error:
        raise refuse(path, f"a damaged archive ({error})", "a whole one", "get the archive again") from error
    first = min((member.header_offset for member in archive.infolist()), default=0)
    if not ends or first > _MARKER:
        archive.close()
        raise refuse(
            path,
            f"data {'before its first member' if ends else 'after its end'}, as where archives were joined",
            "one archive",
            "unpack the archives one by one and name the folder, or get the archive again",
        )
    return archive


def _zip(path: Path) -> zipfile.ZipFile:
    """A zip archive, listed once.

    zipfile reads the last list of members in a file: of archives that were joined it sees only one.

    Raises:
        DataError: a damaged archive, or one with something before or after it.
    """
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
        infos = _zip(self.place).infolist()
        for number, member in enumerate(infos):
            name, where = safe_path(self.place, member.filename), f"{self.place}, member {member.filename}"
            if stat.S_ISLNK(member.external_attr >> 16):
                raise refuse(where, "a link", "files and folders")
            if member.is_dir():
                continue
            _small(where, member.file_size)
            if member.file_size > max(FLOOR, RATIO * member.compress_size):
                raise refuse(where, f"{member.file_size} bytes out of {member.compress_size}", f"at most {RATIO} times")
            if member.compress_type == 99:
                raise refuse(where, "AES encryption", "ZipCrypto or none", "unpack the archive and name its folder")
            found.append(File(name, member.file_size, (number, member.CRC)))
        locked = [file for file in found if infos[file.place[0]].flag_bits & 1]
        if locked:
            if self.password is None:
                raise refuse(self.place, "an encrypted archive", "its password", "name it as `password` of the split")
            try:
                self.read(min(locked, key=lambda file: file.size))
            except (RuntimeError, zipfile.BadZipFile, zlib.error, EOFError) as error:
                raise refuse(
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
def rows_of(path: Path, column: str | None) -> Any:
    """The rows of a folder of the library `datasets`; `column`: one of images, which are then bytes."""
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
            raise refuse(
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
        features = rows_of(self.place, None).features
        images = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
        labels = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
        labels = labels or [name for name, kind in features.items() if "int" in str(getattr(kind, "dtype", ""))]
        if len(images) != 1 or len(labels) != 1:
            raise refuse(
                self.place,
                f"{len(images)} columns of images and {len(labels)} of labels",
                "one of each",
                "drop the others with datasets.Dataset.select_columns",
            )
        return images[0], labels[0]

    def labels(self) -> tuple[list[int], list[str] | None]:
        """Each row's label, and the labels' names where they have some."""
        rows, (_, column) = rows_of(self.place, None), self.columns()
        return list(rows[column]), getattr(rows.features[column], "names", None)

    def files(self) -> list[File]:
        """Every row; sizes are not known."""
        return [File(f"{row:08d}", 0, (row,)) for row in range(len(rows_of(self.place, None)))]

    def read(self, file: File) -> bytes:
        """The bytes of a row's image, as they were stored."""
        image, _ = self.columns()
        found = rows_of(self.place, image)[file.place[0]][image]
        content: bytes = found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()
        return content


def _check_beside(folder: Path, tars: Sequence[Path]) -> None:
    """Refuse a folder of archives that has images or other archives beside or below them."""
    others = [
        str(Path(root, name).relative_to(folder))
        for root, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".") and name.lower().endswith((*_ARCHIVES, *SUFFIXES))
    ]
    others = sorted(set(others) - {tar.name for tar in tars})
    if others:
        raise refuse(
            folder,
            f"{len(tars)} archives such as {tars[0].name} beside {few(others)}",
            "either archives or images in folders",
            "move one of them elsewhere",
        )


def open_container(path: Path, password: str | None = None) -> Container:
    """What is at `path`, by its content.

    Raises:
        DataError: nothing, or nothing that is known.
    """
    expected = "a folder, a .tar, .tar.gz or .zip archive, webdataset shards, or a folder of the library datasets"
    cure = "correct the split's path"
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            raise refuse(path, "several splits of the library datasets", "one", "name the folder of one of them")
        if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
            return Rows(path)
        tars = sorted(file for file in path.glob("[!.]*.tar") if file.is_file())
        if not tars:
            return Folder(path)
        _check_beside(path, tars)
        return Tars(path, tuple(tars))
    if not path.is_file():
        raise refuse(path, "nothing there", expected, cure)
    with open(path, "rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    if head.startswith(b"\x1f\x8b"):
        return TarGz(path)
    if head.startswith(b"PK"):
        _zip(path)
        return Zip(path, password)
    if head[257:262] == b"ustar" or path.suffix == ".tar":
        return Tars(path, (path,))
    raise refuse(path, f"a file that begins with {head[:4]!r}", expected, cure)
