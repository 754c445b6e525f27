"""Options that several commands share, and texts on the command line that stand for more than a text."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstock.errors import MergeError, ParamsError

if TYPE_CHECKING:
    from modelstock.params import ClassesParams

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON rather than a table.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Examples per batch.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
OutFile = Annotated[Path, typer.Option("-o", "--out", help="The safetensors file to write.")]
OutFolder = Annotated[Path, typer.Option("-o", "--out", help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace outputs that exist.")]
PRECISIONS = ("float32", "bfloat16", "auto")
Precision = Annotated[str, typer.Option(help="float32, bfloat16, or auto: the faster one; of the towers.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that decode; 0: this one.")]


def check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ParamsError: it is none of them.
    """
    if value not in choices:
        expected = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ParamsError(option, got=repr(value), expected=expected, cure="name one of these")


def check_once(option: str, paths: Sequence[Path]) -> None:
    """Refuse a file that is named twice, by whatever path.

    Raises:
        ParamsError: it is.
    """
    known: dict[Path, Path] = {}
    for path in paths:
        first = known.setdefault(path.resolve(), path)
        if first is not path:
            raise ParamsError(
                option, got=f"{path}, which {first} is too", expected="each file once", cure="name it once"
            )


def method_options(settings: Sequence[str]) -> dict[str, Any]:
    """`option=value` pairs; values are JSON where they can be, else text.

    Raises:
        MergeError: a setting without an equals sign.
    """
    options = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise MergeError("--set", got=repr(setting), expected="option=value", cure="write it so")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def _listed(text: str, what: str) -> Any:
    """What a file of names or templates holds, one per line (or folder, tab, name) or as JSON; None for no file."""
    path = Path(text)
    if not os.path.isfile(path):  # also for a text that is too long for a name
        return None
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(path, got=f"no text ({error})", expected=f"{what} in UTF-8", cure="correct it") from error
    if path.suffix != ".json":
        lines = [line.strip() for line in raw.splitlines() if line.strip()]
        if not any("\t" in line for line in lines):
            return lines
        return _each_once(path, [tuple(map(str.strip, line.split("\t"))) for line in lines])
    try:
        return json.loads(raw, object_pairs_hook=partial(_each_once, path))
    except (ValueError, RecursionError) as error:
        raise ParamsError(path, got=f"no JSON ({error})", expected=f"a list of {what}", cure="correct it") from error


def _each_once(path: Path, pairs: Sequence[tuple[Any, ...]]) -> dict[Any, Any]:
    """Folder -> name, of (folder, name) in a file.

    Raises:
        ParamsError: a line that is no such pair, or a folder that comes twice.
    """
    folders = [pair[0] for pair in pairs]
    wrong = [pair for pair in pairs if len(pair) != 2 or folders.count(pair[0]) > 1]
    if wrong:
        expected = "a folder, a tab and its name on every line, each folder once"
        raise ParamsError(path, got=" ".join(map(repr, wrong[0])), expected=expected, cure="correct it")
    return {folder: name for folder, name in pairs}


def class_section(classes: str, templates: str) -> "ClassesParams":
    """`--classes` and `--templates` as the section `classes` of a params file.

    Raises:
        ParamsError: a file that is no list, or names and templates that the section refuses.
    """
    from pydantic import ValidationError

    from modelstock.params import ClassesParams

    names: Any = classes if classes in ("imagenet", "shapes") else _listed(classes, "class names")
    if names is None:
        names = [name.strip() for name in classes.split(",")]
    texts: Any = templates if templates in ("openai", "shapes") else _listed(templates, "templates") or [templates]
    try:
        return ClassesParams(names=names, templates=texts)
    except ValidationError as error:
        problem = error.errors()[-1]
        field, text = str(problem["loc"][0]), problem["msg"].removeprefix("Value error, ")
        option, value = ("--classes", classes) if field == "names" else ("--templates", templates)
        raise ParamsError(option, got=repr(value), expected=text, cure="see --help") from None
