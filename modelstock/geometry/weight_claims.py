"""The paper's claims about where fine-tuned weights lie, and open questions, decided from weights alone."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from modelstock.geometry import centre, shell
from modelstock.geometry.claims import Claim, Quantity, Verdict, decided, not_enough
from modelstock.geometry.measure import KURTOSIS_NEEDS, Geometry
from modelstock.geometry.stack import Stack, estimate

# Up to which value a claim holds. An angle of 60 degrees that is 3 degrees off moves the t of two seeds by 0.04; norms
# that vary by 5 % move it by less than 0.002.
ANGLE_SPREAD = 3.0  # degrees
NORM_VARIATION = 0.05
LENGTH_ERROR = 0.02
RATIO_BIAS = 0.02
ORTHOGONAL = 0.1  # a cosine; 84 to 96 degrees
EXCESS_CORRELATION = 0.05
EXCESS_KURTOSIS = 0.5
LARGEST = 8  # the largest subsets, but for all seeds, whose lengths are compared

NO_CENTRE = "the seeds do not show a centre apart from the anchor, or residuals larger than noise"


def sizes(count: int) -> list[int]:
    """The sizes of subsets whose lengths and distances are reported."""
    return sorted({*range(2, min(count, LARGEST) + 1), count})


def weight_claims(
    geometry: Geometry,
    steps: Mapping[int, Geometry] | None = None,
    settings: Mapping[str, Geometry] | None = None,
) -> list[Claim]:
    """Every claim that weights decide, in the order of docs/geometry.md.

    `steps`: the seeds at several steps. `settings`: by name, seeds of other recipes or anchors, one recipe each.
    """
    stack = geometry.stack()
    return [
        _angles(stack),
        _norms(stack),
        *([_steps(steps)] if steps else []),
        *([_settings({"seeds": geometry, **settings})] if settings else []),
        _lengths(stack),
        _ratio(stack),
        _nearer(stack),
        _oracle(stack),
        _residuals_to_centre(stack),
        _residual_pairs(stack),
        _excess(stack, geometry.seeds),
        _gaussian(stack),
        _ledger(geometry),
    ]


def _verdict(quantity: Quantity, bound: float, *, around_zero: bool = False) -> Verdict:
    """Whether a quantity, or with `around_zero` its absolute value, is at most `bound`."""
    if quantity.low is None or quantity.high is None:
        return "not enough seeds" if "not enough" in quantity.text else "undecided"
    low, high = quantity.low, quantity.high
    if around_zero:
        ends = abs(low), abs(high)
        low, high = 0.0 if low <= 0 <= high else min(ends), max(ends)
    return decided(low=low, high=high, bound=bound, below=True)


def _angles(stack: Stack) -> Claim:
    spread = estimate(
        "standard deviation over pairs, mean over tensors",
        lambda part: float(shell.angle_spread(part).mean()),
        stack,
        need=3,
        unit="degrees",
        least=0,
    )
    mean = estimate("mean angle", lambda part: float(shell.angles(part).mean()), stack, need=2, unit="degrees", least=0)
    return Claim(
        key="angles",
        artefact=2,
        title="the angle between updates is the same for all pairs, layer by layer",
        rule=f"the angles' standard deviation over pairs is at most {ANGLE_SPREAD:g} degrees, mean over tensors",
        verdict=_verdict(spread, ANGLE_SPREAD),
        quantities=(spread, mean),
    )


def _norms(stack: Stack) -> Claim:
    variation = estimate(
        "coefficient of variation, mean over tensors",
        lambda part: float(shell.variation(part).mean()),
        stack,
        need=2,
        least=0,
    )
    whole = estimate("of the whole model", lambda part: float(shell.variation(part.whole())[0]), stack, need=2, least=0)
    return Claim(
        key="norms",
        artefact=3,
        title="the norm of updates is the same for all seeds, layer by layer (a thin shell)",
        rule=f"the norms' coefficient of variation over seeds is at most {NORM_VARIATION:g}, mean over tensors",
        verdict=_verdict(variation, NORM_VARIATION),
        quantities=(variation, whole),
    )


def _both(geometries: Iterable[Geometry]) -> tuple[list[tuple[Claim, Claim]], Verdict]:
    """Claims 3 and 2 of each, and whether they all hold."""
    claims = [(_norms(geometry.stack()), _angles(geometry.stack())) for geometry in geometries]
    verdicts = [claim.verdict for pair in claims for claim in pair]
    order: tuple[Verdict, ...] = ("does not hold", "not enough seeds", "undecided")
    return claims, next((verdict for verdict in order if verdict in verdicts), "holds")


def _settings(settings: Mapping[str, Geometry]) -> Claim:
    claims, verdict = _both(settings.values())
    names = ("variation of norms", "spread of angles")
    return Claim(
        key="settings",
        artefact=5,
        title="both hold across settings",
        rule=f"claims 2 and 3 hold in each of the {len(settings)} settings",
        verdict=verdict,
        quantities=tuple(
            replace(claim.quantities[0], name=f"{setting}, {name} ({claim.verdict})")
            for setting, pair in zip(settings, claims, strict=True)
            for name, claim in zip(names, pair, strict=True)
        ),
    )


def _steps(steps: Mapping[int, Geometry]) -> Claim:
    pairs, verdict = _both(steps.values())
    claims = dict(zip(steps, pairs, strict=True))
    quantities = []
    for number, name in enumerate(("coefficient of variation", "standard deviation of angles")):
        found = {step: pair[number].quantities[0] for step, pair in claims.items()}
        step = max(found, key=lambda step: found[step].value or -1.0)
        worst = found[step]
        quantities.append(replace(worst, name=f"largest {name}, at step {step}"))
    return Claim(
        key="steps",
        artefact=4,
        title="both hold at every step of training",
        rule=f"claims 2 and 3 hold at each of the {len(steps)} steps measured",
        verdict=verdict,
        quantities=tuple(quantities),
    )


def _lengths(stack: Stack) -> Claim:
    def error_of(size: int) -> Quantity:
        return estimate(
            f"n = {size}",
            lambda part: float(shell.length_error(part, size).mean()),
            stack,
            need=size + 1,
            least=0,
        )

    errors = [error_of(size) for size in (2, 3, 4) if size < max(3, stack.count)]
    return Claim(
        key="lengths",
        artefact=10,
        title="the mean of n updates has the length sqrt((1 + (n - 1) cos) / n) * l",
        rule=f"the mean of two has it within {LENGTH_ERROR:.0%}, mean deviation over pairs and tensors",
        verdict=_verdict(errors[0], LENGTH_ERROR),
        quantities=tuple(errors),
        remark="l and cos are means over all seeds: the average over all subsets is nearly right by construction; what "
        "is tested is that each subset is",
    )


def _ratio(stack: Stack) -> Claim:
    quantities = []
    for count in dict.fromkeys((2, stack.count)):
        ratios = shell.applied(stack, count)
        for name, level in (("median over tensors", 0.5), ("10 % of tensors below", 0.1), ("10 % above", 0.9)):
            quantities.append(Quantity(name=f"t of {count}, {name}", value=float(np.quantile(ratios, level))))
    whole = float(shell.applied(stack.whole(), 2)[0])
    difference = float(np.abs(shell.applied(stack) - shell.applied(stack, by="angle")).max())
    return Claim(
        key="ratio",
        artefact=11,
        title="the ratio t that the angle gives",
        rule="t = n cos / (1 + (n - 1) cos), from the mean cosine over pairs",
        verdict="measured",
        quantities=(
            *quantities,
            Quantity(name="t of 2 of the whole model", value=whole),
            Quantity(name="largest difference if angles are averaged", value=difference),
        ),
    )


def relative_distance(stack: Stack) -> float:
    """Distance to the centre of Model Stock of two, t per tensor, over that of their mean, root mean squares."""
    pair = centre.around(stack, 2)
    squares = [pair.distance(ratio).sum(axis=0).mean() for ratio in (pair.ratio, 1.0)]
    return float(np.sqrt(squares[0] / squares[1])) if min(squares) > 0 else float("nan")


def _nearer(stack: Stack) -> Claim:
    relative = estimate(
        "its distance to the centre over that of their mean",
        relative_distance,
        stack,
        need=centre.seeds_needed(stack, 2, references=2),
        least=0,
        undefined=NO_CENTRE,
    )
    return Claim(
        key="nearer",
        artefact=None,
        title="Model Stock of two seeds is nearer to the centre than their mean is",
        rule="the ratio of the distances is below 1, root mean squares over pairs, whole model",
        verdict=_verdict(relative, 1.0),
        quantities=(relative,),
        remark=_references(stack),
    )


def _oracle(stack: Stack) -> Claim:
    bias = estimate(
        "t - oracle t, mean over tensors",
        lambda part: float(centre.bias(part).mean()),
        stack,
        need=centre.seeds_needed(stack, 2, references=1),
    )
    error = estimate(
        "root mean square",
        centre.root_mean_square,
        stack,
        need=centre.seeds_needed(stack, 2, references=2),
        least=0,
    )
    return Claim(
        key="oracle",
        artefact=None,
        title="the formula's t of two seeds is the t that comes nearest to the centre",
        rule=f"its bias is within {RATIO_BIAS:g}, mean over tensors and pairs",
        verdict=_verdict(bias, RATIO_BIAS, around_zero=True),
        quantities=(bias, error),
        remark=f"{_references(stack)}; among seeds drawn alike only unequal norms and the spread of angles make a bias",
    )


def _references(stack: Stack) -> str:
    """Which seeds stand for the centre."""
    known = stack.grams.shape[-1] - stack.count
    if not known:
        return "the centre of each pair is the mean of the other seeds, without their noise"
    if known == 1:
        return "the centre is one checkpoint, taken for the centre itself"
    return f"the centre is the mean of {known} seeds that are not under test, without their noise"


def _residuals_to_centre(stack: Stack) -> Claim:
    angle = estimate(
        "root mean square of the cosine over seeds, whole model",
        lambda part: centre.root_mean_square_of(centre.residuals_to_centre(part.whole())),
        stack,
        need=centre.seeds_needed(stack, 1, references=2),
        least=0,
        undefined=NO_CENTRE,
    )
    return Claim(
        key="residuals-centre",
        artefact=None,
        title="residuals w - mu are orthogonal to the centre's update mu - w0",
        rule=f"their cosine is at most {ORTHOGONAL:g}, root mean square over seeds, whole model",
        verdict=_verdict(angle, ORTHOGONAL),
        quantities=(angle,),
        remark="" if stack.has_centre else "the mean over seeds is 0 by construction: what is tested is each seed",
    )


def _residual_pairs(stack: Stack) -> Claim:
    angle = estimate(
        "root mean square of the cosine over pairs, whole model",
        lambda part: centre.root_mean_square_of(centre.residual_pairs(part.whole())[1]),
        stack,
        need=centre.seeds_needed(stack, 2, references=2),
        least=0,
        undefined=NO_CENTRE,
    )
    return Claim(
        key="residuals-pairs",
        artefact=None,
        title="residuals of different seeds are orthogonal",
        rule=f"their cosine is at most {ORTHOGONAL:g}, root mean square over pairs, whole model",
        verdict=_verdict(angle, ORTHOGONAL),
        quantities=(angle,),
        remark="" if stack.has_centre else "the mean over pairs is 0 by construction: what is tested is each pair",
    )


def _excess(stack: Stack, seeds: tuple[str, ...]) -> Claim:
    need = centre.seeds_needed(stack, 2, references=2)
    quantities: list[Quantity] = []
    verdict: Verdict = "not enough seeds"
    if stack.has_centre:
        mean = estimate(
            "mean cosine of residuals over pairs, whole model",
            lambda part: float(centre.residual_pairs(part.whole())[1].mean()),
            stack,
            need=need,
            undefined=NO_CENTRE,
        )
        quantities, verdict = [mean], _verdict(mean, EXCESS_CORRELATION)
    if stack.count < need:
        quantities.append(Quantity(name="largest cosine of two", value=None, text=not_enough(stack.count, need)))
    else:
        numbers, cosines = centre.residual_pairs(stack.whole())
        if np.isfinite(cosines).all():
            first, second = numbers[int(cosines[0].argmax())]
            name = f"largest cosine of two, {seeds[first]} and {seeds[second]}"
            quantities.append(Quantity(name=name, value=float(cosines.max())))
        else:
            quantities.append(Quantity(name="largest cosine of two", value=None, text=NO_CENTRE))
        verdict = verdict if stack.has_centre else "measured"
    return Claim(
        key="excess",
        artefact=None,
        title="seeds have no correlation beyond the centre that they share",
        rule=f"with --centre: the mean cosine between residuals is at most {EXCESS_CORRELATION:g}, whole model",
        verdict=verdict,
        quantities=tuple(quantities),
        remark=""
        if stack.has_centre
        else "what all seeds share counts as the centre; other seeds, by --centre, would show it",
    )


def _gaussian(stack: Stack) -> Claim:
    size = estimate(
        "kurtosis over seeds",
        centre.kurtosis,
        stack,
        need=KURTOSIS_NEEDS,
        undefined="no tensor has enough directions",
    )
    shifted = Quantity(
        name=size.name,
        value=None if size.value is None else size.value - 3,
        low=None if size.low is None else size.low - 3,
        high=None if size.high is None else size.high - 3,
        text=size.text,
    )
    return Claim(
        key="gaussian",
        artefact=None,
        title="seeds are Gaussian around the centre",
        rule=f"projections on random directions have a kurtosis within {EXCESS_KURTOSIS:g} of 3",
        verdict=_verdict(shifted, EXCESS_KURTOSIS, around_zero=True),
        quantities=(size,),
        remark="norms or groups of seeds that differ show in it, heavy tails of single weights do not",
    )


def flag_of(ratio: float) -> str:
    """What is unusual about an unclipped t: below 0 or above 1, where merging clips it; empty for nothing."""
    return "negative" if ratio < 0 else "above 1" if ratio > 1 else ""


def _ledger(geometry: Geometry) -> Claim:
    flags = [flag_of(ratio) for ratio in shell.ratio(geometry.stack()).tolist()]
    left_out = list(geometry.left_out.values())
    unchanged = sum(reason.startswith("unchanged") for reason in left_out)
    return Claim(
        key="ledger",
        artefact=None,
        title="tensors where the formula has no use",
        rule=f"merging clips t of {len(geometry.seeds)} below 0 or above 1; what a seed did not change has no "
        "angle, nor has one value",
        verdict="measured",
        quantities=(
            Quantity(name="negative t", value=flags.count("negative"), unit=f"of {len(flags)}"),
            Quantity(name="t above 1", value=flags.count("above 1"), unit=f"of {len(flags)}"),
            Quantity(name="unchanged", value=unchanged, unit=f"of {len(geometry.grams)}"),
            Quantity(name="of one value", value=len(left_out) - unchanged, unit=f"of {len(geometry.grams)}"),
        ),
    )
