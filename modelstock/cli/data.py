"""`modelstock prepare`."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelstock.cli.options import OutFolder, Overwrite, class_section
from modelstock.errors import ParamsError
from modelstock.files import NAME

if TYPE_CHECKING:
    from modelstock.data.manifest import Manifest

TRAINING = ("train", "held-out")  # roles that are also the names of their sets
OTHERS = ("held-out-shift", "in-distribution", "shift")
TABLES = (".tsv", ".csv", ".jsonl")
ONLY_DRAWN: dict[str, Any] = {"seed": 0, "reference_draws": 1, "reference_epochs": 1}  # not read for what is on disk


def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, archive, webdataset shards, folder of `datasets`, or .tsv, .csv or .jsonl file."
        ),
    ],
    out: OutFolder,
    role: Annotated[str, typer.Option(help="train, held-out, held-out-shift, in-distribution or shift.")],
    labels: Annotated[
        str, typer.Option(help="classes, or a published layout such as imagenet or objectnet.")
    ] = "classes",
    name: Annotated[str | None, typer.Option(help="What results call it.")] = None,
    classes: Annotated[
        str | None, typer.Option(help="a,b,c, or a file with a folder per line (then a tab and its name), or imagenet.")
    ] = None,
    part: Annotated[str, typer.Option(help="all, or train or held-out of a training set.")] = "all",
    held_out_per_class: Annotated[int, typer.Option(min=1, help="Examples per class that are held out.")] = 26,
    short_side: Annotated[int | None, typer.Option(min=1, help="Make larger images this small.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEGs that are made smaller.")] = 95,
    shard_size: Annotated[int, typer.Option(min=1, help="Examples per shard.")] = 1000,
    unreadable: Annotated[float, typer.Option(min=0, max=1, help="Share of examples that may be left out.")] = 0.001,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    devkit: Annotated[str | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz, for flat validation sets.")] = None,
    mappings: Annotated[str | None, typer.Option(help="ObjectNet's folder of that name.")] = None,
    password: Annotated[str | None, typer.Option(help="Of a zip archive.")] = None,
    texts: Annotated[
        bool, typer.Option("--texts", help="The source holds texts; a table or --text says so too.")
    ] = False,
    text: Annotated[str | None, typer.Option(help="Of a table: the column of texts.")] = None,
    label: Annotated[str | None, typer.Option(help="Of a table: the column of labels.")] = None,
    columns: Annotated[
        str | None, typer.Option(help="a,b,c: a table's columns, where its first line lacks them.")
    ] = None,
    ranges: Annotated[
        str | None, typer.Option(help="CLASS=LOW:HIGH,...: what numbers in the column of labels stand for.")
    ] = None,
    duplicates: Annotated[
        str | None, typer.Option(help="Texts of the same words: keep (the default), or the first of them.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make webdataset shards and a manifest of images or texts on disk."""
    from pydantic import ValidationError

    from modelstock.data.preparation import prepare as prepare_split
    from modelstock.params import PrepareParams

    benchmark = _benchmark_name(name, role, labels, source)
    if (out / "manifest.json").exists() and not overwrite:
        raise ParamsError(out, got="shards that exist", expected="a new folder", cure="name another or use --overwrite")
    if classes is None and labels == "classes":
        raise ParamsError(
            "--classes", got="none", expected="names, a file or imagenet", cure="say what the folders are"
        )
    split: dict[str, Any] = {"path": source, "labels": labels, "role": None if role in TRAINING else role, "part": part}
    of_texts: dict[str, Any] = {
        "text": text,
        "label": label,
        "columns": None if columns is None else [name.strip() for name in columns.split(",")],
        "ranges": None if ranges is None else _ranges(ranges),
        "duplicates": duplicates,
    }
    of_images: dict[str, Any] = {"devkit": devkit, "mappings": mappings, "password": password}
    if texts or text is not None or Path(source).suffix.lower() in TABLES:
        kind, split, others = (
            "texts",
            split | of_texts | {"duplicates": duplicates or "keep"},
            of_images | {"short-side": short_side},
        )
    else:
        kind, split, others = "images", split | of_images, of_texts
    given = [f"--{name}" for name, value in others.items() if value is not None]
    if given:
        cure = "leave it out" + ("" if kind == "texts" else ", or say --texts")
        raise ParamsError(given[0], got=f"a source of {kind}", expected="one that it is an option of", cure=cure)
    split["source"] = "texts" if kind == "texts" else "files"
    try:
        params = PrepareParams(
            shard_size=shard_size,
            workers=workers,
            short_side=short_side,
            quality=quality,
            held_out_per_class=held_out_per_class,
            unreadable=unreadable,
            splits={benchmark: split},  # type: ignore[dict-item]
            **ONLY_DRAWN,
        )
    except ValidationError as error:
        text = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise ParamsError("prepare", got=text, expected="valid options", cure="see modelstock prepare --help") from None
    scratch = out.parent / f".{out.name}.unfinished"
    manifest = prepare_split(benchmark, params, class_section(classes or "imagenet", "{}"), out, scratch=scratch)
    if scratch.is_dir() and not any(scratch.iterdir()):
        scratch.rmdir()
    print(f"{out}: {_summary(manifest)}")


def _benchmark_name(name: str | None, role: str, labels: str, source: str) -> str:
    """What results call the set: its role for the two of training, else a name, a published set, or the source's.

    Raises:
        ParamsError: an unknown role, or a name that belongs to another role.
    """
    if name is None:
        if role in TRAINING:
            name = role
        elif labels != "classes":
            name = labels
        else:
            name = Path(source).name.partition(".")[0].lower()
    if not re.fullmatch(NAME, name):
        expected = "lower-case letters, digits, - and _, 100 at most"
        raise ParamsError("--name", got=repr(name), expected=expected, cure="name the set so with --name")
    if role not in TRAINING + OTHERS or (name in TRAINING and name != role):
        raise ParamsError(
            "--role",
            got=f"{role!r} for {name!r}",
            expected="train, held-out, held-out-shift, in-distribution or shift",
            cure="name one of these",
        )
    if role in TRAINING and name != role:
        raise ParamsError(
            "--name", got=repr(name), expected=repr(role), cure="leave it out: such sets go by their role"
        )
    return name


def _ranges(text: str) -> dict[str, list[float]]:
    """`negative=-4:-0.5,positive=0.5:4` as a split has it.

    Raises:
        ParamsError: another form, or a class that comes twice.
    """
    ranges: dict[str, list[float]] = {}
    for part in text.split(","):
        name, _, ends = part.rpartition("=")
        low, _, high = ends.partition(":")
        try:
            numbers = [float(low), float(high)]
        except ValueError:
            numbers = []
        if not numbers or not name.strip() or name.strip() in ranges:
            expected = "CLASS=LOW:HIGH,..., each class once"
            raise ParamsError("--ranges", got=repr(part), expected=expected, cure="write it so")
        ranges[name.strip()] = numbers
    return ranges


def _summary(manifest: "Manifest") -> str:
    counts: dict[str, Any] = {f"{manifest.modality}s": manifest.count, "labels": len(manifest.labels)}
    if manifest.unreadable:
        counts["unreadable"] = len(manifest.unreadable)
    counts |= manifest.left_out
    return ", ".join(f"{count} {what}" for what, count in counts.items()) + f", {manifest.sha256[:12]}"
