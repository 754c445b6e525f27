"""The pages docs/geometry*.md from runs: each claim, what it means and what was measured."""

import json
from pathlib import Path
from typing import Any

from modelstock.comparison.text import worded

PREFIX = "geometry-"  # of pictures, in the run's folder and in docs/
MOST = 1_500_000  # bytes of all pictures together
OWN = "geometry"  # the preset of docs/geometry.md
# What was trained, by preset.
SETTINGS = {
    OWN: "the embedded benchmark. It is a tower of 0.8M parameters on procedural pictures: what holds here need not "
    "hold at scale, and the same commands test it on any other data and backbone",
    "reviews": "a real encoder of texts, all-MiniLM-L6-v2 (22.7M parameters), fine-tuned on film reviews. What weights "
    "alone say is the second setting of the [claims](geometry.md); what accuracy says is of few weight sets, and no "
    "point was scored for it alone",
}
MODALITIES = {"reviews": "text"}
OTHERS = "A second setting, a real encoder of texts on film reviews: [geometry-reviews](geometry-reviews.md)."

# Key of a claim -> what it means, in two sentences; and the picture that shows it.
MEANINGS: dict[str, tuple[str, str]] = {
    "lens": (
        "Interpolating one seed with the anchor trades accuracy in distribution against shifts. The paper finds the "
        "merge of two above that curve, so the second training buys what no alpha can.",
        "alpha.png",
    ),
    "angles": (
        "Every two seeds' updates lie at the same angle, layer by layer. Without it one ratio per layer would not do "
        "for all pairs.",
        "cosine.png",
    ),
    "norms": (
        "All seeds' updates are equally long, layer by layer: they lie on a thin shell. The formula takes it for "
        "granted.",
        "norms.png",
    ),
    "steps": ("Angles and norms agree between seeds at every step of training, not only at its end.", "steps.png"),
    "settings": (
        "The same with other recipes, other parts of the training set, and from weaker anchors. The paper shows it for "
        "several backbones and data sets.",
        "",
    ),
    "closer": (
        "The nearer a weight set lies to the mean of many seeds, the more accurate it is. It is why Model Stock aims "
        "at that mean.",
        "distance.png",
    ),
    "centre": (
        "The mean of many seeds is better than each of them. Were it not, there would be nothing to aim at.",
        "distance.png",
    ),
    "plane": (
        "In the plane through anchor and two seeds, accuracy is highest where the plane comes nearest to the centre. "
        "The anchor's pull is a step toward that place.",
        "plane.png",
    ),
    "noise": (
        "A seed is the centre with Gaussian noise of the shell's radius. Noise of any direction is a stronger claim "
        "than noise along the seeds' own differences, so both are scored.",
        "noise.png",
    ),
    "lengths": (
        "The mean of N updates is as long as equal norms and one angle say. It tests both at once.",
        "triangle.png",
    ),
    "ratio": ("The ratio t follows from the angle and the number of seeds alone.", "ratio.png"),
    "alpha": (
        "For one seed, the formula gives t = cos, which makes WiSE-FT a special case. The best alpha on the held-out "
        "split is set beside the cosine.",
        "alpha.png",
    ),
    "seeds": (
        "The paper stops at two or three seeds, as more add little. Gains are per further seed.",
        "sizes.png",
    ),
    "granularity": (
        "A ratio can be taken per filter, tensor, block, or once for the model. The paper takes one per tensor.",
        "granularity.png",
    ),
    "periodic": (
        "Merging at the end of each epoch is said to be better than merging once. The rival that costs as much is one "
        "seed trained as long as all together.",
        "",
    ),
    "cost": (
        "Training in units of one seed beside accuracy. Merging costs seconds and is not counted.",
        "",
    ),
    "oracle": (
        "The ratio that leads nearest to the centre, which seeds set aside show, against the formula's. Bias and error "
        "are by tensor.",
        "oracle.png",
    ),
    "oracle-accuracy": (
        "What the formula's ratio costs in accuracy, against the ratio that leads nearest to the centre.",
        "",
    ),
    "s-curve": (
        "Uniform soup, Model Stock with one ratio, and SLERP lie on one ray and differ in s alone. The curve along it "
        "shows how much the choice matters.",
        "ray.png",
    ),
    "regret": ("What it costs that the champion is chosen on the held-out split, and not on the test set.", ""),
    "failure-map": (
        "Where Model Stock gains on the uniform soup and where it loses, for pairs that differ in more than their "
        "seed.",
        "failure_map.png",
    ),
    "pools": (
        "Soups of a whole sweep cost a training per member. Model Stock of two costs two.",
        "",
    ),
}


def shown(number: dict[str, Any]) -> str:
    """A number with its interval and what the interval is over."""
    if number["value"] is None:
        return number["text"]
    interval = "" if number["low"] is None else f" [{number['low']:.3g}, {number['high']:.3g}]"
    over = f", over {number['over']}" if number["over"] and interval else ""
    return f"{number['value']:.3g}{number['unit'] and ' ' + number['unit']}{interval}{over}"


def summary(claims: list[dict[str, Any]]) -> str:
    """One line per claim: its number in the paper, the verdict, and its first number."""
    lines = ["| # | claim | verdict | first number |", "|---|---|---|---|"]
    for claim in claims:
        verdict = f"**{claim['verdict']}**" if claim["verdict"] in ("holds", "does not hold") else claim["verdict"]
        first = claim["quantities"][0] if claim["quantities"] else None
        number = f"{first['name']}: {shown(first)}" if first else ""
        lines.append(f"| {claim['artefact'] or ''} | {claim['title']} | {verdict} | {number} |")
    return "\n".join(lines)


def paragraph(claim: dict[str, Any], pictures: dict[str, str], drawn: set[str]) -> str:
    """A claim with its rule, all its numbers and, where it has one that is not yet shown, its picture."""
    number = f"{claim['artefact']}. " if claim["artefact"] else ""
    meaning, picture = MEANINGS.get(claim["key"], ("", ""))
    parts = [f"### {number}{claim['title']}: {claim['verdict']}", meaning, f"Rule: {claim['rule']}."]
    parts += ["\n".join(f"- {quantity['name']}: {shown(quantity)}" for quantity in claim["quantities"])]
    parts += [f"Note: {claim['remark']}."] if claim["remark"] else []
    name = f"{PREFIX}{picture}"
    if picture and name in pictures and name not in drawn:
        drawn.add(name)
        parts.append(f"![{pictures[name]}]({name})")
    return "\n\n".join(part for part in parts if part)


def geometry_page(folder: Path, preset: str = OWN) -> tuple[str, dict[str, bytes]]:
    """The page, and the pictures that it shows by file name, of the folder that the stage `geometry` wrote.

    Of another preset than `geometry` it has no pictures: those of the claims are the same, and are in geometry.md.

    Raises:
        ValueError: pictures that are larger than the docs should carry.
    """
    written = json.loads((folder / "geometry.json").read_text(encoding="utf-8"))
    pictures = json.loads((folder / "accuracy.json").read_text(encoding="utf-8"))["pictures"] if preset == OWN else {}
    claims, drawn = written["claims"], set[str]()
    seeds, centre = len(written["seeds"]), len(written["centre"])
    of_paper = [paragraph(claim, pictures, drawn) for claim in claims if claim["artefact"]]
    others = [paragraph(claim, pictures, drawn) for claim in claims if not claim["artefact"]]
    parts = [
        "# The geometry of fine-tuned weights: the paper's claims, tested"
        + ("" if preset == OWN else f" on `preset={preset}`"),
        f"Generated from a run of the preset `{preset}`: {seeds} seeds under test"
        + (f", and {centre} others whose mean is the centre" if centre else "")
        + f", on {SETTINGS[preset]}.",
        f"```\n.venv/bin/dvc exp run -S preset={preset}\n.venv/bin/python docs/generate.py --geometry geometry"
        + ("" if preset == OWN else f" --preset {preset}")
        + "\n```",
        "Each claim has its rule in words; a verdict is by the 95 % interval alone, and *undecided* where the interval "
        "allows both. Brackets are such intervals. `#` is the number of the paper's figure or table as listed here; "
        "those without one are questions that it leaves open. From weights alone, on any checkpoints: `modelstock "
        "geometry`, see [merging](merging.md).",
        *([OTHERS] if preset == OWN else []),
        summary(claims),
        "## The paper's claims",
        *of_paper,
        "## Open questions",
        *others,
    ]
    images = {name: (folder / name).read_bytes() for name in sorted(drawn)}
    size = sum(map(len, images.values()))
    if size > MOST:
        raise ValueError(f"{folder}: {size:,} bytes of pictures, more than {MOST:,}: draw them smaller")
    return worded("\n\n".join(parts) + "\n", MODALITIES.get(preset, "image")), images
