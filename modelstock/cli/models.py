"""`modelstock anchor` and `export`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstock.cli.options import Device, OutFile, OutFolder, Overwrite, check_choice, class_section
from modelstock.damage import cure_of
from modelstock.errors import DataError, ParamsError
from modelstock.files import is_intact

LIBRARIES = ("open_clip", "transformers", "timm")
POOLINGS = ("mean", "first", "pooler")


def anchor(
    architecture: Annotated[
        str,
        typer.Argument(
            help="A model of open_clip, such as ViT-B-32-quickgelu; of transformers, a name on the hub or a folder; "
            "or of timm."
        ),
    ],
    out: OutFile,
    classes: Annotated[
        str, typer.Option(help="imagenet, a file (one per line, or JSON), or names with commas between them.")
    ],
    pretrained: Annotated[
        str | None, typer.Option(help="A tag, a file, a folder, or random; with transformers, random alone.")
    ] = None,
    templates: Annotated[str, typer.Option(help="openai, a file, or one text with {} for the name.")] = "openai",
    library: Annotated[str, typer.Option(help="open_clip, transformers or timm.")] = "open_clip",
    tower: Annotated[str, typer.Option(help="Of open_clip: image; or text, which then classifies texts.")] = "image",
    length: Annotated[int | None, typer.Option(min=1, help="The most tokens of a text.")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="Of transformers: mean, max, first or pooler. Without it: mean.")
    ] = None,
    normalise: Annotated[
        bool | None, typer.Option(help="Of transformers: whether features have length 1. Without it: they have.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Of timm: pixels of an image's side.")] = None,
    head: Annotated[
        str | None, typer.Option(help="prompts, or a linear probe: probe, which models of timm have alone.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="Of a head from prompts: the model's own, or fitted, as encoders have alone.")
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Training shards, for a probe.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Held-out shards, for a probe or a fitted scale.")] = None,
    clip_out: Annotated[Path | None, typer.Option(help="Write both towers too, as `modelstock export` needs.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Make an anchor: a tower with a head, zero-shot from class names and templates, or a linear probe."""
    from modelstock.merging.files import check_paths

    for path in [out] if clip_out is None else [out, clip_out]:
        check_paths([], [path], overwrite)
    if clip_out is not None and clip_out.resolve() == out.resolve():
        raise ParamsError("--clip-out", got="the file of --out", expected="another", cure="name another")
    check_choice("--device", device, ("auto", "cpu", "cuda"))
    check_choice("--library", library, LIBRARIES)
    check_choice("--tower", tower, ("image", "text"))
    if pooling is not None:
        check_choice("--pooling", pooling, POOLINGS)
    head = head or ("probe" if library == "timm" else "prompts")
    scale = scale or ("fitted" if library == "transformers" and head == "prompts" else "model")
    check_choice("--head", head, ("prompts", "probe"))
    check_choice("--scale", scale, ("model", "fitted"))
    source = f"{library}-text" if (library, tower) == ("open_clip", "text") else library
    given = {
        "--pretrained": pretrained,
        "--length": length,
        "--pooling": pooling,
        "--normalise": normalise,
        "--size": size,
    }
    backbone = _section(source, architecture, seed, given)
    if clip_out is not None and source != "open_clip":
        raise ParamsError("--clip-out", got=clip_out, expected=f"none for {source}", cure="leave it out")
    _check_data(head, scale, train=train, held_out=held_out)
    section = class_section(classes, templates)
    from pydantic import TypeAdapter, ValidationError

    from modelstock.data.classes import class_names
    from modelstock.data.classes import templates as prompts_of
    from modelstock.devices import device_kind
    from modelstock.experiment.anchor import Data, make_anchor
    from modelstock.models.backbone import Published, load_backbone
    from modelstock.params import AnchorParams

    names, prompts = class_names(section), prompts_of(section)
    kind = device_kind(device)
    data = Data(train=train, held_out=held_out)
    try:
        checked: Published = TypeAdapter(Published).validate_python(backbone)
    except ValidationError as error:
        problem = error.errors()[-1]
        place = str(problem["loc"][-1])
        raise ParamsError(place, got=repr(problem["input"]), expected=problem["msg"], cure="see --help") from None
    clip = load_backbone(checked)
    how = AnchorParams.model_validate({"head": head, "scale": scale})
    weights = make_anchor(clip, names, prompts, how, data=data, device=kind)
    if clip_out is not None:
        clip.save(clip_out)
    weights.save(out)
    by = f" x {len(prompts)} templates" if head == "prompts" else ", a linear probe"
    print(f"{out}: {len(names)} classes{by}, identity {weights.identity[:12]}")


# What belongs to each library and tower besides --seed, and whether it must be there.
TAKES = {
    "open_clip": {"--pretrained": True},
    "open_clip-text": {"--pretrained": True, "--length": False},
    "transformers": {"--pretrained": False, "--length": True, "--pooling": False, "--normalise": False},
    "timm": {"--pretrained": True, "--size": False},
}


def _section(source: str, model: str, seed: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's section of a params file, from the options of the command line; None: not given.

    Raises:
        ParamsError: an option of another library or tower, or one that is missing.
    """
    takes = TAKES[source]
    settings = {option: value for option, value in given.items() if value is not None}
    for option, value in settings.items():
        if option not in takes:
            raise ParamsError(option, got=value, expected=f"none for {source}", cure="leave it out")
    for option, needed in takes.items():
        if needed and option not in settings:
            raise ParamsError(option, got="none", expected=f"it, for {source}", cure="name it; see --help")
    section = {option.removeprefix("--"): value for option, value in settings.items()}
    if source == "transformers" and "pretrained" in section:
        check_choice("--pretrained", section["pretrained"], ("random", "none: the model is its name or folder"))
        section["weights"] = section.pop("pretrained")
    return {
        "source": source,
        "architecture" if source.startswith("open_clip") else "model": model,
        "seed": seed,
    } | section


def _check_data(head: str, scale: str, *, train: Path | None, held_out: Path | None) -> None:
    """Refuse shards that are missing, or that nothing would read."""
    wanted = {"--train": head == "probe", "--held-out": head == "probe" or scale == "fitted"}
    what = "a probe" if head == "probe" else f"the scale {scale}"
    for (option, needed), given in zip(wanted.items(), (train, held_out), strict=True):
        if needed and given is None:
            raise ParamsError(option, got="none", expected=f"shards, for {what}", cure="name them")
        if given is not None and not needed:
            raise ParamsError(option, got=given, expected=f"none, for {what}", cure="leave it out, or --scale fitted")


def export(
    weights: Annotated[Path, typer.Argument(help="A weight set, such as the champion.")],
    out: OutFolder,
    clip: Annotated[
        Path | None, typer.Option(help="Of towers of open_clip: the CLIP with both towers that its anchor was made of.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="reports/comparison.json, for the model card.")] = None,
    license: Annotated[str | None, typer.Option(help="An identifier for the card, such as mit.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a weight set as a folder that open_clip, transformers or timm loads, with its head and a model card."""
    from modelstock.models.export import export as write
    from modelstock.weights.weight_set import load_weights

    comparison = None
    if report is not None:
        try:
            comparison = json.loads(report.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            line = " ".join(str(error).split())
            raise DataError(report, got=line, expected="reports/comparison.json", cure="check the path") from error
        if not is_intact(comparison):
            raise DataError(
                report,
                got="values that do not have the sha256 they were written with",
                expected="reports/comparison.json, as it was written",
                cure=cure_of(report, "compare again"),
            )
    whole = None if clip is None else load_weights(clip)
    loads = write(load_weights(weights), whole, out, report=comparison, licence=license, overwrite=overwrite)
    print(f"{out}: {loads}")
