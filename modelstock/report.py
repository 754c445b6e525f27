"""The comparison as Markdown, HTML, a figure and tables for DVC; equal input gives equal bytes."""

import base64
import csv
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import markdown
import matplotlib
from matplotlib.figure import Figure

from modelstock.comparison import Comparison, Estimate, Line, Test
from modelstock.files import atomic_path, write_json
from modelstock.scores import Row

matplotlib.use("Agg")

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1b1b1b;background:#fff}
table{border-collapse:collapse;font-size:.85rem;display:block;overflow-x:auto;margin:1rem 0}
th,td{padding:.3rem .6rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}img{max-width:100%;background:#fff}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#16181d}th,td{border-color:#444}}
"""
MARKS = {
    "anchor": ("*", "black"), "seed": ("o", "tab:gray"), "uniform": ("s", "tab:blue"),
    "model_stock": ("D", "tab:red"), "greedy": ("^", "tab:green"), "wise_ft": ("", "tab:orange"),
    "ensemble": ("P", "tab:purple"), "lines": ("<", "tab:cyan"), "karcher": (">", "tab:cyan"),
    "ties": ("v", "tab:brown"), "dare_linear": ("<", "tab:brown"), "dare_ties": (">", "tab:brown"),
    "breadcrumbs": ("d", "tab:brown"), "della": ("h", "tab:brown"), "fisher": ("p", "tab:olive"),
    "regmean": ("H", "tab:olive"), "oracle_scale": ("x", "black"), "oracle_scales": ("X", "black"),
    "periodic": ("D", "tab:pink"), "longer": ("^", "tab:pink"), "ema": (".", "tab:green"), "lawa": (".", "tab:cyan"),
    "snapshot": (".", "silver"),
}  # fmt: skip


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _with_half(estimate: Estimate) -> str:
    return f"{_percent(estimate.value)} ± {_percent((estimate.high - estimate.low) / 2)}"


def _signed(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def _p(test: Test | None) -> str:
    if test is None:
        return ""
    return "< 0.001" if test.holm < 0.001 else f"{test.holm:.3f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join(rows + ["| " + " | ".join(cells) + " |" for cells in body])


def main_table(comparison: Comparison) -> str:
    """Accuracies in percent, one line a method and number of seeds."""
    head = ["weights", comparison.in_distribution, *comparison.shifts, "mean of shifts"]
    body = [
        [
            line.name,
            _with_half(line.accuracy[comparison.in_distribution]),
            *(_percent(line.accuracy[shift].value) for shift in comparison.shifts),
            _with_half(line.shift_mean),
        ]
        for line in comparison.lines
    ]
    return _table(head, body)


def _differences(comparison: Comparison) -> str:
    head = ["weights", "over mean seed", "shifts, over mean seed", "over uniform soup", "shifts, over uniform soup"]

    def cells(line: Line) -> list[str]:
        pairs = (line.over_seed, line.over_uniform)
        return [_signed(d[s]) if s in d else "" for d in pairs for s in ("in-distribution", "shifts")]

    return _table(head, [[line.name, *cells(line)] for line in comparison.lines if line.over_seed])


def _spreads(comparison: Comparison) -> str:
    head = ["weights", "sets", "standard deviation", "on the shifts"]
    body = [
        [line.name, str(len(line.rows)), _percent(line.spread[0]), _percent(line.spread[1])]
        for line in comparison.lines
        if line.spread
    ]
    return _table(head, body)


def _mcnemar(comparison: Comparison, family: str) -> str:
    head = ["weights", "against", "only this right", "only the other", "p (Holm)"]
    head += ["shifts: only this right", "only the other", "p (Holm)"]
    body = []
    for name, tests in comparison.tests[family].items():
        inside, outside = tests["in-distribution"], tests["shifts"]
        body.append([name, inside.against, str(inside.wins), str(inside.losses), _p(inside),
                     str(outside.wins), str(outside.losses), _p(outside)])  # fmt: skip
    return _table(head, body)


def as_markdown(comparison: Comparison, facts: Mapping[str, Any]) -> str:
    """The report's text."""
    sizes = ", ".join(f"{name} {count:,}" for name, count in comparison.examples.items())
    families = {name: 2 * len(tests) for name, tests in comparison.tests.items()}
    parts = [
        "# Comparison of merges",
        f"Best on the held-out cut: **{comparison.champion}** (registered as `champion`). Top-1 accuracy in percent; "
        "± is half a 95 % interval: Wilson's for a single weight set, paired bootstrap "
        f"({comparison.draws:,} draws over examples) for means. "
        "A mean over weight sets is over the sets evaluated; its interval is that of the examples "
        f"alone. Images: {sizes}.",
        main_table(comparison),
        "![in-distribution accuracy against mean shift accuracy](figure.png)",
        "## Differences, in points",
        "Paired over examples, 95 % bootstrap interval. `wise_ft` takes the alpha that is best on the held-out cut.",
        _differences(comparison),
        "## Spread over seeds and subsets of seeds",
        _spreads(comparison),
        "## McNemar's exact test against the uniform soup of the same seeds",
        "Examples that only one of the two gets right, those of all shifts pooled. "
        f"{families['uniform']} tests, Holm's correction over them.",
        _mcnemar(comparison, "uniform"),
        f"## McNemar's exact test against {comparison.median_seed}",
        "The test needs one model, and the median seed on the held-out cut stands for a single seed. "
        f"{families['seed']} tests, Holm's correction over them.",
        _mcnemar(comparison, "seed"),
    ]
    if "cosines" in facts:
        text = ", ".join(f"{name} {value:.2f}" for name, value in facts["cosines"].items())
        parts += ["## Angles", f"Cosine between the updates of two seeds, over tensors and pairs: {text}."]
    return "\n\n".join(parts) + "\n"


def figure(comparison: Comparison) -> bytes:
    """In-distribution accuracy against mean shift accuracy, as PNG bytes."""
    drawing = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    axes = drawing.subplots()

    def place(row: Row) -> tuple[float, float]:
        inside = comparison.accuracy[row.name][comparison.in_distribution].value
        return 100 * inside, 100 * comparison.shift_mean[row.name].value

    most = max(len(row.members) for row in comparison.rows)
    curves: dict[tuple[int, ...], list[Row]] = {}
    for row in comparison.rows:
        if row.kind == "wise_ft" and len(row.members) == most:
            curves.setdefault(row.members, []).append(row)
    for number, rows in enumerate(curves.values()):
        path = [place(r) for r in sorted(rows, key=lambda r: float(r.knobs["alpha"]))]
        label = f"WiSE-FT of the soup of {most}, alpha from 0.1 to 0.9" if number == 0 else None
        axes.plot(*zip(*path, strict=True), ".-", color=MARKS["wise_ft"][1], label=label, zorder=1)
    named: set[tuple[str, bool]] = set()
    for row in comparison.rows:
        mark, colour = MARKS.get(row.kind, ("v", "tab:brown"))
        if not mark:
            continue
        point = row.kind in ("seed", "ema", "lawa", "snapshot")
        whole = point or row.kind in ("anchor", "greedy", "periodic", "longer")
        small = not whole and len(row.members) < most
        if small and row.kind not in ("uniform", "model_stock", "ensemble"):
            continue  # the table has them
        key = (row.kind, small)
        what = f"{row.kind} of fewer" if small else row.kind
        x, y = place(row)
        inside = comparison.accuracy[row.name][comparison.in_distribution]
        outside = comparison.shift_mean[row.name]
        if not small and not point:
            axes.errorbar(
                x, y, fmt="none", ecolor=colour, alpha=0.4,
                xerr=[[x - 100 * inside.low], [100 * inside.high - x]],
                yerr=[[y - 100 * outside.low], [100 * outside.high - y]],
            )  # fmt: skip
        axes.scatter(
            x, y, marker=mark, color=colour, s=25 if small or point else 110,
            alpha=0.55 if small else 1, label=None if key in named else what, zorder=2,
        )  # fmt: skip
        named.add(key)
    axes.set_xlabel(f"{comparison.in_distribution}: top-1 accuracy, %")
    axes.set_ylabel(f"mean of {len(comparison.shifts)} shifts: top-1 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def as_html(text: str, picture: bytes) -> str:
    """One page that needs no other file and no network."""
    embedded = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    body = markdown.markdown(text, extensions=["tables"]).replace("figure.png", embedded)
    title = html.escape("modelstock: comparison of merges")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>{body}</body></html>\n"
    )


def as_metrics(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Line -> benchmark -> top-1 in percent, as `dvc metrics show` prints it."""
    return {
        line.name: {name: round(100 * e.value, 4) for name, e in line.accuracy.items()}
        | {"shift-mean": round(100 * line.shift_mean.value, 4)}
        for line in comparison.lines
    }


def as_csv(comparison: Comparison) -> str:
    """One line a weight set: kind, members and accuracies in percent."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["name", "kind", "members", *comparison.benchmarks, "shift-mean"])
    for row in comparison.rows:
        accuracies = [round(100 * comparison.accuracy[row.name][b].value, 4) for b in comparison.benchmarks]
        mean = round(100 * comparison.shift_mean[row.name].value, 4)
        table.writerow([row.name, row.kind, "-".join(map(str, row.members)), *accuracies, mean])
    return text.getvalue()


def write_report(comparison: Comparison, folder: Path, *, facts: Mapping[str, Any]) -> None:
    """Write comparison.md, .html, .json, figure.png, metrics.json and accuracy.csv to `folder`.

    `facts`: `cosines`, a mapping of quantiles, where known.
    """
    text, picture = as_markdown(comparison, facts), figure(comparison)
    for name, content in {
        "comparison.md": text.encode(),
        "comparison.html": as_html(text, picture).encode(),
        "figure.png": picture,
        "accuracy.csv": as_csv(comparison).encode(),
    }.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    write_json(folder / "metrics.json", as_metrics(comparison))
    write_json(folder / "comparison.json", {**dataclasses.asdict(comparison), "facts": dict(facts)})


def summary_lines(comparison: Comparison) -> str:
    """The table for a terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="top-1 accuracy in %, with half a 95 % interval", title_justify="left")
    table.add_column("weights", no_wrap=True)
    for head in (comparison.in_distribution, "mean of shifts", "over mean seed", "shifts, over mean seed"):
        table.add_column(head, justify="right", no_wrap=True)
    for line in comparison.lines:
        differences = [_signed(line.over_seed[s]) if line.over_seed else "" for s in ("in-distribution", "shifts")]
        inside = _with_half(line.accuracy[comparison.in_distribution])
        table.add_row(line.name, inside, _with_half(line.shift_mean), *differences)
    console = Console(width=130, file=io.StringIO(), force_terminal=False)
    console.print(table)
    shown = console.file
    assert isinstance(shown, io.StringIO)
    return shown.getvalue()
