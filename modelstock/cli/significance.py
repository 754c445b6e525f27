"""`modelstock significance`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelstock.cli.options import AsJson, check_once
from modelstock.errors import ParamsError

if TYPE_CHECKING:
    from modelstock.significance import Significance


def significance(
    scores_a: Annotated[str | None, typer.Argument(help="Results per example of A; several files by commas.")] = None,
    scores_b: Annotated[str | None, typer.Argument(help="Results per example of B; A's file with --row-b.")] = None,
    a: Annotated[list[Path] | None, typer.Option("--a", help="A file of A, one per seed.")] = None,
    b: Annotated[list[Path] | None, typer.Option("--b", help="A file of B, one per seed.")] = None,
    row_a: Annotated[
        list[str] | None, typer.Option(help="Of a results file: A's row, a kind of rows, or a pattern such as seed-*.")
    ] = None,
    row_b: Annotated[list[str] | None, typer.Option(help="The same for B.")] = None,
    paired_by: Annotated[str | None, typer.Option(help="The column of the examples' ids: id or doc_id.")] = None,
    correct: Annotated[
        str | None, typer.Option(help="The column of right or wrong: correct, acc or exact_match.")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="COLUMN=VALUE: read only these lines, as filter=strict-match.")
    ] = None,
    by_class: Annotated[
        str | None, typer.Option(help="The column of a class whose examples are drawn together.")
    ] = None,
    margin: Annotated[float, typer.Option(min=0, max=50, help="Points by which A may be lower and is no worse.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Is A better than B? From results per example: .csv, .jsonl with id and correct, or our .safetensors."""
    files_a, files_b = _files("SCORES_A", scores_a, a), _files("SCORES_B", scores_b, b)
    if not files_b and row_b:
        files_b = files_a
    for side, files in (("SCORES_A", files_a), ("SCORES_B", files_b)):
        if not files:
            raise ParamsError(side, got="no file", expected="results per example", cure="name it; see --help")
        check_once(side, files)
    same = {file.resolve() for file in files_a} & {file.resolve() for file in files_b}
    if same and not (row_a and row_b):
        got = f"{same.pop()}, which SCORES_A has too"
        raise ParamsError("SCORES_B", got=got, expected="other results", cure="choose rows with --row-a and --row-b")
    from modelstock.significance import Columns, read_outcomes
    from modelstock.significance import significance as of_two_sides

    columns = Columns(id=paired_by, correct=correct, by_class=by_class, where=_where(where or []))
    sides = [read_outcomes(files, columns, rows or []) for files, rows in ((files_a, row_a), (files_b, row_b))]
    found = of_two_sides(*sides, margin=margin / 100)
    if as_json:
        print(json.dumps({"source_a": sides[0].source, "source_b": sides[1].source, **found.as_dict()}, indent=1))
        return
    for line in lines(found, sides[0].source, sides[1].source):
        print(line)


def lines(found: "Significance", source_a: str, source_b: str) -> list[str]:
    """What is printed, in percent and points."""
    one = found.difference
    beats = one.beats if isinstance(one.beats, str) else _with_ends(one.beats.value, one.beats.low, one.beats.high)
    several = found.rows_a > 1 or found.rows_b > 1
    shown = [
        f"A: {_with_ends(found.a.value, found.a.low, found.a.high)} % over {found.a.over}, "
        f"{_mean_of(found.rows_a)}{source_a}",
        f"B: {_with_ends(found.b.value, found.b.low, found.b.high)} % over {found.b.over}, "
        f"{_mean_of(found.rows_b)}{source_b}",
        f"A - B: {_with_ends(one.value, one.low, one.high, sign='+')} points over {one.over}, p = {one.p:.3g} "
        f"({found.examples:,} examples{f'; seeds {found.seeds}' if several else ''})",
    ]
    if found.balanced is not None and found.balanced.differs(found):
        balanced = found.balanced.difference
        shown.append(
            f"balanced accuracy: A {100 * found.balanced.a:.2f} %, B {100 * found.balanced.b:.2f} %, "
            f"A - B: {_with_ends(balanced.value, balanced.low, balanced.high, sign='+')} points over {balanced.over}, "
            f"p = {balanced.p:.3g}"
        )
    if found.mcnemar is not None:
        shown.append(
            f"McNemar, exact: {found.wins:,} examples that only A gets right, {found.losses:,} that only B does, "
            f"p = {found.mcnemar:.3g}"
        )
    margin = f"{100 * found.margin:g} points"
    shown += [
        f"P(A beats B) for a new draw of seeds, on these examples: {beats}{'' if beats == one.beats else ' %'}",
        f"detectable with 80 % power at 5 %: {100 * one.detectable:.2f} points",
        f"A no worse than B by {margin}: {one.no_worse}; equivalent within {margin}: {one.equivalent}",
        found.verdict(),
    ]
    return shown


def _with_ends(value: float, low: float, high: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.2f} [{100 * low:{sign}.2f}, {100 * high:{sign}.2f}]"


def _mean_of(rows: int) -> str:
    return f"mean of {rows}, " if rows > 1 else ""


def _files(side: str, named: str | None, more: Sequence[Path] | None) -> list[Path]:
    """The files of a side; a name with commas that is no file itself is several."""
    parts = [] if named is None else [named] if Path(named).exists() else named.split(",")
    files = [Path(part.strip()) for part in parts if part.strip()] + list(more or [])
    for file in files:
        if not file.is_file():
            raise ParamsError(f"{side} {file}", got="no such file", expected="a file", cure="correct the path")
    return files


def _where(settings: Sequence[str]) -> dict[str, str]:
    for setting in settings:
        if "=" not in setting:
            raise ParamsError("--where", got=repr(setting), expected="COLUMN=VALUE", cure="write it so")
    return {name: value for name, _, value in (setting.partition("=") for setting in settings)}
