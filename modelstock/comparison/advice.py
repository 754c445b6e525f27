"""What a comparison says in words: what is known, what is not, what is advised, and which weight set to ship.

A difference is known where its p is below 0.05 after Holm's correction over all lines, and else not known. Intervals
are those of the lines, over seeds and images or over images alone; the latter say nothing of other seeds, and say so.
"""

from collections.abc import Mapping, Sequence

from modelstock.comparison.choice import Candidate, Choice
from modelstock.comparison.compare import Comparison, Line
from modelstock.comparison.cost import passes
from modelstock.comparison.differences import LEVEL, Difference
from modelstock.comparison.text import half, percent, signed, table, worded
from modelstock.errors import few
from modelstock.merging.methods.table import METHODS
from modelstock.params import STANDARD_ERROR

WHERE = {"in-distribution": "in distribution", "shifts": "on the shifts"}
SEED = "the mean single seed"
UNIFORM = "the uniform soup of the same seeds"
SHOWN = 20  # candidates in the table


def advice(comparison: Comparison) -> str:
    """What is known, what is not and what is advised: three short paragraphs of Markdown."""
    merges = [line for line in comparison.lines if line.key in METHODS and line.over_seed]
    known, unknown = _judged([(_name(line), line.over_seed) for line in merges], SEED, comparison.margin)
    for line in chosen_merges(comparison):
        of_line = _judged([(_name(line), line.over_uniform)], UNIFORM, comparison.margin)
        known, unknown = known + of_line[0], unknown + of_line[1]
    if not merges:
        known = unknown = ["nothing, for no merge was compared"]
    parts = {
        "Known": "; ".join(known) or f"nothing: no difference has a p below {LEVEL} (Holm)",
        "Not known": "; ".join(unknown) or f"nothing: every difference has a p below {LEVEL} (Holm)",
        "Advised": _advised(comparison),
    }
    return worded("\n\n".join(f"**{name}:** {text}." for name, text in parts.items()), comparison.modality)


def chosen_merges(comparison: Comparison) -> list[Line]:
    """Of each highlighted method the line of fewest seeds: a rule that looks at no figure."""
    chosen = []
    for name, method in METHODS.items():
        lines = [line for line in comparison.lines if line.key == name and method.style.highlight]
        chosen += sorted(lines, key=lambda line: line.size)[:1]
    return chosen


def _name(line: Line) -> str:
    return f"{line.kind} of {line.size}"


def _judged(
    lines: Sequence[tuple[str, Mapping[str, Difference]]], other: str, margin: float
) -> tuple[list[str], list[str]]:
    """What is known and what is not of the lines' differences to `other`, (name, by summary) each, in clauses.

    What is the same in distribution and on the shifts is one clause.
    """
    known: dict[str, list[str]] = {}
    unknown: dict[str, list[str]] = {}
    for summary, where in WHERE.items():
        differences = {name: by_summary[summary] for name, by_summary in lines if summary in by_summary}
        better = {name: d for name, d in differences.items() if d.holm < LEVEL and d.value > 0}
        worse = {name: d for name, d in differences.items() if d.holm < LEVEL and d.value < 0}
        undecided = {name: d for name, d in differences.items() if not d.holm < LEVEL}
        for names, verbs in ((better, ("beats", "beat")), (worse, ("is worse than", "are worse than"))):
            if names:
                every = len(names) == len(differences) > 1
                subject = f"all {len(names)} kinds of merges" if every else few(list(names))
                clause = f"{subject} {verbs[len(names) > 1]} {other}"
                known.setdefault(clause, []).append(f"{where} ({_by(list(names.values()))})")
        if undecided:
            clause = f"whether {few(list(undecided))} differ{'s' * (len(undecided) == 1)} from {other}"
            values = list(undecided.values())
            unknown.setdefault(clause, []).append(f"{where} ({_by(values)}; {_open(values, margin)})")

    def clauses(parts: Mapping[str, Sequence[str]]) -> list[str]:
        return [f"{clause} {' and '.join(where)}" for clause, where in parts.items()]

    return clauses(known), clauses(unknown)


def _by(differences: Sequence[Difference]) -> str:
    alone = [one.over for one in differences if not one.over.startswith("seeds")]
    over = f", over {alone[0]} alone" if alone else ""
    if len(differences) == 1:
        return f"{signed(differences[0])} points{over}"
    values = sorted(100 * difference.value for difference in differences)
    return f"by {values[0]:+.1f} to {values[-1]:+.1f} points{over}"


def _open(differences: Sequence[Difference], margin: float) -> str:
    """What is known of a difference that is not: whether it may be a loss, and how large one would have been found."""
    found = f"this experiment finds {100 * max(one.detectable for one in differences):.1f} points four times in five"
    if all(one.no_worse == "yes" for one in differences):
        return f"no worse than {100 * margin:g} points; {found}"
    return found


def _advised(comparison: Comparison) -> str:
    choice = comparison.choice
    chosen = _candidate(choice, choice.chosen)
    splits = " and ".join(choice.splits)
    others = len(choice.within) - 1
    if choice.rule == "best":
        reason = f"the best on {splits}"
        reason += f", though {_count(others)} not worse by more than {margin_in_words(choice)}" if others else ""
    elif choice.chosen == choice.best:
        reason = f"the best on {splits} and the nearest to the anchor of the {len(choice.within)} within the margin"
        reason = reason if others else f"the best on {splits}, with no other within the margin"
    else:
        reason = (
            f"{_points(-chosen.difference)} points worse than the best on {splits} ({choice.best}), which is within "
            f"the margin ({_margin(choice, chosen)}), and the nearest to the anchor of the {len(choice.within)} weight "
            f"sets that are"
        )
    figures = [f"{half(comparison.summary[choice.chosen][s])} {WHERE[s]}" for s in comparison.summaries]
    row = next(row for row in comparison.rows if row.name == choice.chosen)
    anchor = "; it is the anchor: nothing fine-tuned is measurably better there" if row.kind == "anchor" else ""
    cost = _seeds(comparison.cost[choice.chosen])
    return (
        f"ship **{choice.chosen}**: {reason}{anchor}. The test sets, which nothing was chosen on, give it "
        f"{' and '.join(figures)}, over {comparison.resample}. Training it takes {cost}"
    )


def _candidate(choice: Choice, name: str) -> Candidate:
    return next(candidate for candidate in choice.within if candidate.name == name)


def _count(others: int) -> str:
    return "one other is" if others == 1 else f"{others} others are"


def _seeds(count: float) -> str:
    return "nothing" if not count else "one seed" if count == 1 else f"{count:.3g} seeds"


def _points(share: float) -> str:
    return f"{100 * share:.2f}"


def _margin(choice: Choice, candidate: Candidate) -> str:
    if choice.margin == STANDARD_ERROR:
        return f"one standard error of their paired difference, {_points(candidate.standard_error)} points"
    return margin_in_words(choice)


def margin_in_words(choice: Choice) -> str:
    """The margin, whichever the candidate."""
    if choice.margin == STANDARD_ERROR:
        return "one standard error of the paired difference"
    return f"{100 * float(choice.margin):g} points"


def rule_in_words(choice: Choice) -> str:
    """The rule and what it looked at, as a paragraph."""
    several = len(choice.splits) > 1
    looked_at = f"the mean accuracy on {' and '.join(choice.splits)}, equally weighted" if several else "accuracy"
    looked_at += "" if several else f" on {choice.splits[0]}"
    within = f"not worse than the best, {choice.best}, by more than {margin_in_words(choice)}"
    if choice.rule == "best":
        rule = f"the best. {len(choice.within)} of {choice.candidates} weight sets are {within}"
    else:
        rule = (
            f"of those that are {within}, the one nearest to the anchor: {len(choice.within)} of "
            f"{choice.candidates} weight sets"
        )
    paired = (
        " Paired: both answer the same images, so what makes an image hard for both cancels."
        if choice.margin == STANDARD_ERROR
        else ""
    )
    return (
        f"The rule is `{choice.rule}`, by {looked_at}: {rule}.{paired} Rows with the same tensors count once; logit "
        "ensembles are several models and no candidates; the anchor is a candidate like any other. Ties go "
        "to fewer seeds. Test sets were not looked at: their columns are for reporting. Distance: |w - w0| over the "
        "mean single seed's."
    )


def candidates_table(comparison: Comparison) -> str:
    """The candidates within the margin, nearest to the anchor first; of many the first, the chosen and the best."""
    choice = comparison.choice
    rows = {row.name: row for row in comparison.rows}
    shown = [
        candidate
        for place, candidate in enumerate(choice.within)
        if place < SHOWN or candidate.name in (choice.chosen, choice.best)
    ]
    names = [*choice.splits, *(("mean",) if len(choice.splits) > 1 else ())]
    summaries = [comparison.in_distribution, *(("mean of shifts",) if comparison.shifts else ())]
    head = ["weights", *names, "to the best", "standard error", "distance", *summaries, "seeds", "cost"]
    body = []
    for one in shown:
        held_out = [percent(comparison.accuracy[one.name][split].value) for split in choice.splits]
        body.append(
            [
                f"**{one.name}**" if one.name == choice.chosen else one.name,
                *held_out,
                *([percent(one.accuracy)] if len(choice.splits) > 1 else []),
                f"{100 * one.difference:+.2f}" if one.name != choice.best else "best",
                _points(one.standard_error) if one.name != choice.best else "",
                "" if one.distance is None else f"{one.distance:.2f}",
                *(half(comparison.summary[one.name][s]) for s in comparison.summaries),
                str(len(rows[one.name].members)),
                f"{comparison.cost[one.name]:g}",
            ]
        )
    return table(head, body)


def front_table(comparison: Comparison) -> str:
    """The weight sets on the Pareto front, the best in distribution first."""
    head = ["weights", comparison.in_distribution, "mean of shifts", "cost"]
    body = [
        [
            f"**{name}**" if name == comparison.champion else name,
            *(half(comparison.summary[name][s]) for s in comparison.summaries),
            f"{comparison.cost[name]:g}",
        ]
        for name in comparison.front
    ]
    return table(head, body)


def line_cost(comparison: Comparison, line: Line) -> str:
    """A line's training in units of one seed; the best seed takes all that it is the best of.

    Where an answer takes several forward passes, their number too.
    """
    rows = {row.name: row for row in comparison.rows}
    if line.key == "best-seed":
        return str(sum(row.kind == "seed" for row in comparison.rows))
    mean = sum(comparison.cost[name] for name in line.rows) / len(line.rows)
    slower = passes(rows[line.rows[0]])
    return f"{mean:g}" + (f" ({slower} passes)" if slower > 1 else "")
