"""Texts as they lie on disk: which rows or files are texts, what label each has, and which are left out.

The class of a text is its folder, as for images, or what a table's column of labels says: a class by its folder or its
name, or a number within one of the ranges. Rows are named `<class folder>/<number of the row>`, from 0: every kind of
table of the same rows gives the same list.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from modelstock.data.containers import Container, File, Rows, TarGz, Tars, open_container
from modelstock.data.decoder import Unreadable
from modelstock.data.layouts import Item, Meaning, Source, by_folder, by_key, listed, meaning, part_of, readable
from modelstock.data.tables import SUFFIXES, Table, TextRows, open_table
from modelstock.data.texts import text_of, words
from modelstock.errors import DataError, few
from modelstock.notices import notice
from modelstock.params import ClassesParams, PrepareParams, TextsSplit
from modelstock.progress import progress_bar

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def open_texts(name: str, params: PrepareParams, classes: ClassesParams) -> Source:
    """List the texts of a split on disk, by label and then by name.

    Raises:
        DataError: a path, column, label or row that is not as it should be, or too many rows that are no texts.
    """
    split = params.splits[name]
    assert isinstance(split, TextsSplit)
    found = meaning(split, classes, {}, whole=params.role(name) in ("train", "held-out"))
    with readable(split):
        return _opened(name, split, params, found)


def _opened(name: str, split: TextsSplit, params: PrepareParams, meaning: Meaning) -> Source:
    left_out: dict[str, int] = {}
    unreadable: dict[str, str] = {}
    shards, keys = False, None
    table = _table(split)
    container: Container
    if table is not None:
        container = table
        items, keys = _of_rows(name, split, table, meaning, params.unreadable, left_out, unreadable)
    else:
        container, files = listed(name, split)
        shards = isinstance(container, Tars) and any(file.path.endswith(".cls") for file in files)
        if isinstance(container, Tars) and shards:
            items = by_key(split, container, files, meaning)
        else:
            items, left_out = by_folder(split, files, meaning)
    if split.duplicates == "first" or split.part != "all":
        keys = keys or {item: _key(content) for item, content in _readable(name, container, items)}
        groups = defaultdict(list)
        for item, key in keys.items():
            groups[key].append(item)
        repeated = [group for group in groups.values() if len(group) > 1]
        if split.duplicates == "first":
            items = _without_duplicates(items, repeated, left_out)
            shards = False  # they are written anew
        elif repeated:
            notice(
                name,
                f"{sum(map(len, repeated))} texts have the words of others, so that the train part may hold texts of "
                "the held-out part; duplicates: first leaves them out",
            )
    return Source(
        container,
        part_of(split, items, params.held_out_per_class, meaning),
        meaning,
        left_out,
        shards,
        modality="text",
        unreadable=list(unreadable),
        rules=_rules(split),
    )


def _table(split: TextsSplit) -> Table | TextRows | None:
    """The table that a split names; None for folders, archives and shards.

    Raises:
        DataError: nothing there, a table without columns in the split, or columns for what is no table.
    """
    path = Path(split.path)
    table = path.suffix.lower() in SUFFIXES and not path.is_dir()
    if table and not path.is_file():
        raise DataError(path, got="nothing there", expected="a table of texts", cure="correct the split's path")
    rows = None if table else open_container(path)
    if not table and not isinstance(rows, Rows):
        if split.text is not None:
            raise DataError(
                path,
                got="text and label for what is no table",
                expected=f"a file {', '.join(SUFFIXES)} or a folder of the library datasets",
                cure="set text, label, columns and ranges to null: a text's folder or .cls file is its label",
            )
        return None
    if split.text is None or split.label is None:
        raise DataError(
            path, got="no text and label in the split", expected="the table's columns", cure="name both in the split"
        )
    if not table:
        return TextRows(path, split.text, split.label)
    return open_table(path, split.text, split.label, split.columns)


def _of_rows(
    name: str,
    split: TextsSplit,
    table: Table | TextRows,
    meaning: Meaning,
    allowed: float,
    left_out: dict[str, int],
    unreadable: dict[str, str],
) -> tuple[list[Item], dict[Item, bytes]]:
    """The rows that are texts, each with what tells it from others; `left_out` and `unreadable` get the others.

    Raises:
        DataError: a share of more than `allowed` that are no texts.
    """
    label_of, folders = _labels(split, meaning), list(meaning.folders)
    keys: dict[Item, bytes] = {}
    total = outside = 0
    for number, row in enumerate(progress_bar(table.rows(), desc=f"{name}: listing", unit="row", delay=2, leave=False)):
        try:
            if row.problem is not None:
                raise Unreadable(row.problem)
            label = label_of(row.label)
            if label is None:
                outside += 1
                continue
            item = Item(label, f"{folders[label]}/{number:08d}", File(row.where, len(row.text), row.place))
            keys[item] = _key(text_of(row.text))
        except Unreadable as error:
            unreadable[row.where] = f"{error}"
        total += 1
    if outside:
        left_out["texts outside all ranges"] = outside
    if len(unreadable) > allowed * total:
        first = next(iter(unreadable))
        raise DataError(
            f"{split.path}, {first}",
            got=f"{unreadable[first]}, and {len(unreadable)} unreadable texts of {total}: {few(list(unreadable))}",
            expected=f"at most {allowed * total:g}",
            cure="correct or remove them, or raise prepare.unreadable",
        )
    if unreadable:
        names = few([f"{where} ({problem})" for where, problem in unreadable.items()])
        notice(name, f"{len(unreadable)} of {total} texts of {Path(split.path).name} are left out: {names}")
    return list(keys), keys


def _labels(split: TextsSplit, meaning: Meaning) -> Callable[[str], int | None]:
    """What a table's label means: a class, or None for a number outside all ranges; raises Unreadable for others.

    Raises:
        DataError: ranges of unknown classes, or a text that is the folder of one class and the name of another.
    """
    known = {name: label for label, name in enumerate(meaning.names)}
    both = [folder for folder, label in meaning.folders.items() if known.get(folder, label) != label]
    if both:
        raise DataError(
            "classes.names",
            got=f"{both[0]!r}, the folder of one class and the name of another",
            expected="texts that mean one class",
            cure="rename one of them",
        )
    known |= meaning.folders
    if split.ranges is None:

        def by_name(value: str) -> int:
            if value not in known:
                raise Unreadable(f"label {value[:40]!r}, which is none of {few(list(known))}")
            return known[value]

        return by_name
    strange = [name for name in split.ranges if name not in known]
    if strange:
        raise DataError(
            "ranges", got=f"{few(strange)}", expected=f"classes: {few(list(known))}", cure="name classes of the head"
        )
    ranges = [(known[name], low, high) for name, (low, high) in split.ranges.items()]

    def by_range(value: str) -> int | None:
        number = float(value) if _NUMBER.fullmatch(value) else math.nan
        if not math.isfinite(number):
            raise Unreadable(f"label {value[:40]!r}, no number")
        return next((label for label, low, high in ranges if low <= number <= high), None)

    return by_range


def _key(text: str) -> bytes:
    """What texts of the same words have in common."""
    return hashlib.sha256(" ".join(words(text)).encode()).digest()[:16]


def _readable(name: str, container: Container, items: Sequence[Item]) -> Iterator[tuple[Item, str]]:
    """Files with their texts; those that cannot be read are left to who makes the shards."""

    def contents() -> Iterator[tuple[Item, Callable[[], bytes]]]:
        if not isinstance(container, TarGz):
            yield from ((item, lambda item=item: container.read(item.file)) for item in items)
            return
        by_number = {item.file.place[0]: item for item in items}
        for number, stream in container.contents():
            if number in by_number:
                yield by_number[number], stream.read

    bar = progress_bar(contents(), total=len(items), desc=f"{name}: duplicates", unit="text", delay=2, leave=False)
    for item, read in bar:
        try:
            text = text_of(read())
        except MemoryError:
            raise
        except Exception:  # containers raise much for what is damaged
            continue
        yield item, text


def _without_duplicates(
    items: Sequence[Item], repeated: Sequence[Sequence[Item]], left_out: dict[str, int]
) -> list[Item]:
    """Of texts of the same words the first by name; none where their labels differ. `left_out` counts the others."""
    counts, dropped = Counter[str](), set[Item]()
    for group in repeated:
        same = len({item.label for item in group}) == 1
        others = sorted(group, key=lambda item: item.name)[1 if same else 0 :]
        counts["duplicates" if same else "duplicates with different labels"] += len(others)
        dropped.update(others)
    left_out |= counts
    return [item for item in items if item not in dropped]


def _rules(split: TextsSplit) -> dict[str, str]:
    """How texts were chosen and labelled, as a manifest keeps it."""
    rules: dict[str, str] = {"duplicates": split.duplicates}
    if split.text is not None and split.label is not None:
        rules |= {"text": split.text, "label": split.label}
    if split.columns is not None:
        rules["columns"] = ", ".join(split.columns)
    if split.ranges is not None:
        rules["ranges"] = ", ".join(f"{name} {low} to {high}" for name, (low, high) in split.ranges.items())
    return rules
