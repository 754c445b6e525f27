"""`modelstock anchor` and `export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from modelstock.cli.options import Device, OutFile, OutFolder, Overwrite, check_choice, class_section
from modelstock.damage import cure_of
from modelstock.errors import DataError, ParamsError
from modelstock.files import is_intact


def anchor(
    architecture: Annotated[str, typer.Argument(help="A model of open_clip, such as ViT-B-32-quickgelu.")],
    out: OutFile,
    pretrained: Annotated[str, typer.Option(help="A tag, a file, a folder, or random.")],
    classes: Annotated[
        str, typer.Option(help="imagenet, a file (one per line, or JSON), or names with commas between them.")
    ],
    templates: Annotated[str, typer.Option(help="openai, a file, or one text with {} for the name.")] = "openai",
    clip_out: Annotated[Path | None, typer.Option(help="Write both towers too, as `modelstock export` needs.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of random weights.")] = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Make an anchor: a CLIP's image tower with the zero-shot head of class names and templates."""
    from modelstock.merging.files import check_paths

    for path in [out] if clip_out is None else [out, clip_out]:
        check_paths([], [path], overwrite)
    if clip_out is not None and clip_out.resolve() == out.resolve():
        raise ParamsError("--clip-out", got="the file of --out", expected="another", cure="name another")
    check_choice("--device", device, ("auto", "cpu", "cuda"))
    section = class_section(classes, templates)
    from modelstock.data.classes import class_names
    from modelstock.data.classes import templates as prompts_of
    from modelstock.devices import device_kind
    from modelstock.models.anchor import anchor_of
    from modelstock.models.pretrained import load_clip

    names, prompts = class_names(section), prompts_of(section)
    kind = device_kind(device)
    clip = load_clip(architecture, pretrained, seed=seed)
    weights = anchor_of(clip, names, prompts, device=kind)
    if clip_out is not None:
        clip.save(clip_out)
    weights.save(out)
    print(f"{out}: {len(names)} classes x {len(prompts)} templates, identity {weights.identity[:12]}")


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
