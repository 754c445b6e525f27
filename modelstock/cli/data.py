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
ONLY_DRAWN: dict[str, Any] = {"seed": 0, "reference_draws": 1, "reference_epochs": 1}  # not read for images on disk


def prepare(
    source: Annotated[str, typer.Argument(help="A folder, archive, webdataset shards, or folder of `datasets`.")],
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
    held_out_per_class: Annotated[int, typer.Option(min=1, help="Images per class that are held out.")] = 26,
    short_side: Annotated[int | None, typer.Option(min=1, help="Make larger images this small.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEGs that are made smaller.")] = 95,
    shard_size: Annotated[int, typer.Option(min=1, help="Images per shard.")] = 1000,
    unreadable: Annotated[float, typer.Option(min=0, max=1, help="Share of images that may be left out.")] = 0.001,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    devkit: Annotated[str | None, typer.Option(help="ILSVRC2012_devkit_t12.tar.gz, for flat validation sets.")] = None,
    mappings: Annotated[str | None, typer.Option(help="ObjectNet's folder of that name.")] = None,
    password: Annotated[str | None, typer.Option(help="Of a zip archive.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make webdataset shards and a manifest of images on disk."""
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
    split = {
        "source": "files",
        "path": source,
        "labels": labels,
        "role": None if role in TRAINING else role,
        "part": part,
        "devkit": devkit,
        "mappings": mappings,
        "password": password,
    }
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


def _summary(manifest: "Manifest") -> str:
    counts: dict[str, Any] = {"images": manifest.count, "labels": len(manifest.labels)}
    if manifest.unreadable:
        counts["unreadable"] = len(manifest.unreadable)
    counts |= manifest.left_out
    return ", ".join(f"{count} {what}" for what, count in counts.items()) + f", {manifest.sha256[:12]}"
