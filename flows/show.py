"""The comparison as artifacts in Prefect: a table with what decides first, the figure, and where to see more."""

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import create_image_artifact, create_markdown_artifact

from modelstock.errors import redacted


def _with_half(estimate: Mapping[str, float]) -> str:
    """A share in percent, with half its interval."""
    return f"{100 * estimate['value']:.1f} ± {50 * (estimate['high'] - estimate['low']):.1f}"


def table(comparison: Mapping[str, Any]) -> str:
    """Method, number of seeds, mean of the shifts, in distribution, held-out split, and each shift, in percent."""
    inside, held_out = comparison["in_distribution"], comparison["held_out"]
    means = [summary for summary in comparison["summaries"] if summary != "in-distribution"]
    shifts = comparison["shifts"]
    heads = ["weights", "seeds", *(f"mean of {summary}" for summary in means), inside, held_out, *shifts]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for line in comparison["lines"]:
        decisive = [*(line["summary"][summary] for summary in means), line["accuracy"][inside]]
        others = [line["accuracy"].get(name) for name in (held_out, *shifts)]  # the held-out split's is of single sets
        cells = [*map(_with_half, decisive), *(f"{100 * other['value']:.1f}" if other else "" for other in others)]
        rows.append([line["name"], str(line["size"] or ""), *cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def link(env: Mapping[str, str]) -> str:
    """Where MLflow shows every weight set; a hint where no server is known."""
    url = env.get("MODELSTOCK_MLFLOW_URL") or env.get("MLFLOW_TRACKING_URI", "")
    if url.startswith("http"):
        return f"Every weight set: [MLflow]({redacted(url)})"
    return "Every weight set: in MLflow, which `make up` starts."


def show(report: Path) -> None:
    """Publish the comparison of `reports/comparison.json`, and the figure beside it."""
    comparison = json.loads(report.read_bytes())
    parts = [
        comparison["advice"],
        "Top-1 accuracy in percent, with half a 95 % interval.",
        table(comparison),
        link(os.environ),
        f"The whole report: `{report.with_suffix('.html')}`",
    ]
    create_markdown_artifact("\n\n".join(parts), key="comparison", description="Which merge to ship")
    figure = report.with_name("figure.png")
    if figure.exists():
        address = f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}"
        create_image_artifact(address, key="comparison-figure", description="The comparison as a figure")
