"""Makes the generated parts of README and docs.

    python docs/generate.py                         # tables that come from the code
    python docs/generate.py --results results       # also the results page, the headline and the figure, from a run,
                                                    # with the distances to the anchor of reports/comparison.json
    python docs/generate.py --results results --preset methods    # a run of a preset: its page results-methods.md
    python docs/generate.py --geometry geometry     # a run of preset=geometry: geometry.md and its pictures
    python docs/generate.py --geometry geometry --preset reviews    # of another preset: geometry-reviews.md
    python docs/generate.py --check                 # write nothing; fail where a page is not current

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

import argparse
import ast
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ruamel.yaml import YAML

from flows.slurm import Pilot
from modelstock.comparison.metrics import METRICS
from modelstock.merging.methods.table import METHODS
from modelstock.merging.rules import RULES

ROOT = Path(__file__).parent.parent
DEFAULT = "shapes"  # the preset of params.yaml
# How to read a run, by preset.
READINGS = {
    DEFAULT: "The embedded benchmark is a tower of 0.8M parameters on procedural pictures: read the figures as a test "
    "of the pipeline, not of the paper at scale.",
    "emoji": "An EfficientNet-lite0 with ImageNet's weights, fine-tuned for minutes on 1,082 drawings of 64 pixels, "
    "from a linear probe; BatchNorm's running statistics of everything that no training ended with are estimated "
    "again. How to read it: the estimate changes nothing in distribution and costs on the shift, as the line "
    "`recalibrated`, single seeds with nothing else changed, shows beside the mean single seed; so part of what merges "
    "lose there is the estimate's. Model Stock, a ratio per tensor, loses most; why was not studied. No merge here "
    "beats a single seed; the ensemble does. Few seeds, 675 test images.",
    "reviews": "all-MiniLM-L6-v2 (22.7M parameters), fine-tuned on 1,028 snippets of film reviews; reviews of "
    "products, tweets and editorials are natural shifts. What was tried: one recipe, and 14 sets of prompts for the "
    "anchor, of which the preset has the best on the held-out split; `python benchmarks/prompts.py`, after the run, "
    "prints all of them. How to read it: fine-tuning gains much in distribution, and on the shifts it loses in "
    "accuracy and gains in balanced accuracy, for it moves answers from one label to the other; merging changes "
    "little, and a pull toward the anchor gives some of the tweets back. Labels are unbalanced: both accuracies stand "
    "side by side. Where weights lie: [geometry](geometry-reviews.md).",
}
PART = re.compile(r"(<!-- generated: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def packages() -> str:
    """One line per package and top-level module of the library, from its docstring."""
    return _modules("modelstock")


def flows() -> str:
    """One line per module of the flows, from its docstring."""
    return _modules("flows")


def _modules(package: str) -> str:
    rows = []
    for path in sorted((ROOT / package).iterdir()):
        file = path / "__init__.py" if path.is_dir() else path
        if file.suffix == ".py" and file.is_file() and not path.name.startswith("__"):
            docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            name = path.name + "/" * path.is_dir()
            rows.append([f"`{name}`", " ".join(docstring.partition("\n\n")[0].split())])
    return table(["where", "what lives there"], rows)


def methods() -> str:
    """One row per merge method, from the table of methods."""
    rows = []
    for name, method in METHODS.items():
        options = ", ".join(f"`{option}` {json.dumps(default)}" for option, default in method.defaults.items())
        elsewhere = "; ".join(f"{library}: {other}" for library, other in method.elsewhere.items())
        needs = "" if method.needs in ("", "depth") else method.needs
        rows.append([f"`{name}`", method.formula, options, needs, method.source, elsewhere])
    return table(["method", "result", "options and defaults", "needs", "source", "elsewhere"], rows)


def rules() -> str:
    """One row per rule of periodic merging, from the table of rules."""
    rows = []
    for name, rule in RULES.items():
        options = ", ".join(f"`{option.name}` {json.dumps(option.default)}: {option.about}" for option in rule.options)
        rows.append([f"`{name}`", rule.formula, options, rule.source])
    return table(["rule", "result", "options and defaults", "source"], rows)


def metrics() -> str:
    """One row per metric, from the table of metrics."""
    rows = [
        [
            f"`{name}`",
            m.about,
            m.unit,
            m.better,
            " ".join((m.measure.__doc__ or "").split("Source:")[-1].split())
            if "Source:" in (m.measure.__doc__ or "")
            else "",
        ]
        for name, m in METRICS.items()
    ]
    return table(["metric", "what it is", "in", "better", "source"], rows)


def stages() -> str:
    """A picture of dvc.yaml by kind of stage; a need that another one implies is left out."""
    import networkx

    kinds = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    definitions = {kind: stage.get("do", stage) for kind, stage in kinds.items()}

    def touch(one: str, other: str) -> bool:
        """Whether one path is the other, or a folder around it; `${...}` is any name."""
        if other == "${item.anchor}":  # a variant starts from the seeds' anchor or from one of `anchors`
            return one.startswith("models/anchor")
        pairs = zip(one.split("/"), other.split("/"), strict=False)
        return all(a == b or "$" in a or "$" in b for a, b in pairs)

    graph = networkx.DiGraph()
    graph.add_nodes_from(kinds)
    for kind, stage in definitions.items():
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]]
        needing = [k for k, other in definitions.items() if any(touch(o, d) for o in outs for d in other["deps"])]
        graph.add_edges_from((kind, other) for other in needing if other != kind)
    reduced = set(networkx.transitive_reduction(graph).edges)
    each = {kind: stage["foreach"].strip("${}") for kind, stage in kinds.items() if "foreach" in stage}
    lines = ["flowchart LR"]
    lines += [f'  {kind}["{kind}' + (f'@<br>each of {each[kind]}"]' if kind in each else '"]') for kind in kinds]
    lines += [f"  {kind} --> {other}" for kind, other in graph.edges if (kind, other) in reduced]
    return "```mermaid\n" + "\n".join(lines) + "\n```\n"


def triangle() -> str:
    """The picture of concepts.md: an angle of 60 degrees between two updates of equal length, so t = 2/3."""
    length, angle = 330.0, math.pi / 3
    ratio = 2 * math.cos(angle) / (1 + math.cos(angle))
    tilt = math.radians(4)

    def at(distance: float, direction: float) -> tuple[float, float]:
        return 70 + distance * math.cos(direction + tilt), 210 - distance * math.sin(direction + tilt)

    start, first, second = at(0, 0), at(length, angle / 2), at(length, -angle / 2)
    mean_length = length * math.cos(angle / 2)
    mean, merged = at(mean_length, 0), at(ratio * mean_length, 0)
    arc_from, arc_to = at(70, -angle / 2), at(70, angle / 2)

    def line(a: tuple[float, float], b: tuple[float, float], style: str) -> str:
        return f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" {style}/>\n'

    def dot(a: tuple[float, float], colour: str) -> str:
        return f'<circle cx="{a[0]:.1f}" cy="{a[1]:.1f}" r="6" fill="{colour}"/>\n'

    def text(a: tuple[float, float], words: str, dx: float, dy: float, colour: str = "#222") -> str:
        return f'<text x="{a[0] + dx:.1f}" y="{a[1] + dy:.1f}" fill="{colour}">{words}</text>\n'

    blue, red, grey = 'stroke="#1f77b4" stroke-width="3"', 'stroke="#d62728" stroke-width="4"', 'stroke="#999"'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 430" font-family="sans-serif" font-size="17">\n'
        '<rect width="720" height="430" fill="white"/>\n'
        + line(first, second, f'{grey} stroke-dasharray="3 5" stroke-width="2"')
        + line(start, mean, f'{grey} stroke-dasharray="8 5" stroke-width="2"')
        + line(start, first, blue)
        + line(start, second, blue)
        + line(start, merged, red)
        + f'<path d="M {arc_from[0]:.1f} {arc_from[1]:.1f} A 70 70 0 0 0 {arc_to[0]:.1f} {arc_to[1]:.1f}" fill="none" '
        'stroke="#222" stroke-width="1.5"/>\n'
        + dot(start, "#222")
        + dot(first, "#1f77b4")
        + dot(second, "#1f77b4")
        + dot(mean, "#777")
        + dot(merged, "#d62728")
        + text(start, "anchor w\u2080", -55, 32)
        + text(first, "seed w\u2081", 12, 0, "#1f77b4")
        + text(second, "seed w\u2082", 12, 10, "#1f77b4")
        + text(mean, "uniform soup: the mean", 14, 6, "#555")
        + text(merged, "Model Stock: w\u2080 + t \u00b7 mean(v)", -120, 42, "#d62728")
        + text(at(92, 0), "\u03b8", -6, -8)
        + text(at(length * 0.55, angle / 2), "update v\u2081", -85, -12, "#1f77b4")
        + text(at(length * 0.55, -angle / 2), "update v\u2082", -85, 26, "#1f77b4")
        + text((380, 416), f"\u03b8 = 60\u00b0:  t = 2 cos \u03b8 / (1 + cos \u03b8) = {ratio:.2f}", 0, 0)
        + "</svg>\n"
    )


def pilots() -> str:
    """One row per setting of pilot workers in Slurm."""
    rows = []
    for name, field in Pilot.model_fields.items():
        default = "" if field.is_required() or field.default is None else f"`{json.dumps(field.default)}`"
        rows.append([f"`{name}`", "required" if field.is_required() else default, field.description or ""])
    return table(["setting", "default", "what it is"], rows)


PARTS: dict[str, Callable[[], str]] = {
    "packages": packages,
    "flows": flows,
    "stages": stages,
    "methods": methods,
    "rules": rules,
    "metrics": metrics,
    "pilots": pilots,
}
FILES: dict[str, Callable[[], str]] = {"docs/triangle.svg": triangle}


def pages() -> list[Path]:
    """README and every page of docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def current(page: Path) -> str:
    """A page's text with its generated parts made anew; parts that only a run can give stay as they are."""
    return PART.sub(
        lambda m: m[1] + (PARTS[m[2]]() if m[2] in PARTS else m[3]) + m[4], page.read_text(encoding="utf-8")
    )


def from_results(results: Path, preset: str) -> tuple[str, str, dict[str, bytes]]:
    """The headline, the results page and the pictures, by file name, of a run's results per example."""
    from modelstock.comparison.compare import compare
    from modelstock.comparison.figures import figures
    from modelstock.comparison.report import as_markdown, headline
    from modelstock.params import load_params
    from modelstock.scoring.results import load_scores

    params = load_params(results.parent / "params.yaml")
    scores = [load_scores(results / f"{name}.safetensors") for name in params.evaluate.benchmarks]
    report = json.loads((results.parent / "reports/comparison.json").read_text(encoding="utf-8"))
    distances = {
        row["identity"]: report["choice"]["distances"][row["name"]]
        for row in report["rows"]
        if row["name"] in report["choice"]["distances"]
    }
    settings = params.compare
    comparison = compare(
        scores,
        resample=settings.resample,
        margin=settings.margin,
        champion=settings.champion,
        distances=distances,
    )
    prefix, command = ("", "make repro") if preset == DEFAULT else (f"{preset}-", f"dvc exp run -S preset={preset}")
    drawn = {f"{prefix}{name}": figure for name, figure in figures(comparison).items()}
    text = as_markdown(comparison, {}, {name: title for name, (title, _) in drawn.items()})
    body = text.partition("\n\n")[2]
    option = "" if preset == DEFAULT else f" --preset {preset}"
    other = " The same with all methods: [preset=methods](results-methods.md)." if preset == DEFAULT else ""
    page = (
        f"# Results of `{command}`\n\nGenerated from the results per example of a run: `{command}`, then "
        f"`.venv/bin/python docs/generate.py --results results{option}`. Methods: [merging](merging.md); error bars: "
        f"[scoring](scoring.md#error-bars). {READINGS.get(preset, READINGS[DEFAULT])}{other}\n\n"
    )
    return headline(comparison) + "\n", page + body, {name: picture for name, (_, picture) in drawn.items()}


def main() -> int:
    """Write, or with --check compare, every generated part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--preset", default=DEFAULT)
    parser.add_argument("--geometry", type=Path)
    options = parser.parse_args()
    if options.geometry:
        from geometry_page import OWN, geometry_page

        preset = OWN if options.preset == DEFAULT else options.preset
        text, images = geometry_page(options.geometry, preset)
        FILES["docs/geometry.md" if preset == OWN else f"docs/geometry-{preset}.md"] = lambda: text
        for name, picture in images.items():
            (ROOT / "docs" / name).write_bytes(picture)
    if options.results:
        headline, page, pictures = from_results(options.results, options.preset)
        if options.preset == DEFAULT:
            PARTS["headline"] = lambda: headline
        FILES[f"docs/results{'' if options.preset == DEFAULT else f'-{options.preset}'}.md"] = lambda: page
        for name, picture in pictures.items():
            (ROOT / "docs" / name).write_bytes(picture)
    wanted = {page: current(page) for page in pages()} | {ROOT / name: make() for name, make in FILES.items()}
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'not current; run python docs/generate.py' if options.check else 'written'}")
        if not options.check:
            path.write_text(wanted[path], encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
