"""What a row of the table of methods declares: the method, its options, and everything others ask about it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Needs = Literal["", "depth", "fisher", "inner", "score", "gradient"]
Of = Literal["updates", "weights"]
Sets = Literal["ring", "pairs", "brief", "all", "single"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: its default, and which values it takes.

    One of `choices`; else a number from `low` to `high` (below `high` where `open_end`, whole where `whole`); with
    `per_checkpoint`, one such number for each checkpoint, whose sum is not 0.
    """

    name: str
    default: Any
    about: str
    low: float = -math.inf
    high: float = math.inf
    open_end: bool = False
    whole: bool = False
    choices: tuple[str, ...] = ()
    per_checkpoint: bool = False

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return " or ".join(self.choices)
        number = "whole number" if self.whole else "number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            number += f" from {self.low:g} to {'below ' * self.open_end}{self.high:g}"
        elif math.isfinite(self.low):
            number += f" from {self.low:g} up"
        return f"a {number}" + " for each checkpoint, their sum not 0" * self.per_checkpoint

    def takes(self, value: Any, count: int | None = None) -> bool:
        """Whether a value is one that it takes; `count`: of checkpoints, where that is known."""
        if self.choices:
            return value in self.choices
        if self.per_checkpoint:
            numbers = isinstance(value, list | tuple) and all(self._is_number(number) for number in value)
            return numbers and (count is None or (len(value) == count and sum(value) != 0))
        return self._is_number(value)

    def _is_number(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        below = value < self.high if self.open_end else value <= self.high
        return math.isfinite(value) and self.low <= value and below


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What an experiment chooses for a method on the held-out split: `option`, from the list `name` of its section.

    Every value lies above `low` and at most at `high` (below it where `open_end`). `values`: the list where none is
    given. `curve`: the whole curve over the list is kept for all seeds together, and drawn.
    """

    option: str
    name: str
    low: float
    high: float
    values: tuple[float, ...]
    open_end: bool = False
    curve: bool = False


@dataclass(frozen=True)
class Style:
    """How a kind of row looks in figures: matplotlib's marker and colour; `highlight`: in the short figure too."""

    marker: str
    colour: str
    highlight: bool = False


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row of the table.

    `kind`: what `function` takes and gives, see modelstock.merging.methods. `formula`: of the result, w0 the anchor
    and v_i the updates. `least`, `most`: fine-tuned checkpoints. `ordered`: their order has a meaning. `scale`: of the
    update, unless another is asked for. `needs`: what it reads besides the weights. `of`: with "weights", w0 counts as
    zero. `granular`: one set of coefficients per filter or for the whole model makes sense. `batched`: a function in
    the span that takes the inner products of many rows at once too, (rows, N, N). `ignores_angles`: one that does not
    look at those of two different updates, which then need not be exact. `selects`: it may leave checkpoints out, and
    its rows are named for those that it takes. `standard`: it is compared where no methods are named; `sets`: which
    seeds then merge together, see modelstock.experiment.subsets. `elsewhere`: library -> its name there, and the
    difference if there is one. `recalibrates`: it only makes sense where BatchNorm's running statistics are estimated
    again afterwards.
    """

    name: str
    function: Callable[..., Any]
    kind: Literal["span", "values", "search"]
    formula: str
    source: str
    own_options: tuple[Option, ...] = ()
    least: int = 1
    most: int | None = None
    ordered: bool = False
    scale: float = 1.0
    needs: Needs = ""
    of: Of = "updates"
    granular: bool = False
    batched: bool = False
    ignores_angles: bool = False
    selects: bool = False
    recalibrates: bool = False
    chooses: Choice | None = None
    standard: bool = False
    sets: Sets = "brief"
    style: Style = Style("v", "tab:brown")
    title: str = ""  # in figures and headings; the name, where it is empty
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    @property
    def options(self) -> Mapping[str, Option]:
        """Option by name; every method has `scale`."""
        scale = Option(name="scale", default=self.scale, about="of the whole update")
        return {option.name: option for option in (*self.own_options, scale)}

    @property
    def defaults(self) -> dict[str, Any]:
        """Option -> default."""
        return {name: option.default for name, option in self.options.items()}

    @property
    def reads_angles(self) -> bool:
        """Whether it looks at the inner products of two different updates."""
        return self.kind == "span" and not self.ignores_angles

    @property
    def reads_statistics(self) -> bool:
        """Whether it weighs by statistics of the data, one set for each checkpoint."""
        return self.needs in ("fisher", "inner")

    @property
    def reads_examples(self) -> bool:
        """Whether an experiment says on how many examples something is measured for it."""
        return self.reads_statistics or self.needs == "gradient"
