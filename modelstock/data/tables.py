"""Tables of texts, read where they are: tab-separated values, CSV, JSON lines, and rows of the library `datasets`.

Tab-separated lines are split at tabs and never unquoted, and the last column takes the rest; CSV is Python's, in its
strict form, which takes no quote that stays open. A table is read once, row by row; later a row's text is read again by
its place. What is no row is a problem of that row and goes on; a table that has no one meaning is refused.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from modelstock.data.containers import File, rows_of
from modelstock.data.decoder import Unreadable
from modelstock.data.tars import refuse
from modelstock.errors import DataError, few

SUFFIXES = (".tsv", ".csv", ".jsonl")
LONGEST = 16 << 20  # bytes of a row
_BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A row of a table: where it is for messages, what finds it again, and its two values, or what is wrong with it."""

    where: str
    place: tuple[int, ...]
    text: bytes = b""
    label: str = ""
    problem: str | None = None


class _Lines(NamedTuple):
    """A row as it is stored: the number of its first line, its first byte, and its bytes."""

    number: int
    start: int
    content: bytes


def _encoded(text: object) -> bytes:
    """A text as UTF-8; bytes that were none are themselves again.

    Raises:
        Unreadable: it is no text.
    """
    if not isinstance(text, str):
        raise Unreadable(f"a text that is {'missing' if text is None else f'of the type {type(text).__name__}'}")
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise Unreadable("a character that is half of one") from error


def _decoded(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key that comes twice")
    return values


@dataclass(frozen=True)
class Table:
    """A .tsv, .csv or .jsonl file, with a column of texts and one of labels; see `open_table`.

    `columns`: their names in order; None for JSON lines. `header`: they are those of the first line. A row's place: its
    first byte, and its length.
    """

    place: Path
    text: str
    label: str
    columns: tuple[str, ...] | None
    header: bool

    def files(self) -> Iterator[File]:
        """Every row that has its columns."""
        return _files(self.rows())

    def rows(self) -> Iterator[Row]:
        """Every row but blank lines.

        Raises:
            DataError: a row that does not end.
        """
        with open(self.place, "rb") as stream:
            for lines in islice(_records(self.place, stream), int(self.header), None):
                if lines.content.strip(b"\r\n"):
                    yield self._row(lines)

    def read(self, file: File) -> bytes:
        """The text of one row, in UTF-8 where it is text at all."""
        start, length = file.place
        with open(self.place, "rb") as stream:
            stream.seek(start)
            content = stream.read(length)
        return _encoded(self._values(content)[self.text])

    def _row(self, lines: _Lines) -> Row:
        where, place = f"line {lines.number}", (lines.start, len(lines.content))
        try:
            values = self._values(lines.content)
            return Row(where, place, _encoded(values[self.text]), _plain(values[self.label]))
        except Unreadable as error:
            return Row(where, place, problem=f"{error}")

    def _values(self, content: bytes) -> Mapping[str, Any]:
        """Column -> value of a row.

        Raises:
            Unreadable: it is no row with these columns.
        """
        if self.columns is None:
            try:
                values = json.loads(_decoded(content), object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise Unreadable(f"no JSON ({error})") from error
            if not isinstance(values, dict):
                raise Unreadable("no JSON object")
            absent = [name for name in (self.text, self.label) if name not in values]
            if absent:
                raise Unreadable(f"no column {absent[0]}")
            return values
        fields = _fields(self.place, content, len(self.columns) - 1)
        if len(fields) != len(self.columns):
            raise Unreadable(f"{len(fields)} of {len(self.columns)} columns")
        return dict(zip(self.columns, fields, strict=True))


def open_table(place: Path, text: str, label: str, columns: Sequence[str] | None) -> Table:
    """A table with its columns: those that are given, else those of its first line.

    Raises:
        DataError: no such columns.
    """
    if place.suffix.lower() == ".jsonl":
        if columns is not None:
            raise refuse(place, "columns", "JSON lines, which name their own", "set columns: null")
        return Table(place, text, label, None, header=False)
    if columns is not None:
        return Table(place, text, label, tuple(columns), header=False)
    with open(place, "rb") as stream:
        first = next(_records(place, stream), None)
    names = tuple(name.strip() for name in _fields(place, first.content)) if first else ()
    for name in (text, label):
        if names.count(name) != 1:
            raise refuse(
                f"{place}, line 1",
                f"{names.count(name) or 'no'} columns {name!r} among {few([repr(name) for name in names]) or 'none'}",
                "a line that names the columns, each once",
                "correct text and label of the split, or give all names as columns where no line has them",
            )
    return Table(place, text, label, names, header=True)


def _files(rows: Iterable[Row]) -> Iterator[File]:
    return (File(row.where, len(row.text), row.place) for row in rows if row.problem is None)


def _lines(place: Path, stream: IO[bytes]) -> Iterator[_Lines]:
    start = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
    stream.seek(start)
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise _endless(place, number)
        yield _Lines(number, start, line)
        start += len(line)


def _endless(place: Path, number: int) -> DataError:
    cure = "leave it out, or close its quote"
    return refuse(f"{place}, line {number}", f"a row of more than {LONGEST >> 20} MiB", "a row per text", cure)


def _records(place: Path, stream: IO[bytes]) -> Iterator[_Lines]:
    """Rows as they are stored; in a CSV file quoted fields may have line ends.

    Raises:
        DataError: a row that does not end.
    """
    if place.suffix.lower() != ".csv":
        yield from _lines(place, stream)
        return
    own: list[_Lines] = []

    def feed() -> Iterator[str]:
        for line in _lines(place, stream):
            own.append(line)
            if line.start + len(line.content) - own[0].start > LONGEST:
                raise _endless(place, own[0].number)
            yield _decoded(line.content)

    reader = csv.reader(feed(), strict=True)
    while True:
        own.clear()
        try:
            with _long_fields():
                next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise refuse(
                f"{place}, line {own[0].number}",
                f"{error}",
                "CSV with every quote closed, and doubled within quotes",
                "correct it, or make it a .tsv file, where quotes mean nothing",
            ) from error
        yield _Lines(own[0].number, own[0].start, b"".join(line.content for line in own))


def _fields(place: Path, content: bytes, most: int = -1) -> list[str]:
    """The values of a row; tab-separated, at most `most` + 1."""
    text = _decoded(content)
    if place.suffix.lower() == ".csv":
        with _long_fields():
            return next(csv.reader(io.StringIO(text, newline="\n"), strict=True))
    return text.removesuffix("\n").removesuffix("\r").split("\t", most)


def _plain(label: object) -> str:
    """A label as text; what JSON writes as true is no 1."""
    return label.strip() if isinstance(label, str) else str(label)


@dataclass(frozen=True)
class TextRows:
    """A folder of the library `datasets` with a column of texts and one of labels. A row's place: its number."""

    place: Path
    text: str
    label: str

    def files(self) -> Iterable[File]:
        """Every row that has a text."""
        return _files(self.rows())

    def rows(self) -> Iterator[Row]:
        """Every row.

        Raises:
            DataError: no such columns.
        """
        table = rows_of(self.place, None)
        absent = [name for name in (self.text, self.label) if name not in table.features]
        if absent:
            raise refuse(
                self.place,
                f"columns {few(list(table.features))}",
                f"a column {absent[0]}",
                "name its columns as text and label of the split",
            )
        names = getattr(table.features[self.label], "names", None)
        for number, values in enumerate(table.select_columns([self.text, self.label])):
            label = values[self.label]
            if names is not None and isinstance(label, int):
                label = names[label] if 0 <= label < len(names) else None
            try:
                yield Row(f"row {number}", (number,), _encoded(values[self.text]), _plain(label))
            except Unreadable as error:
                yield Row(f"row {number}", (number,), problem=f"{error}")

    def read(self, file: File) -> bytes:
        """The text of one row."""
        return _encoded(rows_of(self.place, None)[file.place[0]][self.text])
