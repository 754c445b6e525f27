"""A weight set as a folder that open_clip loads, as its models are published, with the fine-tuned head beside it."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelstock.errors import DataError, ParamsError, WeightsError
from modelstock.files import dump_json
from modelstock.models.pretrained import CONFIG
from modelstock.weights.format import write_arrays
from modelstock.weights.weight_set import WeightSet, classes_sha256

WEIGHTS = "open_clip_model.safetensors"
HEAD = "head.safetensors"
CLASSES = "classes.json"
CARD = "README.md"


@contextmanager
def _whole_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a sibling folder that takes the place of `folder` when everything in it is written, else vanishes.

    Raises:
        ParamsError: the folder exists, and is not to be overwritten or is no export.
    """
    folder = Path(os.path.abspath(folder))
    there = folder.exists() or folder.is_symlink()
    if there and not overwrite:
        raise ParamsError(
            folder, got="something that exists", expected="a new folder", cure="name another, or --overwrite"
        )
    if there and not (folder.is_dir() and ((folder / CONFIG).is_file() or not any(folder.iterdir()))):
        raise ParamsError(
            folder, got="something that is no export", expected=f"a folder with {CONFIG}", cure="name another"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        for path in sorted(new.iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if there:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if there:
                os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check(weights: WeightSet, clip: WeightSet) -> tuple[str, ...]:
    """The class names of a weight set that descends from a CLIP.

    Raises:
        WeightsError: it does not, or one of them is not what it should be.
    """

    def refuse(source: str, got: str, expected: str, cure: str) -> WeightsError:
        return WeightsError(source, got=got, expected=expected, cure=cure)

    if "architecture" not in weights.meta or not {"head.weight", "head.bias"} <= weights.tensors.keys():
        raise refuse(
            weights.source,
            "a file without architecture or head",
            "a weight set made by modelstock",
            "make it with the stages, or `modelstock merge`",
        )
    if "architecture" not in clip.meta or "logit_scale" not in clip.tensors:
        raise refuse(
            clip.source,
            "a file without architecture or text tower",
            "a CLIP with both towers",
            "name the file of the stage pretrain, or of `modelstock anchor --clip-out`",
        )
    ours, theirs = weights.meta["architecture"], clip.meta["architecture"]
    if ours != theirs:
        differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        raise refuse(
            clip.source,
            f"another architecture ({', '.join(differing)} differ)",
            f"that of {weights.source}",
            "name the CLIP that the weights were fine-tuned from",
        )
    ancestors = {weights.meta.get("clip"), *weights.meta.get("parents", [])}
    if clip.identity not in ancestors:
        known = str(weights.meta.get("clip", ""))[:12] or "none recorded"
        raise refuse(
            clip.source,
            f"the CLIP {clip.identity[:12]}",
            f"the ancestor of {weights.source} ({known})",
            "name the CLIP that its anchor was made of",
        )
    own = {n: t.shape for n, t in weights.tensors.items() if n.startswith("visual.")}
    if own != {n: t.shape for n, t in clip.tensors.items() if n.startswith("visual.")}:
        raise refuse(weights.source, "an image tower with other tensors", f"those of {clip.source}", "make it again")
    names = tuple(weights.meta.get("classes", ()))
    if len(names) != len(weights.tensors["head.weight"]) or weights.meta.get("classes_sha256") != classes_sha256(names):
        raise refuse(
            weights.source,
            f"{len(names)} class names for a head of {len(weights.tensors['head.weight'])}",
            "a weight set that names its classes",
            "make its anchor again with this version",
        )
    return names


def export(
    weights: WeightSet,
    clip: WeightSet,
    folder: Path,
    *,
    report: Mapping[str, Any] | None = None,
    licence: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write a weight set as an open_clip folder: `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads it.

    It holds the image tower of `weights` with the text tower of `clip`, its ancestor; the head (`weight` (C, D), `bias`
    (C,)) over normalised image features; the classes' names; and a model card. `report`: the comparison's JSON, whose
    figures for these weights go on the card. `licence`: an identifier as the hub knows them. Whole or not at all.

    Raises:
        WeightsError: weights that do not descend from the clip, or do not name their classes.
        DataError: a report without these weights.
        ParamsError: a folder that exists.
    """
    names = _check(weights, clip)
    figures = None if report is None else _figures(report, weights)
    both = {n: weights.tensors.get(n, t) if n.startswith("visual.") else t for n, t in clip.tensors.items()}
    WeightSet(both, {}, weights.source).check_finite()
    preprocess = weights.meta["preprocess"]
    config = {
        "model_cfg": weights.meta["architecture"],
        "preprocess_cfg": {
            "mean": preprocess["mean"],
            "std": preprocess["std"],
            "interpolation": preprocess["interpolation"],
            "resize_mode": preprocess.get("resize_mode", "shortest"),
        },
    }
    head = {"weight": weights.tensors["head.weight"], "bias": weights.tensors["head.bias"]}
    with _whole_folder(folder, overwrite) as new:
        (new / CONFIG).write_text(dump_json(config), encoding="utf-8")
        write_arrays(new / WEIGHTS, both)
        write_arrays(new / HEAD, head)
        (new / CLASSES).write_text(dump_json(list(names)), encoding="utf-8")
        (new / CARD).write_text(_card(weights, Path(folder).absolute().name, figures, licence), encoding="utf-8")


def _figures(report: Mapping[str, Any], weights: WeightSet) -> list[tuple[str, str, Mapping[str, float]]]:
    """What a comparison says of a weight set: (set, role, {value, low, high}), the mean of the shifts last.

    Raises:
        DataError: a report of another form, or one without these weights.
    """
    try:
        named = [row["name"] for row in report["rows"] if row["identity"] == weights.identity]
        if not named:
            raise DataError(
                "report",
                got=f"no row of {weights.source} ({weights.identity[:12]})",
                expected="the weights to export",
                cure="name the comparison that scored them, or leave --report out",
            )
        accuracy, roles = report["accuracy"][named[0]], {report["held_out"]: "held out, chosen on"}
        roles |= {report["in_distribution"]: "in distribution"} | {name: "shift" for name in report["shifts"]}
        found = [(name, roles.get(name, ""), accuracy[name]) for name in report["benchmarks"]]
        mean = report.get("summary", {}).get(named[0], {}).get("shifts") or report.get("shift_mean", {}).get(named[0])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "report",
            got=f"a file without {error}",
            expected="reports/comparison.json",
            cure="run the stage compare again",
        ) from error
    return found + ([("mean of shifts", "", mean)] if mean else [])


def _base(backbone: Mapping[str, str]) -> str | None:
    """The hub's repository of published weights, where they have one."""
    from open_clip import pretrained

    tag = pretrained.get_pretrained_cfg(backbone.get("name", ""), backbone.get("pretrained", ""))
    return str(tag["hf_hub"]).rpartition("/")[0] if tag.get("hf_hub") else None


def _card(weights: WeightSet, name: str, figures: Any, licence: str | None) -> str:
    """The model card: front matter for the hub, then what it is, how good, and how to use it."""
    meta, made = weights.meta, weights.meta.get("made_by", {})
    backbone = meta.get("backbone", {})
    base = _base(backbone)
    # A local file or folder is named without the place where it lay.
    origin = f"{backbone.get('name', 'a CLIP')} ({Path(str(backbone.get('pretrained', 'not recorded'))).name})"
    merged = "method" in made
    front: dict[str, Any] = {
        "library_name": "open_clip",
        "pipeline_tag": "image-classification",
        "tags": ["clip", "modelstock", *(["merge"] if merged else [])],
        "license": licence or "other",
    }
    if base:
        front |= {"base_model": base, "base_model_relation": "merge" if merged else "finetune"}
    # JSON is YAML, and quotes whatever a name may hold.
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---"]
    head = weights.tensors["head.weight"]
    method = str(made.get("method", made.get("stage", "not recorded")))
    lines += [
        f"# {name}",
        f"An image classifier for {len(head)} classes: {origin}, {'fine-tuned and merged' if merged else method} with "
        "modelstock.",
        "",
        "| | |",
        "|---|---|",
        f"| method | {_cell(method)} |",
    ]
    lines += [f"| members (seeds) | {_cell(', '.join(map(str, made['members'])))} |"] if "members" in made else []
    lines += [f"| options | {_cell(_shown(made['options']))} |"] if made.get("options") else []
    lines += [f"| identity (sha256 of the tensors) | `{weights.identity}` |"]
    lines += [f"| parent | `{parent}` |" for parent in meta.get("parents", [])]
    lines += [f"| version of modelstock | {_cell(str(made['version']))} |"] if "version" in made else []
    if figures is not None:
        lines += ["", "## Accuracy", "Top-1 in percent, with 95 % intervals over the test images.", ""]
        lines += ["| set | role | top-1 | interval |", "|---|---|---:|---:|"]
        lines += [
            f"| {_cell(label)} | {role} | {100 * e['value']:.1f} | {100 * e['low']:.1f} to {100 * e['high']:.1f} |"
            for label, role, e in figures
        ]
    lines += ["", "## Use", "```python", *_example(name), "```", ""]
    lines += [
        f"`{HEAD}` is the fine-tuned head, over normalised image features; `{CLASSES}` has its classes in order. "
        "The text tower is the backbone's, unchanged, so zero-shot prompts work as well.",
    ]
    if tokenizer := meta["architecture"].get("text_cfg", {}).get("hf_tokenizer_name"):
        lines += [f"The tokenizer is not in this folder: it is that of `{tokenizer}`."]
    of = f"[{base}](https://huggingface.co/{base})" if base else origin
    lines += ["", "## Licence"]
    lines += [
        f"The weights derive from those of {of}, whose licence governs them; the terms of the training images may add "
        "to it." + (f" This folder is published under {licence} as far as that allows." if licence else "")
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(options.items()))


def _example(name: str) -> list[str]:
    return [
        "import json, open_clip, torch",
        "from PIL import Image",
        "from safetensors.torch import load_file",
        "",
        f"folder = {json.dumps(name)}",
        'model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")',
        f'head, classes = load_file(f"{{folder}}/{HEAD}"), json.load(open(f"{{folder}}/{CLASSES}"))',
        "with torch.inference_mode():",
        '    pixels = preprocess(Image.open("image.png").convert("RGB")).unsqueeze(0)',
        "    features = model.eval().encode_image(pixels, normalize=True)",
        '    logits = features @ head["weight"].T + head["bias"]',
        "print(classes[logits.argmax().item()])",
    ]
