"""The comparison as Markdown, HTML, a figure and tables for DVC; equal input gives equal bytes."""

import base64
import csv
import dataclasses
import html
import io
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown
import numpy as np

from modelstock.comparison.advice import (
    advice,
    candidates_table,
    chosen_merges,
    front_table,
    line_cost,
    rule_in_words,
)
from modelstock.comparison.compare import Comparison, Line
from modelstock.comparison.differences import Difference
from modelstock.comparison.figures import figures, training_figure
from modelstock.comparison.intervals import Estimate
from modelstock.comparison.metrics import METRICS, Metric
from modelstock.comparison.published import Ours, matching, side_by_side
from modelstock.comparison.text import percent, signed, table, with_half, worded
from modelstock.errors import few
from modelstock.files import atomic_path, sealed, write_json

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto;margin:1rem 0}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}img{max-width:100%;background:#fff}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#16181d}th,td{border-color:#444}}
"""
MEANS = {"shifts": "mean of shifts"}  # a column of tables that have the in-distribution set's own
FIELDS = {"shifts": "shift-mean"}  # the same, in files
BEFORE = {"in-distribution": "", "shifts": "shifts, "}  # a summary, before the name of a column
CLASS_LINES = 50_000  # of per_class.csv; beyond them it has one weight set for each line of the main table
BALANCED = "balanced_accuracy"
SEEN = 0.0005  # a share; below it balanced accuracy is accuracy to the digits shown
CHANGED = 5  # classes shown that gain most, and that lose most


def _in_percent(estimate: Estimate) -> str:
    """A probability with its interval, in whole percent; none is certain."""
    value, low, high = (min(99, max(1, round(100 * part))) for part in (estimate.value, estimate.low, estimate.high))
    ends = f"[{low if estimate.low >= 0.01 else 0}, {high if estimate.high <= 0.99 else 100}]"
    return f"{value} % {ends}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def main_table(comparison: Comparison) -> str:
    """Accuracies in percent, one line per method and number of seeds."""
    means = comparison.summaries[1:]
    head = ["weights", comparison.in_distribution, *comparison.shifts, *(MEANS[s] for s in means), "cost"]
    body = [
        [
            line.name,
            with_half(line.accuracy[comparison.in_distribution]),
            *(percent(line.accuracy[shift].value) for shift in comparison.shifts),
            *(with_half(line.summary[s]) for s in means),
            line_cost(comparison, line),
        ]
        for line in comparison.lines
    ]
    return table(head, body)


def _differences(comparison: Comparison, differences: Callable[[Line], Mapping[str, Difference]]) -> str:
    """A row per line and summary that has a difference of this kind."""
    head = ["weights", "on", "difference", "over", "beats it", "detectable", _no_worse(comparison), "p (Holm)"]
    where = {"in-distribution": "in distribution"}
    body = [
        [
            line.name,
            where.get(summary, summary),
            signed(one),
            one.over,
            one.beats if isinstance(one.beats, str) else _in_percent(one.beats),
            percent(one.detectable),
            one.no_worse,
            _p(one.holm),
        ]
        for line in comparison.lines
        for summary, one in differences(line).items()
    ]
    return table(head, body)


def _no_worse(comparison: Comparison) -> str:
    return f"no worse than {100 * comparison.margin:g} points"


def _spreads(comparison: Comparison) -> str:
    heads = {"in-distribution": "standard deviation", "shifts": "on the shifts"}
    head = ["weights", "sets", *(heads[s] for s in comparison.summaries)]
    body = [
        [line.name, str(len(line.rows)), *(percent(line.spread[s]) for s in comparison.summaries)]
        for line in comparison.lines
        if line.spread
    ]
    return table(head, body)


def _mcnemar(comparison: Comparison, family: str) -> str:
    before = {"in-distribution": "", "shifts": "shifts: "}
    head = ["weights", "against"]
    for s in comparison.summaries:
        head += [f"{before[s]}only this right", "only the other", "p (Holm)"]
    body = []
    for name, tests in comparison.tests[family].items():
        in_order = [tests[summary] for summary in comparison.summaries]
        counts = [cell for test in in_order for cell in (str(test.wins), str(test.losses), _p(test.holm))]
        body.append([name, in_order[0].against, *counts])
    return table(head, body)


def _label_shares(comparison: Comparison) -> str:
    """The least and the largest share of a label that occurs, by test set, in percent."""
    parts: dict[str, list[str]] = {}
    for benchmark in (comparison.in_distribution, *comparison.shifts):
        images = [count for count in comparison.classes[benchmark].images if count]
        low, high = (percent(end / comparison.examples[benchmark]) for end in (min(images), max(images)))
        parts.setdefault(low if low == high else f"{low} to {high}", []).append(benchmark)
    return "; ".join(f"{shares} % ({_literal(few(names, 6))})" for shares, names in parts.items())


def balanced_differs(comparison: Comparison) -> bool:
    """Whether balanced accuracy is other than accuracy by SEEN or more anywhere: not where labels have equal shares."""
    values = [values for by_benchmark in comparison.metrics.values() for values in by_benchmark.values()]
    return any(abs(one[BALANCED] - one["top1"]) >= SEEN for one in values)


def _balanced(comparison: Comparison) -> list[str]:
    """The section on balanced accuracy: the main table's lines and columns, and the differences; or one sentence."""
    about = "Balanced accuracy gives each label the same weight: it is the mean of the labels' recalls."
    shares = f"Shares of the labels that occur: {_label_shares(comparison)}."
    if not balanced_differs(comparison):
        same = f"Here it equals accuracy, to within {100 * SEEN:g} points for every weight set on every benchmark."
        return ["## Balanced accuracy", f"{about} {same} {shares}"]
    sets = {one: [one] for one in (comparison.in_distribution, *comparison.shifts)}
    sets |= {MEANS[s]: benchmarks_of(comparison, s) for s in comparison.summaries[1:]}
    body = [
        [line.name, *(percent(mean_metric(comparison, line.rows, BALANCED, names)) for names in sets.values())]
        for line in comparison.lines
    ]
    return [
        "## Balanced accuracy",
        f"{about} {shares} In percent, the lines of the first table; nothing is chosen by it.",
        table(["weights", *sets], body),
        "Differences in balanced accuracy, in points, over what those in accuracy are over. p as there.",
        "### Balanced accuracy over the mean single seed",
        _differences(comparison, lambda line: line.balanced_over_seed),
        "### Balanced accuracy over the uniform soup of the same seeds",
        _differences(comparison, lambda line: line.balanced_over_uniform),
    ]


def mean_metric(comparison: Comparison, rows: Sequence[str], metric: str, benchmarks: Sequence[str]) -> float:
    """A metric's mean over weight sets and benchmarks."""
    values = [comparison.metrics[row][benchmark][metric] for row in rows for benchmark in benchmarks]
    return sum(values) / len(values)


def benchmarks_of(comparison: Comparison, summary: str) -> list[str]:
    """The benchmarks whose mean a summary is."""
    return list(comparison.shifts) if summary == "shifts" else [comparison.in_distribution]


def _shown_metrics(comparison: Comparison) -> list[Metric]:
    """All but accuracy and balanced accuracy, which have tables of their own, where labels are enough for them."""
    most = max(len(classes.labels) for classes in comparison.classes.values())
    return [metric for name, metric in METRICS.items() if name not in ("top1", BALANCED) and most > metric.labels]


def _quality(comparison: Comparison) -> str:
    columns = [(metric, summary) for summary in comparison.summaries for metric in _shown_metrics(comparison)]
    body = [
        [
            line.name,
            *(m.text(mean_metric(comparison, line.rows, m.name, benchmarks_of(comparison, s))) for m, s in columns),
        ]
        for line in comparison.lines
    ]
    return table(["weights", *(f"{BEFORE[summary]}{metric.title}" for metric, summary in columns)], body)


def _literal(name: str) -> str:
    """A name from data as the text of a cell, whatever is in it."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(name.split()), quote=False))


def _class_changes(comparison: Comparison) -> str:
    """The classes that the champion gains and loses most on against the mean single seed, in distribution."""
    classes = comparison.classes[comparison.in_distribution]
    seeds = [row.name for row in comparison.rows if row.kind == "seed"]
    changes = []
    for place, (label, images, best) in enumerate(
        zip(classes.labels, classes.images, classes.accuracy[comparison.champion], strict=True)
    ):
        single = [share for seed in seeds if (share := classes.accuracy[seed][place]) is not None]
        if best is not None:
            mean = sum(single) / len(single)
            changes.append((round(best - mean, 9), label, images, mean, best))  # no change is none, not 1e-17
    changes.sort(key=lambda change: -change[0])  # stable: ties keep the order of the labels
    shown = [change for change in changes[:CHANGED] if change[0] > 0]
    shown += [change for change in changes[-CHANGED:] if change[0] < 0]
    body = [
        [_literal(label), f"{images:,}", percent(mean), percent(best), f"{100 * change:+.1f}"]
        for change, label, images, mean, best in shown
    ]
    return table(["class", "images", "mean single seed", "champion", "change"], body)


def _class_rows(comparison: Comparison) -> list[str]:
    """The rows of per_class.csv: all, or the first of each line where all would be too many."""
    labels = sum(len(classes.labels) for classes in comparison.classes.values())
    if labels * len(comparison.rows) <= CLASS_LINES:
        return [row.name for row in comparison.rows]
    return list(dict.fromkeys(line.rows[0] for line in comparison.lines))


def _published(figures: Sequence[Mapping[str, Any]]) -> str:
    head = ["weights", "backbone", "figure", "published", "here", "gap", "published within the interval", "source"]
    body = [
        [
            f["row"],
            f["backbone"],
            f["figure"],
            f"{f['published']:.1f}",
            f"{f['ours']:.1f} [{f['low']:.1f}, {f['high']:.1f}]",
            f"{f['gap']:+.1f}",
            "yes" if f["within"] else "no",
            f["source"],
        ]
        for f in figures
    ]
    return table(head, body)


def published_figures(comparison: Comparison, backbone: Mapping[str, str] | None) -> list[dict[str, Any]]:
    """Published figures of the anchor's backbone {name, pretrained}, with ours; see modelstock.comparison.published."""

    def percent(estimate: Estimate) -> tuple[float, float, float]:
        return 100 * estimate.value, 100 * estimate.low, 100 * estimate.high

    lines = [
        Ours(
            key=line.key,
            size=line.size,
            name=line.name,
            figures={name: percent(estimate) for name, estimate in line.accuracy.items()}
            | {MEANS[summary]: percent(line.summary[summary]) for summary in comparison.summaries[1:]},
        )
        for line in comparison.lines
    ]
    rows = matching(backbone, [comparison.in_distribution, *comparison.shifts])
    return [dataclasses.asdict(figure) for figure in side_by_side(rows, lines)]


def headline(comparison: Comparison) -> str:
    """The six lines that say most: anchor, mean and best seed, the highlighted merges of fewest seeds, the champion."""
    wanted = [line for line in comparison.lines if line.key in ("anchor", "mean-seed", "best-seed")]
    wanted += chosen_merges(comparison)
    rows = [(line.name, line.summary) for line in comparison.lines if line in wanted]
    champion = comparison.summary[comparison.champion]
    rows.append((f"**{comparison.champion}**, champion by the held-out split", champion))
    body = [[name, *(with_half(summary[s]) for s in comparison.summaries)] for name, summary in rows]
    means = (MEANS[summary] for summary in comparison.summaries[1:])
    return table(["top-1 accuracy, %", comparison.in_distribution, *means], body)


def _notices(comparison: Comparison) -> str:
    """What is unusual, each once, with what it is about."""
    subjects: dict[str, list[str]] = {}
    for line in comparison.notices:
        subject, _, text = line.partition(": ")
        subjects.setdefault(text, []).append(subject)
    return "\n".join(f"- {_literal(text)} ({_literal(few(names, 6))})" for text, names in subjects.items())


def as_markdown(comparison: Comparison, facts: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    """The report's text; `pictures`: file -> title."""
    sizes = ", ".join(f"{name} {count:,}" for name, count in comparison.examples.items())
    families = {name: sum(map(len, tests.values())) for name, tests in comparison.tests.items()}
    pooled = ", those of all shifts pooled" if comparison.shifts else ""
    shown = _shown_metrics(comparison)
    complete = len(_class_rows(comparison)) == len(comparison.rows)
    listed = "every weight set" if complete else "the first weight set of each line of the main table"
    parts = [
        "# Comparison of merges",
        advice(comparison),
        f"The champion is **{comparison.champion}** (registered as `champion`). Top-1 accuracy in percent; "
        f"± is half a 95 % interval over seeds and {comparison.resample}: what an experiment with other seeds "
        f"and {comparison.resample} of the same kind would give. † marks those over {comparison.resample} alone, of "
        "one weight set or of too few seeds. Cost: training in units of one seed; an ensemble also takes several "
        f"passes per answer. Images: {sizes}. Towers computed in {comparison.precision}.",
        main_table(comparison),
        *(f"![{title}]({name})" for name, title in pictures.items()),
        "## Which one to ship",
        rule_in_words(comparison.choice),
        candidates_table(comparison),
        "## Differences, in points",
        f"Both sides are of the same {comparison.resample}, and of the same seeds where the interval is over them. "
        "Of a method with several scales or alphas: the best on the held-out split. *Beats it*: the probability that a "
        "new weight set of the method is better than one of the other made of the same new seeds, on these images, "
        "with its 95 % interval. *Detectable*: the difference that an experiment of this size finds with 80 % power "
        f"at 5 %. *{_no_worse(comparison).capitalize()}*: by where the interval ends. p: Student's t of no "
        "difference, with Holm's correction over the table.",
        "### Over the mean single seed",
        _differences(comparison, lambda line: line.over_seed),
        "### Over the uniform soup of the same seeds",
        _differences(comparison, lambda line: line.over_uniform),
        *_balanced(comparison),
        "## Spread over seeds and subsets of seeds",
        _spreads(comparison),
        "## McNemar's exact test against the uniform soup of the same seeds",
        f"Examples that only one of the two gets right{pooled}: whether these two weight sets differ, not whether the "
        "methods do for other seeds. "
        f"{families['uniform']} tests, Holm's correction over them.",
        _mcnemar(comparison, "uniform"),
        f"## McNemar's exact test against {comparison.median_seed}",
        "The test needs one model, and the median seed on the held-out split represents a single seed. "
        f"{families['seed']} tests, Holm's correction over them.",
        _mcnemar(comparison, "seed"),
        "## Other metrics",
        "Means over the line's weight sets, in distribution"
        f"{' and over the shifts' if comparison.shifts else ''}; no temperature was fitted. "
        + "; ".join(f"{metric.title}: {metric.about}, in {metric.unit}" for metric in shown)
        + ".",
        _quality(comparison),
        "## Classes",
        f"Top-1 accuracy of **{comparison.champion}** against the mean single seed on {comparison.in_distribution}, in "
        f"percent and points: the {CHANGED} classes that gain most and the {CHANGED} that lose most of "
        f"{len(comparison.classes[comparison.in_distribution].labels):,}. They are extremes of small samples, so "
        f"chance makes them larger. `per_class.csv` has every class for {listed}.",
        _class_changes(comparison),
    ]
    if comparison.front:
        place = "on" if comparison.champion in comparison.front else "not on"
        parts += [
            "## Pareto front",
            "Weight sets that no other equals or beats both in distribution and on the shifts. For reporting only: "
            "they are picked on the test sets, so they look better here than on other images. The champion is "
            f"{place} the front.",
            front_table(comparison),
        ]
    parts += [
        "## Notices",
        "Everything unusual that this comparison rests on, with the weight sets and benchmarks that it is about."
        if comparison.notices
        else "Nothing unusual was found in data and weight sets.",
        *([_notices(comparison)] if comparison.notices else []),
    ]
    if facts.get("published"):
        parts += [
            "## Published figures",
            "Top-1 accuracy in percent, with the 95 % interval here; the gap in points is here minus published.",
            _published(facts["published"]),
        ]
    if "cosines" in facts:
        text = ", ".join(f"{name} {value:.2f}" for name, value in facts["cosines"].items())
        parts += ["## Angles", f"Cosine between the updates of two seeds, over tensors and pairs: {text}."]
    return worded("\n\n".join(parts) + "\n", comparison.modality)


def as_html(text: str, pictures: Mapping[str, bytes]) -> str:
    """One page that needs no other file and no network; `pictures`: file -> PNG."""
    body = markdown.markdown(text, extensions=["tables"])
    for name, picture in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(picture).decode()}"')
    title = html.escape("modelstock: comparison of merges")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


def as_metrics(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Line -> benchmark -> top-1 in percent."""
    return {
        line.name: {name: round(100 * e.value, 4) for name, e in line.accuracy.items()}
        | {FIELDS[s]: round(100 * line.summary[s].value, 4) for s in comparison.summaries[1:]}
        for line in comparison.lines
    }


def as_summary(comparison: Comparison) -> dict[str, dict[str, float]]:
    """The rows of `dvc metrics show`: accuracy in percent, balanced accuracy too, and the seeds in each weight set.

    The champion, the mean single seed, and of each highlighted method the mean over its weight sets of fewest seeds.
    """
    champion = next(row for row in comparison.rows if row.name == comparison.champion)
    rows = {"champion": (len(champion.members), [champion.name], comparison.summary[champion.name])}
    for line in [*(line for line in comparison.lines if line.key == "mean-seed"), *chosen_merges(comparison)]:
        rows[line.key] = (line.size, list(line.rows), line.summary)

    def percent(names: Sequence[str], summary: Mapping[str, Estimate]) -> dict[str, float]:
        held_out = float(np.mean([comparison.accuracy[name][comparison.held_out].value for name in names]))
        values = {"held-out": held_out} | {name: estimate.value for name, estimate in summary.items()}
        for name, key in (("in-distribution", "balanced"), ("shifts", "balanced-shifts")):
            if name in summary:
                values[key] = mean_metric(comparison, names, BALANCED, benchmarks_of(comparison, name))
        return {name: round(100 * value, 2) for name, value in values.items()}

    return {key: {"seeds": size, **percent(names, summary)} for key, (size, names, summary) in rows.items()}


def write_summary(comparison: Comparison, folder: Path) -> list[str]:
    """Write a file per row of `as_summary`, since DVC shows a line per file, to `folder`; the files' names."""
    summary = as_summary(comparison)
    for name, values in summary.items():
        write_json(folder / f"{name}.json", values)
    return [f"{name}.json" for name in summary]


def as_quality(comparison: Comparison) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """ "lines" (means over a line's rows) or "rows" -> name -> benchmark -> metric."""
    keys = list(METRICS)
    return {
        "lines": {
            line.name: {
                b: {k: round(mean_metric(comparison, line.rows, k, [b]), 6) for k in keys}
                for b in comparison.benchmarks
            }
            for line in comparison.lines
        },
        "rows": {
            row: {b: {k: round(values[k], 6) for k in keys} for b, values in per_benchmark.items()}
            for row, per_benchmark in comparison.metrics.items()
        },
    }


def _csv(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(head)
    table.writerows(body)
    return text.getvalue()


def as_csv(comparison: Comparison) -> str:
    """One line per weight set: kind, members, training in units of one seed, and accuracies in percent."""
    means = comparison.summaries[1:]
    body = []
    for row in comparison.rows:
        estimates = [comparison.accuracy[row.name][b] for b in comparison.benchmarks]
        estimates += [comparison.summary[row.name][s] for s in means]
        body.append(
            [
                row.name,
                row.kind,
                "-".join(map(str, row.members)),
                f"{comparison.cost[row.name]:g}",
                *(round(100 * e.value, 4) for e in estimates),
            ]
        )
    return _csv(["name", "kind", "members", "cost", *comparison.benchmarks, *(FIELDS[s] for s in means)], body)


def as_class_csv(comparison: Comparison) -> str:
    """One line per weight set, benchmark and label: its images and accuracy in percent, empty where it has no image."""
    body = (
        [row, benchmark, label, images, "" if share is None else round(100 * share, 4)]
        for row in _class_rows(comparison)
        for benchmark, classes in comparison.classes.items()
        for label, images, share in zip(classes.labels, classes.images, classes.accuracy[row], strict=True)
    )
    return _csv(["row", "benchmark", "label", "images", "accuracy"], body)


def validation_curve(history: Sequence[Mapping[str, float]]) -> dict[float, float]:
    """Step -> top-1 on the held-out split; empty of a seed without a history, such as an adopted checkpoint."""
    return {moment["step"]: moment["validation/top1"] for moment in history if "validation/top1" in moment}


def as_validation_csv(curves: Iterable[Mapping[float, float]]) -> str:
    """By step, the seeds' mean, lowest and highest top-1 on the held-out split while they trained, in percent."""
    steps: dict[float, list[float]] = {}
    for curve in curves:
        for step, accuracy in curve.items():
            steps.setdefault(step, []).append(100 * accuracy)
    body = [[step, max(held), min(held), float(np.mean(held))] for step, held in sorted(steps.items())]
    return _csv(["step", "high", "low", "mean"], body)


def write_report(
    comparison: Comparison,
    folder: Path,
    *,
    facts: Mapping[str, Any],
    histories: Iterable[Sequence[Mapping[str, float]]] = (),
    section: str = "",
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Write comparison.md, .html, .json, the pictures and the tables for DVC and for programs to `folder`.

    `facts`: where known, `cosines`, a mapping of quantiles, and `published`, a list of mappings with row, backbone,
    figure, published, ours, low, high (percent), gap (points), within, source. `histories`: the seeds' training.
    `section`: Markdown after all else, such as that of the geometry; `more`: files beside the report, by name, whose
    pictures the section may show.
    """
    curves = [validation_curve(history) for history in histories]
    drawn = figures(comparison) | training_figure(curves)
    pictures = {name: picture for name, (_, picture) in drawn.items()}
    text = as_markdown(comparison, facts, {name: title for name, (title, _) in drawn.items()})
    text += f"\n{section}" * bool(section)
    pictures |= {name: content for name, content in (more or {}).items() if name.endswith(".png")}
    for name, content in {
        **(more or {}),
        "comparison.md": text.encode(),
        "comparison.html": as_html(text, pictures).encode(),
        **pictures,
        "accuracy.csv": as_csv(comparison).encode(),
        "per_class.csv": as_class_csv(comparison).encode(),
        "held_out.csv": as_validation_csv(curves).encode(),
    }.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    write_json(folder / "metrics.json", as_metrics(comparison))
    write_json(folder / "quality.json", as_quality(comparison))
    written = dataclasses.asdict(dataclasses.replace(comparison, metrics={}, classes={}))
    del written["metrics"], written["classes"]  # they have files of their own
    write_json(folder / "comparison.json", sealed({**written, "advice": advice(comparison), "facts": dict(facts)}))


def summary_lines(comparison: Comparison) -> str:
    """The table for a terminal, and what it says in words."""
    from rich.console import Console
    from rich.table import Table

    def lines(title: str, cell: Callable[[Line, str], str], over: Callable[[Line], Mapping[str, Difference]]) -> Table:
        table = Table(title=title, title_justify="left")
        table.add_column("weights", no_wrap=True)
        means = [MEANS[s] for s in comparison.summaries[1:]]
        differences = [f"{BEFORE[s]}over mean seed" for s in comparison.summaries]
        for head in (comparison.in_distribution, *means, *differences):
            table.add_column(head, justify="right", no_wrap=True)
        for line in comparison.lines:
            points = [signed(over(line)[s]) if over(line) else "" for s in comparison.summaries]
            table.add_row(line.name, *(cell(line, s) for s in comparison.summaries), *points)
        return table

    def balanced(line: Line, summary: str) -> str:
        return percent(mean_metric(comparison, line.rows, BALANCED, benchmarks_of(comparison, summary)))

    console = Console(width=130, file=io.StringIO(), force_terminal=False)
    accuracy = "top-1 accuracy in %, with half a 95 % interval"
    console.print(lines(accuracy, lambda line, s: with_half(line.summary[s]), lambda line: line.over_seed))
    if balanced_differs(comparison):
        console.print(lines("balanced accuracy in %", balanced, lambda line: line.balanced_over_seed))
    else:
        console.print("Balanced accuracy equals accuracy.")
    shown = console.file
    assert isinstance(shown, io.StringIO)
    words = [textwrap.fill(part.replace("**", ""), 130) for part in advice(comparison).split("\n\n")]
    return shown.getvalue() + "\n" + "\n".join(words)
