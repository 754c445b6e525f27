"""Questions that the paper leaves open, or answers with a number: costs, choices, ratios, and where merging fails.

As in accuracy_claims.py, each function takes scored rows and gives what was measured, or None where there are no rows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from modelstock.comparison.cost import trainings
from modelstock.geometry.accuracy import TITLES, Scored, at, best_of, quantity, spearman
from modelstock.geometry.accuracy_claims import LITTLE, below, joint
from modelstock.geometry.claims import Claim, Quantity
from modelstock.merging.methods.table import METHODS


def costs(scored: Scored) -> dict[str, tuple[float, list[int]]]:
    """What is compared -> training in units of one seed, and its rows."""
    seeds = [scored.rows[place] for place in scored.places("seed")]
    lines: dict[str, tuple[float, list[int]]] = {"single seed": (1, scored.places("seed"))}
    for place, row in enumerate(scored.rows):
        size = len(row.members)
        if (row.kind in METHODS and size) or row.kind.startswith("periodic"):
            key = f"{row.kind} of {size}"
        elif row.kind == "longer":
            key = f"longer, {row.options['factor']} times"
        else:
            continue
        lines.setdefault(key, (trainings(row, seeds), []))[1].append(place)
    return dict(sorted(lines.items(), key=lambda line: (line[1][0], line[0])))


def cost(scored: Scored) -> Claim:
    """Claim 16: accuracy for its training. Of the merges, those of uniform soup, Model Stock and the greedy soup."""
    shown = {
        name: line
        for name, line in costs(scored).items()
        if name.partition(" of ")[0] in ("single seed", "model_stock", "uniform", "greedy")
        or name.startswith(("longer", "periodic"))
    }
    numbers = [
        scored.accuracy(f"{name} (training {units:g})", places, summary)
        for name, (units, places) in shown.items()
        for summary in scored.summaries
    ]
    return Claim(
        key="cost",
        artefact=16,
        title="what training each costs",
        rule="accuracy beside the training it needs, in units of one seed; merging and scoring are not counted",
        verdict="measured",
        quantities=tuple(numbers),
    )


def selection_regret(scored: Scored, champions: Mapping[str, str]) -> Claim:
    """What choosing on the held-out split costs against the best there is on the test set.

    `champions`: rule of modelstock.comparison.choice -> the row that it chooses.
    """
    places = [p for p, row in enumerate(scored.rows) if row.kind not in ("ensemble", "plane", "noise", "pool")]
    held_out = scored.measured("held-out")[places]
    by_name = {row.name: place for place, row in enumerate(scored.rows)}
    numbers = []
    for rule, champion in champions.items():
        for summary in scored.summaries:
            value = scored.measured(summary)[places].max() - scored.measured(summary)[by_name[champion]]
            samples = scored.drawn(summary)[:, places].max(axis=1) - scored.drawn(summary)[:, by_name[champion]]
            name = f"best there minus {champion}, the champion by the rule {rule}, {TITLES[summary]}"
            numbers.append(quantity(name, 100 * value, 100 * samples, over="images", unit="points"))
    correlations = [
        quantity(
            f"rank correlation with the held-out split, {TITLES[summary]}",
            spearman(held_out, scored.measured(summary)[places]),
            np.array(
                [
                    spearman(first, second)
                    for first, second in zip(
                        scored.drawn("held-out")[:, places], scored.drawn(summary)[:, places], strict=True
                    )
                ]
            ),
            over="images",
        )
        for summary in scored.summaries
    ]
    return Claim(
        key="regret",
        artefact=None,
        title="what choosing on the held-out split costs",
        rule=f"of {len(places)} weight sets, the best on the test images themselves minus the one chosen on the "
        "held-out split",
        verdict="measured",
        quantities=(*numbers, *correlations),
        remark="the best is found on the images it is measured on, so the cost is overstated",
    )


def s_curve(
    scored: Scored, stock: Mapping[tuple[int, ...], float], slerp: Mapping[tuple[int, ...], float]
) -> Claim | None:
    """Along w0 + s * mean update of two seeds: where Model Stock, SLERP and the uniform soup lie.

    `stock`, `slerp`: the s of each by pair.
    """
    rays, nodes = ray_curves(scored)
    if not rays:
        return None
    best_s = float(np.mean([best_of(scored.measured("held-out")[places], nodes) for places in rays.values()]))
    t, arc = (float(np.mean([marks[pair] for pair in rays])) for marks in (stock, slerp))
    numbers = [
        Quantity(name="best s on the held-out split, mean", value=best_s),
        Quantity(name="s of Model Stock, one ratio for the model", value=t),
        Quantity(name="s of SLERP", value=arc),
    ]
    for mark, s in (("Model Stock", t), ("the uniform soup", 1.0), ("SLERP", arc)):
        for summary in scored.summaries:
            gaps, samples = [], []
            for places in rays.values():
                best = places[int(np.argmax(scored.measured("held-out")[places]))]
                value, drawn = scored.measured(summary), scored.drawn(summary)
                gaps.append(float(value[best] - at(value[places], nodes, s)))
                samples.append(drawn[:, best] - at(drawn[:, places], nodes, s))
            name = f"best s minus the s of {mark}, {TITLES[summary]}"
            numbers.append(
                quantity(name, 100 * float(np.mean(gaps)), 100 * np.mean(samples, axis=0), over="images", unit="points")
            )
    return Claim(
        key="s-curve",
        artefact=None,
        title="where merges lie on one ray",
        rule="accuracy along w0 + s * mean update; best s: on the held-out split",
        verdict="measured",
        quantities=tuple(numbers),
        remark=f"{len(rays)} pairs of seeds",
    )


def ray_curves(scored: Scored) -> tuple[dict[tuple[int, ...], list[int]], list[float]]:
    """Pair -> the places along its ray, the anchor first; and the s of each."""
    rays: dict[tuple[int, ...], list[tuple[float, int]]] = {}
    for place in scored.places("ray"):
        row = scored.rows[place]
        rays.setdefault(row.members, []).append((float(row.options["s"]), place))
    anchor = scored.places("anchor")[0]
    nodes = [0.0, *(s for s, _ in sorted(next(iter(rays.values()))))] if rays else []
    return {pair: [anchor, *(place for _, place in sorted(ray))] for pair, ray in rays.items()}, nodes


def formula_costs_little(scored: Scored) -> Claim | None:
    """Whether the formula's ratio is as good as the projection of the centre, per tensor."""
    gains = [scored.gain("oracle ratio minus formula", "oracle", "model_stock", s, size=2) for s in scored.summaries]
    numbers = [number for number in gains if number]
    if not numbers:
        return None
    return Claim(
        key="oracle-accuracy",
        artefact=None,
        title="the formula's ratio is as good as the oracle's",
        rule=f"the ratio that leads nearest to the centre, per tensor, is better than the formula's by less than "
        f"{LITTLE:g} points, in distribution and on the shifts",
        verdict=joint([below(number, LITTLE) for number in numbers]),
        quantities=tuple(numbers),
    )


def pool_pairs(scored: Scored) -> dict[str, list[tuple[float, int, int]]]:
    """Pool -> (cosine, place of Model Stock, place of the uniform soup) of its pairs; the seeds are a pool too."""
    if not scored.places("pool"):
        return {}
    twins: dict[tuple[Any, ...], dict[str, int]] = {}
    for method in ("uniform", "model_stock"):
        for place in scored.of_size(method, 2):
            if "cosine" in scored.rows[place].options:
                twins.setdefault(("seeds", *scored.rows[place].members), {})[method] = place
    for place in scored.places("pool"):
        options = scored.rows[place].options
        if "cosine" in options:
            twins.setdefault((options["pool"], *options["members"]), {})[options["method"]] = place
    pairs: dict[str, list[tuple[float, int, int]]] = {}
    for (pool, *_), places in twins.items():
        cosine = float(scored.rows[places["uniform"]].options["cosine"])
        pairs.setdefault(pool, []).append((cosine, places["model_stock"], places["uniform"]))
    return pairs


def failure_map(scored: Scored) -> Claim | None:
    """Where Model Stock gains on the uniform soup and where it loses: against the cosine, over all pairs of pools."""
    pools = pool_pairs(scored)
    every = [pair for pairs in pools.values() for pair in pairs]
    if not every:
        return None
    cosines = np.array([cosine for cosine, _, _ in every])
    numbers = []
    for summary in scored.summaries:
        value, drawn = scored.measured(summary), scored.drawn(summary)
        stock, uniform = [pair[1] for pair in every], [pair[2] for pair in every]
        samples = np.array([spearman(cosines, gain) for gain in drawn[:, stock] - drawn[:, uniform]])
        name = f"rank correlation of cosine and gain, {len(every)} pairs, {TITLES[summary]}"
        numbers.append(quantity(name, spearman(cosines, value[stock] - value[uniform]), samples, over="images"))
    for pool, pairs in pools.items():
        for summary in scored.summaries:
            stock, uniform = [pair[1] for pair in pairs], [pair[2] for pair in pairs]
            cosine = np.mean([pair[0] for pair in pairs])
            name = f"{pool} (cosine {cosine:.2f}): Model Stock minus uniform soup"
            numbers.append(scored.difference(name, stock, uniform, summary))
    return Claim(
        key="failure-map",
        artefact=None,
        title="where Model Stock gains on the uniform soup",
        rule="gain over the uniform soup of the same two against their cosine, over all pairs of each pool",
        verdict="measured",
        quantities=tuple(numbers),
        remark="pairs of one pool share members; intervals are over images alone",
    )


def pools_against_two(scored: Scored) -> Claim | None:
    """Soups of whole pools, which cost a training per member, against Model Stock of two seeds."""
    pairs = scored.of_size("model_stock", 2)
    pools = list(dict.fromkeys(scored.rows[place].options["pool"] for place in scored.places("pool")))
    if not pools or not pairs:
        return None
    numbers = []
    for pool in pools:
        members = scored.places("pool", pool=pool, method="member")
        best = members[int(np.argmax(scored.measured("held-out")[members]))]
        whole = {
            method: place
            for method in ("uniform", "greedy")
            for place in scored.places("pool", pool=pool, method=method)
            if len(scored.rows[place].options["members"]) == len(members)
        }
        for name, place in {"best single": best, **whole}.items():
            for summary in scored.summaries:
                text = f"{pool}, {name} of {len(members)} minus Model Stock of two"
                numbers.append(scored.difference(text, [place], pairs, summary))
    return Claim(
        key="pools",
        artefact=None,
        title="soups of a whole pool against Model Stock of two",
        rule="a pool's best single and its greedy soup are chosen on the held-out split; a pool costs a training per "
        "member, Model Stock of two costs two",
        verdict="measured",
        quantities=tuple(numbers),
    )
