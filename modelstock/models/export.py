"""A weight set as a folder that open_clip loads, as its models are published, with the fine-tuned head beside it."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from open_clip.pretrained import get_pretrained_cfg

from modelstock.errors import DataError, ParamsError, WeightsError, few
from modelstock.files import dump_json
from modelstock.models.pretrained import CONFIG
from modelstock.weights.differences import differences
from modelstock.weights.format import write_arrays
from modelstock.weights.weight_set import WeightSet, classes_sha256

WEIGHTS = "open_clip_model.safetensors"
HEAD = "head.safetensors"
CLASSES = "classes.json"
CARD = "README.md"


@contextmanager
def whole_folder(folder: Path, overwrite: bool, config: str = CONFIG) -> Iterator[Path]:
    """Yield a sibling folder that takes the place of `folder` when everything in it is written, else vanishes.

    `config`: the file by which an export is known.

    Raises:
        ParamsError: the folder exists, and is not to be overwritten or is no export.
    """
    folder = Path(os.path.abspath(folder))
    exists = folder.exists() or folder.is_symlink()
    if exists and not overwrite:
        raise ParamsError(
            folder, got="something that exists", expected="a new folder", cure="name another, or --overwrite"
        )
    if exists and not (folder.is_dir() and ((folder / config).is_file() or not any(folder.iterdir()))):
        raise ParamsError(
            folder, got="something that is no export", expected=f"a folder with {config}", cure="name another"
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
        if exists:
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if exists:
                os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _check_origin(weights: WeightSet, clip: WeightSet) -> None:
    """Raise WeightsError unless these are a weight set with a head and the CLIP that it descends from."""
    if "architecture" not in weights.meta or not {"head.weight", "head.bias"} <= weights.tensors.keys():
        raise WeightsError(
            weights.source,
            got="a file without architecture or head",
            expected="a weight set made by modelstock",
            cure="make it with the stages, or `modelstock merge`",
        )
    if "architecture" not in clip.meta or "logit_scale" not in clip.tensors:
        raise WeightsError(
            clip.source,
            got="a file without architecture or text tower",
            expected="a CLIP with both towers",
            cure="name the file of the stage pretrain, or of `modelstock anchor --clip-out`",
        )
    tuned, built = weights.meta["architecture"], clip.meta["architecture"]
    if "kind" in tuned:
        raise WeightsError(
            weights.source,
            got=f"a tower of the kind {tuned['kind']}",
            expected="an image tower of a CLIP",
            cure="use the weight set as it is: its metadata say how it is built",
        )
    if differing := sorted(key for key in tuned.keys() | built.keys() if tuned.get(key) != built.get(key)):
        raise WeightsError(
            clip.source,
            got=f"another architecture ({', '.join(differing)} differ)",
            expected=f"that of {weights.source}",
            cure="name the CLIP that the weights were fine-tuned from",
        )
    ancestors = {weights.meta.get("clip"), *weights.meta.get("parents", [])}
    if clip.identity not in ancestors:
        recorded = str(weights.meta.get("clip", ""))[:12] or "none recorded"
        raise WeightsError(
            clip.source,
            got=f"the CLIP {clip.identity[:12]}",
            expected=f"the ancestor of {weights.source} ({recorded})",
            cure="name the CLIP that its anchor was made of",
        )
    tower, expected = ({n: t for n, t in w.tensors.items() if n.startswith("visual.")} for w in (weights, clip))
    if problems := differences(tower, expected, whose="the CLIP's"):
        raise WeightsError(
            weights.source, got=few(problems), expected=f"the image tower of {clip.source}", cure="make it again"
        )


def names_of_classes(weights: WeightSet) -> tuple[str, ...]:
    """The names of a head's classes, in order.

    Raises:
        WeightsError: they are not recorded, or are not those that the head was made for.
    """
    names, count = tuple(weights.meta.get("classes", ())), len(weights.tensors["head.weight"])
    if len(names) != count or weights.meta.get("classes_sha256") != classes_sha256(names):
        raise WeightsError(
            weights.source,
            got=f"{len(names)} class names for a head of {count}",
            expected="a weight set that names its classes",
            cure="make its anchor again with this version",
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
    _check_origin(weights, clip)
    names = names_of_classes(weights)
    figures = () if report is None else figures_of(report, weights)
    both = {n: weights.tensors[n] if n.startswith("visual.") else t for n, t in clip.tensors.items()}
    WeightSet(both, {}, weights.source).check_finite()
    preprocess = {"resize_mode": "shortest", **weights.meta["preprocess"]}
    config = {
        "model_cfg": weights.meta["architecture"],
        "preprocess_cfg": {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")},
    }
    head = {"weight": weights.tensors["head.weight"], "bias": weights.tensors["head.bias"]}
    with whole_folder(folder, overwrite) as new:
        (new / CONFIG).write_text(dump_json(config), encoding="utf-8")
        write_arrays(new / WEIGHTS, both)
        write_arrays(new / HEAD, head)
        (new / CLASSES).write_text(dump_json(list(names)), encoding="utf-8")
        card = _card(weights, Path(folder).absolute().name, figures=figures, licence=licence)
        (new / CARD).write_text(card, encoding="utf-8")


# ---------------------------------------------------------------- the model card


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An accuracy on the card: of which set, in which role, in [0, 1], with its interval."""

    benchmark: str
    role: str
    value: float
    low: float
    high: float


def figures_of(report: Mapping[str, Any], weights: WeightSet) -> Sequence[Figure]:
    """A comparison's accuracies of a weight set, the mean of the shifts last.

    Raises:
        DataError: a report of another form, or one without these weights.
    """
    try:
        names = [row["name"] for row in report["rows"] if row["identity"] == weights.identity]
        if not names:
            raise DataError(
                "report",
                got=f"no row of {weights.source} ({weights.identity[:12]})",
                expected="the weights to export",
                cure="name the comparison that scored them, or leave --report out",
            )
        accuracy, roles = report["accuracy"][names[0]], {report["held_out"]: "held out, chosen on"}
        roles |= {name: "held-out shift, chosen on" for name in report.get("held_out_shifts", [])}
        roles |= {report["in_distribution"]: "in distribution"} | {name: "shift" for name in report["shifts"]}
        rows = [(name, roles.get(name, ""), accuracy[name]) for name in report["benchmarks"]]
        mean = report.get("summary", {}).get(names[0], {}).get("shifts") or report.get("shift_mean", {}).get(names[0])
        rows += [("mean of shifts", "", mean)] if mean else []
        return [
            Figure(benchmark=name, role=role, value=e["value"], low=e["low"], high=e["high"]) for name, role, e in rows
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "report",
            got=f"a file without {error}",
            expected="reports/comparison.json",
            cure="run the stage compare again",
        ) from error


def _base(backbone: Mapping[str, str]) -> str | None:
    """The hub's repository of published weights, where they have one."""
    tag = get_pretrained_cfg(backbone.get("name", ""), backbone.get("pretrained", ""))
    return str(tag["hf_hub"]).rpartition("/")[0] if tag.get("hf_hub") else None


def _card(weights: WeightSet, name: str, *, figures: Sequence[Figure], licence: str | None) -> str:
    """The model card: front matter for the hub, then what it is, how good, and how to use it."""
    meta = weights.meta
    origin = meta.get("made_by", {})
    backbone = meta.get("backbone", {})
    base = _base(backbone)
    # A local file or folder is named without the place where it lay.
    parent = f"{backbone.get('name', 'a CLIP')} ({Path(str(backbone.get('pretrained', 'not recorded'))).name})"
    method = str(origin.get("method", origin.get("stage", "not recorded")))
    how = "fine-tuned and merged" if "method" in origin else method
    tokenizer = meta["architecture"].get("text_cfg", {}).get("hf_tokenizer_name")
    link = f"[{base}](https://huggingface.co/{base})" if base else parent
    also = f" This folder is published under {licence} as far as that allows." if licence else ""
    lines = [
        *("---", front_matter(base, licence, merged="method" in origin), "---"),
        f"# {name}",
        f"An image classifier for {len(weights.tensors['head.weight'])} classes: {parent}, {how} with modelstock.",
        "",
        *facts_of(weights, method),
        *accuracies_of(figures),
        *("", "## Use", "```python", *_example(name), "```", ""),
        f"`{HEAD}` is the fine-tuned head, over normalised image features; `{CLASSES}` has its classes in order. "
        "The text tower is the backbone's, unchanged, so zero-shot prompts work as well.",
        *([f"The tokenizer is not in this folder: it is that of `{tokenizer}`."] if tokenizer else []),
        *("", "## Licence"),
        f"The weights derive from those of {link}, whose licence governs them; the terms of the training images may "
        f"add to it.{also}",
    ]
    return "\n".join(lines) + "\n"


def front_matter(
    base: str | None, licence: str | None, *, merged: bool, library: str = "open_clip", tags: Sequence[str] = ("clip",)
) -> str:
    """What the hub reads of a card, as YAML."""
    data = ModelCardData(
        base_model=base,
        base_model_relation=("merge" if merged else "finetune") if base else None,
        library_name=library,
        license=licence or "other",
        pipeline_tag="image-classification",
        tags=[*tags, "modelstock", *(["merge"] if merged else [])],
    )
    return str(data.to_yaml())


def facts_of(weights: WeightSet, method: str) -> list[str]:
    """The card's table of how the weights were made."""
    origin = weights.meta.get("made_by", {})
    lines = ["| | |", "|---|---|", f"| method | {_cell(method)} |"]
    if "members" in origin:
        lines.append(f"| members (seeds) | {_cell(', '.join(map(str, origin['members'])))} |")
    if origin.get("options"):
        options = ", ".join(f"{name}={json.dumps(value)}" for name, value in sorted(origin["options"].items()))
        lines.append(f"| options | {_cell(options)} |")
    lines.append(f"| identity (sha256 of the tensors) | `{weights.identity}` |")
    lines += [f"| parent | `{parent}` |" for parent in weights.meta.get("parents", [])]
    if "version" in origin:
        lines.append(f"| version of modelstock | {_cell(str(origin['version']))} |")
    return lines


def accuracies_of(figures: Sequence[Figure]) -> list[str]:
    """The card's table of accuracies; nothing where there are none."""
    if not figures:
        return []
    rows = [
        f"| {_cell(f.benchmark)} | {f.role} | {100 * f.value:.1f} | {100 * f.low:.1f} to {100 * f.high:.1f} |"
        for f in figures
    ]
    intervals = "Top-1 in percent, with 95 % intervals over the test images."
    return ["", "## Accuracy", intervals, "", "| set | role | top-1 | interval |", "|---|---|---:|---:|", *rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _example(name: str) -> list[str]:
    return [
        "import json, open_clip, torch",
        "from pathlib import Path",
        "from PIL import Image",
        "from safetensors.torch import load_file",
        "",
        f"folder = Path({json.dumps(name)})",
        'model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")',
        f'head, classes = load_file(folder / "{HEAD}"), json.loads((folder / "{CLASSES}").read_text())',
        "with torch.inference_mode():",
        '    pixels = preprocess(Image.open("image.png").convert("RGB")).unsqueeze(0)',
        "    features = model.eval().encode_image(pixels, normalize=True)",
        '    logits = features @ head["weight"].T + head["bias"]',
        "print(classes[logits.argmax().item()])",
    ]
