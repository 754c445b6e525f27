"""Per-example results of anybody's: results files of ours, CSV, and JSON lines such as lm-evaluation-harness writes.

Whatever the file, what comes out is a table of right or wrong, (rows, examples), with the examples' names; a row is one
model, or one seed of it.
"""

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelstock.errors import DataError, few, nearest
from modelstock.scoring.results import Row, load_scores

IDS = ("id", "doc_id")
RIGHT = ("correct", "acc", "acc_norm", "exact_match")  # all but the first are of lm-evaluation-harness
WHOLE = re.compile(r"-?\d+\.0+")
WORDS = {"0": False, "1": True, "false": False, "true": True}


@dataclass(frozen=True)
class Columns:
    """The names of columns; None: the usual ones, where there are any. `where`: column -> the only value read."""

    id: str | None = None
    correct: str | None = None
    by_class: str | None = None
    where: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Outcomes:
    """One side of a comparison. `correct`: (rows, examples). `labels`, `classes`: by example, where files have them.

    `numbered`: whether the rows' seeds are those that the files name, so that two sides' seeds can be the same.
    """

    source: str
    rows: tuple[Row, ...]
    ids: tuple[str, ...]
    correct: NDArray[np.bool_]
    labels: tuple[str, ...] | None
    classes: tuple[str, ...] | None
    numbered: bool


def read_outcomes(files: Sequence[Path], columns: Columns, rows: Sequence[str] = ()) -> Outcomes:
    """One side: a results file of ours with the rows of these names, kinds or patterns, or one table per seed.

    Raises:
        DataError: files that are missing, damaged or do not fit together; the line and column are named.
    """
    ours = [file for file in files if file.suffix == ".safetensors"]
    if ours:
        if len(files) > 1:
            refuse(ours[0], f"{len(files)} files", "one results file, which has all rows", "name it alone")
        return _of_results(ours[0], columns, rows)
    if rows:
        refuse(files[0], f"rows {few(rows)}", "rows of a results file of ours", "leave out --row-a and --row-b")
    return _together([(file, list(_records(file, columns))) for file in files], columns)


def refuse(place: object, got: str, expected: str, cure: str) -> None:
    """Raise DataError."""
    raise DataError(place, got=got, expected=expected, cure=cure)


def _of_results(file: Path, columns: Columns, names: Sequence[str]) -> Outcomes:
    scores = load_scores(file)
    every = scores.rows
    places = list(range(len(every))) if not names and len(every) == 1 else []
    for name in names:
        kinds = [place for place, row in enumerate(every) if row.kind == name]
        named = [place for place, row in enumerate(every) if row.name == name or fnmatchcase(row.name, name)]
        if not kinds and not named:
            known = [row.name for row in every] + sorted({row.kind for row in every})
            refuse(file, f"no row {name}", f"a row, kind or pattern, such as {few(known)}", nearest(name, known))
        places += [place for place in named or kinds if place not in places]
    if not places:
        cure = f"choose with --row-a and --row-b, as {every[0].name} or {every[-1].kind}"
        refuse(file, f"{len(every)} rows and no choice", "a row, or all of a kind", cure)
    rows = tuple(every[place] for place in places)
    sizes = sorted({len(row.members) for row in rows})
    if len(sizes) > 1:
        names_of = few([row.name for row in rows])
        cure = "choose some by a pattern, as 'model_stock/?-?'"
        refuse(file, f"rows of {few(list(map(str, sizes)))} seeds ({names_of})", "rows of equally many seeds", cure)
    if len({row.members for row in rows}) < len(rows):
        refuse(file, f"several rows of the same seeds ({few([row.name for row in rows])})", "one", "name fewer rows")
    if columns.by_class not in (None, "label"):
        refuse(file, f"no column {columns.by_class}", "label, the only one of results files", "say --by-class label")
    labels = tuple(scores.labels[place] for place in scores.truth)
    # The data's hash is in the name, so that two test sets are never taken for one.
    ids = tuple(f"{scores.benchmark} {scores.data[:12]} {place}" for place in range(len(labels)))
    classes = labels if columns.by_class else None
    return Outcomes(str(file), rows, ids, scores.correct[places], labels, classes, numbered=bool(sizes[0]))


@dataclass(frozen=True)
class _Record:
    place: str  # file and line
    id: str
    correct: bool
    seed: str | None
    label: str | None
    by_class: str | None


def _records(file: Path, columns: Columns) -> Iterator[_Record]:
    """The examples of a table, checked."""
    names: dict[str, str] | None = None
    kept = 0
    for place, record in _lines(file):
        wanted = columns.where or {}
        for name in wanted:
            _has(place, record, name, "--where")
        if any(_text(record[name]) != value for name, value in wanted.items()):
            continue
        names = names or _chosen(place, record, columns)
        for name in names.values():
            _has(place, record, name, "every line")
        kept += 1
        label = _text(record[names["label"]]) if "label" in names else None
        if "correct" in names:
            correct = _right(place, names["correct"], record[names["correct"]])
        else:
            correct = _filled(place, names["prediction"], record[names["prediction"]]) == label
        yield _Record(
            place=place,
            id=_filled(place, names["id"], record[names["id"]]),
            correct=correct,
            seed=_filled(place, "seed", record[names["seed"]]) if "seed" in names else None,
            label=label,
            by_class=_filled(place, names["class"], record[names["class"]]) if "class" in names else None,
        )
    if not kept:
        chosen = "".join(f" with {name}={value}" for name, value in (columns.where or {}).items())
        refuse(file, f"no example{chosen}", "one or more", "name another file" if not chosen else "correct --where")


def _lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and record of each line."""
    if file.suffix not in (".csv", ".jsonl"):
        refuse(file, f"a file {file.suffix or 'without a suffix'}", ".safetensors, .csv or .jsonl", "convert it")
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            yield from _csv(file, stream) if file.suffix == ".csv" else _jsonl(file, stream)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        got = error.strerror if isinstance(error, OSError) else f"no text table ({error})"
        raise DataError(
            file, got=got, expected="results per example in UTF-8", cure="correct the path or file"
        ) from None


def _csv(file: Path, stream: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(stream)
    heads = [name.strip() for name in reader.fieldnames or []]
    if len(set(heads)) < len(heads):
        refuse(f"{file}:1", "a column twice", "each column once", "rename one")
    reader.fieldnames = heads
    for record in reader:
        place = f"{file}:{reader.line_num}"
        if None in record or None in record.values():
            refuse(place, "another number of cells than columns", f"{len(heads)} cells", "correct the line")
        yield place, {name: value.strip() for name, value in record.items()}


def _jsonl(file: Path, stream: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            got = f"no JSON ({getattr(error, 'msg', type(error).__name__)})"
            raise DataError(f"{file}:{number}", got=got, expected="an object per line", cure="correct it") from None
        if not isinstance(record, dict):
            refuse(f"{file}:{number}", f"a {type(record).__name__}", "an object per line", "correct it")
        yield f"{file}:{number}", record


def _chosen(place: str, record: Mapping[str, Any], columns: Columns) -> dict[str, str]:
    """What is read -> the column it is in, by the first line."""
    names = {"id": columns.id or next((name for name in IDS if name in record), IDS[0])}
    _has(place, record, names["id"], "name another with --paired-by")
    found = [name for name in RIGHT if name in record]
    if columns.correct:
        names["correct"] = columns.correct
        _has(place, record, columns.correct, "--correct")
    elif "correct" in found or len(found) == 1:
        names["correct"] = found[0]
    elif found:
        refuse(place, f"columns {' and '.join(found)}", "one of them", f"choose, as with --correct {found[0]}")
    if "prediction" in record and "label" in record and "correct" not in names:
        names["prediction"] = "prediction"
    elif "correct" not in names:
        known = [*RIGHT, "prediction", "label"]
        near = next((f"; {name} may be {other}" for name in record if (other := _like(name, known))), "")
        expected = f"correct ({', '.join(RIGHT)}), or prediction and label"
        refuse(place, f"columns {few(list(record), 6)}", expected, f"name the column with --correct{near}")
    names |= {name: name for name in ("label", "seed") if name in record}
    if columns.by_class:
        names["class"] = columns.by_class
        _has(place, record, columns.by_class, "--by-class")
    return names


def _like(name: str, known: Sequence[str]) -> str | None:
    cure = nearest(name, known)
    return cure.removeprefix("did you mean ").removesuffix("?") if cure.startswith("did") else None


def _has(place: str, record: Mapping[str, Any], name: str, needed: str) -> None:
    if name not in record:
        columns = few(list(record), 6) or "none"
        refuse(place, f"no column {name} ({columns})", f"it, for {needed}", nearest(name, list(record)))


def _text(value: object) -> str:
    """A value as text, the same for 1, 1.0 and "1.0": some tables write whole numbers as floats."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and WHOLE.fullmatch(value):
        return value.partition(".")[0]
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def _filled(place: str, name: str, value: object) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        refuse(place, f"{name} that is {'empty' if value in (None, '') else value}", "a value", "correct the line")
    return _text(value)


def _right(place: str, name: str, value: object) -> bool:
    word = _text(value).lower()
    if word not in WORDS:
        refuse(place, f"{name} {_text(value)!r}", "0, 1, true or false", "correct it, or choose another with --correct")
    return WORDS[word]


def _together(tables: Sequence[tuple[Path, Sequence[_Record]]], columns: Columns) -> Outcomes:
    """The tables as one: a row per seed, all of the same examples in the order of the first."""
    by_seed: dict[str, dict[str, _Record]] = {}
    named = [records[0].seed is not None for _, records in tables]
    if any(named) and not all(named):
        first = tables[named.index(False)][0]
        refuse(first, "no column seed", "one in every file of a side, or in none", "add it or take it away")
    for number, (_, records) in enumerate(tables):
        of_file: dict[str, dict[str, _Record]] = {}
        for record in records:
            of_seed = of_file.setdefault(record.seed if record.seed is not None else str(number), {})
            if record.id in of_seed:
                cure = "name the column that tells them apart with --paired-by, or one value of it with --where"
                refuse(record.place, f"id {record.id} again ({of_seed[record.id].place})", "each id once", cure)
            of_seed[record.id] = record
        for seed, of_seed in of_file.items():
            if seed in by_seed:
                place = next(iter(of_seed.values())).place
                refuse(place, f"seed {seed}, which another file has", "each seed once", "name each file once")
            by_seed[seed] = of_seed
    source = str(tables[0][0]) + (f" and {len(tables) - 1} more" if len(tables) > 1 else "")
    every = list(by_seed.values())
    ids = tuple(every[0])
    for table in every[1:]:
        check_same_ids(next(iter(table.values())).place.rpartition(":")[0], tuple(table), source, ids)
    labels = _agreed([[table[name].label for name in ids] for table in every], source, ids, "label")
    classes = _agreed([[table[name].by_class for name in ids] for table in every], source, ids, "class")
    numbers = {seed: place for place, seed in enumerate(sorted(by_seed))}
    numeric = all(seed.isdecimal() for seed in by_seed)
    rows = tuple(Row(f"seed {seed}", "", "seed", (int(seed) if numeric else numbers[seed],), {}) for seed in by_seed)
    correct = np.array([[table[name].correct for name in ids] for table in every])
    return Outcomes(source, rows, ids, correct, labels, classes, numbered=any(named) and numeric)


def _agreed(
    columns: Sequence[Sequence[str | None]], source: str, ids: Sequence[str], what: str
) -> tuple[str, ...] | None:
    """The values of a column by example, which every seed must have alike."""
    first = columns[0]
    for other in columns[1:]:
        check_same_values(source, first, source, other, ids, what)
    return None if any(value is None for value in first) else tuple(map(str, first))


def check_same_ids(source: str, ids: Sequence[str], other: str, others: Sequence[str]) -> None:
    """Refuse examples that only one of two has."""
    for place, mine, against, theirs in ((source, ids, other, others), (other, others, source, ids)):
        missing = sorted(set(mine) - set(theirs))
        if missing:
            got = f"{len(missing):,} of {len(mine):,} ids that {against} lacks ({few(missing)})"
            refuse(
                place, got, "the same examples on both sides", "score both on the same, or name the column of the id"
            )


def check_same_values(
    source: str, values: Sequence[str | None], other: str, others: Sequence[str | None], ids: Sequence[str], what: str
) -> None:
    """Refuse an example with two labels or classes."""
    differ = [(name, a, b) for name, a, b in zip(ids, values, others, strict=True) if a != b]
    if differ:
        name, a, b = differ[0]
        got = f"{len(differ):,} examples with another {what} than in {other} ({name}: {a} and {b})"
        refuse(source, got, f"one {what} per example", "correct it, or name the column of the id with --paired-by")
