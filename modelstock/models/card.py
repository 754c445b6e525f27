"""Model cards of exports: what it is, how it was made, how good it is, and how to use it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from open_clip.pretrained import get_pretrained_cfg

from modelstock.errors import DataError
from modelstock.weights.weight_set import WeightSet


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


def _base(backbone: Mapping[str, str], library: str) -> str | None:
    """The hub's repository of published weights, where they have one."""
    name, pretrained = backbone.get("name", ""), backbone.get("pretrained", "")
    if library == "transformers":  # by name where they were had by it, and not from a folder
        return name if name and pretrained not in ("random", str(Path(name))) else None
    tag = get_pretrained_cfg(name, pretrained)
    return str(tag["hf_hub"]).rpartition("/")[0] if tag.get("hf_hub") else None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What the card says of a kind of exports.

    `library`, `task`, `tags`: as the hub calls them. `noun`: "An image classifier". `inputs`: what it was trained on.
    """

    library: str
    task: str
    noun: str
    inputs: str
    tags: Sequence[str] = ()


def card(
    weights: WeightSet,
    name: str,
    *,
    kind: Kind,
    example: Sequence[str],
    notes: Sequence[str],
    figures: Sequence[Figure],
    licence: str | None,
) -> str:
    """The model card: front matter for the hub, then what it is, how good, and how to use it.

    `example`: lines of Python. `notes`: what else is to be known, a line each.
    """
    origin, backbone = weights.meta.get("made_by", {}), weights.meta.get("backbone", {})
    base = _base(backbone, kind.library)
    # A local file or folder is named without the place where it lay.
    parent = base or Path(str(backbone.get("name", "a model"))).name
    if kind.library != "transformers":  # whose names say which weights they are
        parent = f"{backbone.get('name', 'a CLIP')} ({Path(str(backbone.get('pretrained', 'not recorded'))).name})"
    method = str(origin.get("method", origin.get("stage", "not recorded")))
    how = "fine-tuned and merged" if "method" in origin else method
    link = f"[{base}](https://huggingface.co/{base})" if base else parent
    also = f" This folder is published under {licence} as far as that allows." if licence else ""
    lines = [
        *("---", _front_matter(base, licence, kind, merged="method" in origin), "---"),
        f"# {name}",
        f"{kind.noun} for {len(weights.tensors['head.weight'])} classes: {parent}, {how} with modelstock.",
        "",
        *_facts(weights, method),
        *_accuracies(figures, kind),
        *("", "## Use", "```python", *example, "```", ""),
        *notes,
        *("", "## Licence"),
        f"The weights derive from those of {link}, whose licence governs them; the terms of the training {kind.inputs} "
        f"may add to it.{also}",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(base: str | None, licence: str | None, kind: Kind, *, merged: bool) -> str:
    """What the hub reads of a card, as YAML."""
    data = ModelCardData(
        base_model=base,
        base_model_relation=("merge" if merged else "finetune") if base else None,
        library_name=kind.library,
        license=licence or "other",
        pipeline_tag=kind.task,
        tags=[*kind.tags, "modelstock", *(["merge"] if merged else [])],
    )
    return str(data.to_yaml())


def _facts(weights: WeightSet, method: str) -> list[str]:
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


def _accuracies(figures: Sequence[Figure], kind: Kind) -> list[str]:
    """The card's table of accuracies; nothing where there are none."""
    if not figures:
        return []
    rows = [
        f"| {_cell(f.benchmark)} | {f.role} | {100 * f.value:.1f} | {100 * f.low:.1f} to {100 * f.high:.1f} |"
        for f in figures
    ]
    intervals = f"Top-1 in percent, with 95 % intervals over the test {kind.inputs}."
    return ["", "## Accuracy", intervals, "", "| set | role | top-1 | interval |", "|---|---|---:|---:|", *rows]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
