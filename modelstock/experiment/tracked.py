"""A comparison as trackers are sent it: a row per weight set and ensemble, and which of them somebody may ship."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock.comparison.advice import advice
from modelstock.comparison.compare import Comparison
from modelstock.comparison.report import BALANCED, benchmarks_of, headline, mean_metric
from modelstock.errors import redacted
from modelstock.experiment.paths import history_file
from modelstock.merging.methods.table import METHODS
from modelstock.scoring.results import Row, Scores
from modelstock.tracking.times import times_of
from modelstock.tracking.tracker import TrackedComparison, TrackedRow, TrackedTraining, params_of
from modelstock.weights.checkpoints import open_safetensors

KINDS = {"seed": "fine-tuned seed", "anchor": "anchor", "ensemble": "logit ensemble"}


def tracked(
    comparison: Comparison,
    results: Sequence[Scores],
    files: Mapping[str, Path],
    *,
    report: Path,
    params: Mapping[str, Any],
    model_name: str,
    dvc_hashes: Mapping[str, str],
) -> TrackedComparison:
    """`files`: identity -> a weight set's file. `report`: the folder of the report. `params`: of the experiment.

    `dvc_hashes`: output -> hash.
    """
    shown = {name for line in comparison.lines for name in line.rows}
    aliases = _aliases(comparison)
    trainings: dict[str, TrackedTraining] = {}
    rows = []
    for row in comparison.rows:
        weights = None if row.kind == "ensemble" else files[row.identity]
        key = None
        if weights is not None:
            made_by = open_safetensors(weights, keep_open=False).meta.get("made_by", {})
            key, history = made_by.get("key"), history_file(weights)
            # A merge may have a seed's tensors, as a greedy soup of one; the training is called by the seed's name.
            if key and history.exists() and (key not in trainings or row.kind not in METHODS):
                trainings[key] = TrackedTraining(
                    key=key, name=row.name, params=params_of(made_by), history=history, times=times_of(key)
                )
        rows.append(
            TrackedRow(
                name=row.name,
                identity=row.identity,
                metrics=comparison.metrics[row.name],
                summary=_summary(comparison, row),
                params=_params(comparison, row, trained=key is not None),
                description=_description(comparison, row, trained=key is not None),
                weights=weights,
                dvc_md5=None if weights is None else _hash(weights, dvc_hashes),
                training=key if key in trainings else None,
                shown=row.name in shown,
                aliases=aliases.get(row.name, ()),
            )
        )
    return TrackedComparison(
        rows=rows,
        trainings=list(trainings.values()),
        datasets={scores.benchmark: scores.data for scores in results},
        held_out=comparison.held_out,
        params={**flat(params), **{f"dvc.{path}": md5 for path, md5 in dvc_hashes.items()}},
        files=sorted(file for file in report.iterdir() if file.is_file()),
        note=f"{advice(comparison)}\n\n{headline(comparison)}",
        model_name=model_name,
        precision=comparison.precision,
        held_out_shifts=comparison.held_out_shifts,
    )


def flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names, without passwords: a tracker may be seen by more people than the settings."""
    result: dict[str, Any] = {}
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{name}.")
        elif name == "password" and value is not None:
            result[f"{prefix}{name}"] = "***"
        else:
            result[f"{prefix}{name}"] = redacted(value)
    return result


def _aliases(comparison: Comparison) -> dict[str, list[str]]:
    """Row -> aliases: `champion`, by the rule, and the name of its method for the best of each on the held-out split.

    Ties go to the row of fewer seeds, then to the first by name, as for the champion. Ensembles cannot be shipped.
    """
    held_out = comparison.held_out
    best: dict[str, tuple[float, int, str]] = {}
    for row in comparison.rows:
        rank = (-comparison.accuracy[row.name][held_out].value, len(row.members), row.name)
        if row.kind not in ("ensemble", "anchor") and rank < best.get(row.kind, (1.0, 0, "")):
            best[row.kind] = rank
    aliases = {name: [kind] for kind, (_, _, name) in best.items()}
    aliases.setdefault(comparison.champion, []).insert(0, "champion")
    return aliases


def _summary(comparison: Comparison, row: Row) -> dict[str, float]:
    """Accuracies with the ends of their intervals, and the balanced accuracies."""
    last_first = reversed(comparison.summaries)  # the shifts decide a table's order, where there are any
    estimates = {name.replace("-", "_"): comparison.summary[row.name][name] for name in last_first}
    estimates["held_out"] = comparison.accuracy[row.name][comparison.held_out]
    balanced = {s.replace("-", "_"): benchmarks_of(comparison, s) for s in comparison.summaries}
    balanced["held_out"] = [comparison.held_out]
    return {
        f"{name}{end}": value
        for name, estimate in estimates.items()
        for end, value in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high))
    } | {
        f"{name}_balanced": mean_metric(comparison, [row.name], BALANCED, benchmarks)
        for name, benchmarks in balanced.items()
    }


def _params(comparison: Comparison, row: Row, *, trained: bool) -> dict[str, str]:
    """What tells rows apart, the same few for each, so that MLflow's plots of params have no gaps."""
    members = "-".join(map(str, row.members))
    return {
        "method": row.kind,
        "seeds": str(len(row.members)),
        "members": members,
        "options": _options(row, trained) or "none",
        "cost": f"{comparison.cost[row.name]:g}",
    }


def _options(row: Row, trained: bool) -> str:
    """A merge's options; a training's are in its own run."""
    shown = {} if trained and row.kind not in METHODS else row.options
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _description(comparison: Comparison, row: Row, *, trained: bool) -> str:
    members = f" of {'seeds' if len(row.members) > 1 else 'seed'} {', '.join(map(str, row.members))}"
    what = f"{KINDS.get(row.kind, row.kind)}{members if row.members else ''}"
    percent = {name: f"{100 * estimate.value:.1f} %" for name, estimate in comparison.summary[row.name].items()}
    held_out = f"{100 * comparison.accuracy[row.name][comparison.held_out].value:.1f} %"
    figures = [f"{held_out} on the held-out split", f"{percent['in-distribution']} in distribution"]
    figures += [f"{percent['shifts']} on the shifts"] if "shifts" in percent else []
    options = _options(row, trained)
    return f"{what}{f' ({options})' if options else ''}: top-1 accuracy {', '.join(figures)}."


def _hash(weights: Path, hashes: Mapping[str, str]) -> str | None:
    """DVC's hash of the output that a file is, or lies in."""
    return next((hashes[path] for path in (str(weights), str(weights.parent)) if path in hashes), None)
