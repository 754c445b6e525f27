"""A claim about where fine-tuned weights lie, with what was measured of it: the same for weights and for accuracy."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["holds", "does not hold", "undecided", "measured", "not enough seeds"]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number of a claim. `low`, `high`: its 95 % interval, where it has one, `over` which (seeds, images, tensors).

    `value` None: there are too few seeds, and `text` says how many of how many; with a value it says what of it is not
    there, such as the interval.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    over: str = ""
    unit: str = ""
    text: str = ""

    def shown(self, digits: int = 3) -> str:
        """As pages show it."""
        if self.value is None:
            return self.text
        interval = "" if self.low is None else f" [{self.low:.{digits}g}, {self.high:.{digits}g}]"
        text = f" ({self.text})" if self.text else ""
        return f"{self.value:.{digits}g}{self.unit and ' ' + self.unit}{interval}{text}"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim. `artefact`: its number in docs/geometry.md; `rule`: in words, when it holds, thresholds included.

    `verdict`: "measured" for a question that has a number but no yes or no; "undecided" where the interval allows both.
    """

    key: str
    artefact: int | None
    title: str
    rule: str
    verdict: Verdict
    quantities: tuple[Quantity, ...] = ()
    remark: str = ""  # what a reader must know, such as too few seeds, or an assumption that does not hold here

    def as_json(self) -> dict[str, Any]:
        """For geometry.json."""
        return asdict(self)


def not_enough(have: int, need: int) -> str:
    """What stands in place of a number that too few seeds would give."""
    return f"not enough seeds ({have} of {need})"


def decided(*, low: float, high: float, bound: float, below: bool) -> Verdict:
    """Whether a quantity lies below `bound`, or above it, by its interval."""
    if not below:
        low, high, bound = -high, -low, -bound
    if high <= bound:
        return "holds"
    return "does not hold" if low > bound else "undecided"


def claims_table(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table: number, claim, verdict, numbers."""
    head = ["| # | claim | verdict | measured |", "|---|---|---|---|"]
    body = []
    for claim in claims:
        numbers = "<br>".join(f"{quantity.name}: {quantity.shown()}" for quantity in claim.quantities)
        verdict = f"**{claim.verdict}**" if claim.verdict in ("holds", "does not hold") else claim.verdict
        remark = f"<br>*{claim.remark}*" if claim.remark else ""
        body.append(f"| {claim.artefact or ''} | {claim.title}: {claim.rule} | {verdict} | {numbers}{remark} |")
    return "\n".join(head + body)
