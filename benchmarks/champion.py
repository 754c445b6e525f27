"""The rules that choose a champion, on a run: what each chooses, also with other images and fewer seeds.

    python benchmarks/champion.py [--results FOLDER] [--report FILE] [--rounds N] [--seeds N]

- all: the champion of each rule, with what the test sets give it, which no rule looks at.
- rounds: in each, the held-out images are drawn anew with replacement, and so many of the seeds are kept, with the
  weight sets that are made of these alone. Of what the rules choose: accuracy in distribution and on the shifts, less
  that of the best candidate there (regret), and less that of what "best" chooses, each as its mean and the 2.5 and 97.5
  percentiles over the rounds. Rounds share test images and seeds: percentiles are of the choice alone.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from modelstock.comparison.choice import choose, distinct
from modelstock.params import ChampionParams
from modelstock.scoring.results import Scores, load_scores

RULES = {
    "best": ChampionParams(rule="best"),
    "nearest, one standard error": ChampionParams(),
    "nearest, 0.5 points": ChampionParams(margin=0.005),
    "nearest, 1 point": ChampionParams(margin=0.01),
}


def kept(scores: Scores, rows: list[int], images: np.ndarray | None = None) -> Scores:
    """Some of the rows, on all images or on those drawn."""
    changes = {"rows": tuple(scores.rows[row] for row in rows), "correct": scores.correct[rows]}
    if images is not None:
        changes |= {"correct": scores.correct[rows][:, images], "truth": scores.truth[images]}
    return dataclasses.replace(scores, **changes)


def calibration_error(results: list[Scores], row: int) -> float:
    """The mean over the benchmarks of the expected calibration error, in percent."""
    from modelstock.comparison.metrics import METRICS

    return 100 * float(np.mean([METRICS["ece"].measure(scores, row) for scores in results]))


def spread(values: list[float]) -> str:
    """Mean and percentiles, in points."""
    low, high = np.percentile(values, [2.5, 97.5])
    return f"{100 * np.mean(values):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--report", type=Path, default=Path("reports/comparison.json"))
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    results = [load_scores(file) for file in sorted(options.results.glob("*.safetensors"))]
    report = json.loads(options.report.read_text(encoding="utf-8"))
    known = report["choice"]["distances"]
    distances = {row["identity"]: known[row["name"]] for row in report["rows"] if row["name"] in known}
    rows = results[0].rows
    place = {row.name: number for number, row in enumerate(rows)}
    shifts = [scores for scores in results if scores.role == "shift"]
    inside = next(scores for scores in results if scores.role == "in-distribution").correct.mean(axis=1)
    outside = np.mean([scores.correct.mean(axis=1) for scores in shifts], axis=0)

    print("all: rule, champion, within the margin, distance, in distribution, shifts, calibration error on the shifts")
    for name, rule in RULES.items():
        choice = choose(results, rule, distances)
        row = place[choice.chosen]
        distance = distances[rows[row].identity] / (choice.seed_distance or 1)
        print(
            f"{name}: {choice.chosen}, {len(choice.within)} of {choice.candidates}, {distance:.2f}, "
            f"{100 * inside[row]:.1f}, {100 * outside[row]:.1f}, {calibration_error(shifts, row):.1f}"
        )

    generator = np.random.default_rng(0)
    seeds = sorted({member for row in rows if row.kind == "seed" for member in row.members})
    chosen: dict[str, list[int]] = {name: [] for name in RULES}
    best: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        allowed = set(generator.choice(seeds, options.seeds, replace=False).tolist())
        some = [number for number, row in enumerate(rows) if allowed.issuperset(row.members)]
        drawn = []
        for scores in results:
            chosen_on = scores.role in ("held-out", "held-out-shift")
            images = generator.integers(0, scores.truth.size, scores.truth.size) if chosen_on else None
            drawn.append(kept(scores, some, images))
        single = [some[number] for number in distinct(drawn[0].rows)]
        best.append((inside[single].max(), outside[single].max()))
        for name, rule in RULES.items():
            chosen[name].append(place[choose(drawn, rule, distances).chosen])
    print(f"\n{options.rounds} rounds of {options.seeds} of {len(seeds)} seeds, in points")
    base = chosen["best"]
    for name, picked in chosen.items():
        regret = [
            spread([accuracy[row] - most[n] for row, most in zip(picked, best, strict=True)])
            for n, accuracy in enumerate((inside, outside))
        ]
        pairs = list(zip(picked, base, strict=True))
        over = [[accuracy[row] - accuracy[other] for row, other in pairs] for accuracy in (inside, outside)]
        good = np.mean([b > 0 and a > -0.005 for a, b in zip(*over, strict=True)])
        bad = np.mean([a <= -0.005 for a in over[0]])
        print(
            f"{name}: regret in distribution {regret[0]}, on the shifts {regret[1]}; over best in distribution "
            f"{spread(over[0])}, on the shifts {spread(over[1])}; better there and at most 0.5 points worse "
            f"in distribution in {100 * good:.0f} % of rounds, worse by more in {100 * bad:.0f} %"
        )


if __name__ == "__main__":
    main()
