"""What happens at a periodic merge, one row per rule: adding one is a row here, and nothing elsewhere.

Merge methods are of weight sets on disk; a rule is of models in training, which go on from what it gives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from modelstock.merging.methods.blend import Blend, Float
from modelstock.merging.methods.model_stock import OPTIONS, model_stock
from modelstock.merging.methods.rows import Option
from modelstock.merging.methods.span import karcher, nuslerp, uniform


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule: w0 + sum_i c_i v_i with v_i = w_i - w0, its coefficients from the updates' inner products.

    `function`: of the inner products (N, N) of one tensor and of the options, without the next two. `kept`: the option
    that is the share of its own weights that each model keeps, the rest being the merge's; after the last merge no
    model keeps any. `toward`: the option that says what w0 is, "anchor" or "last": the merge before, at first the
    anchor. Without these, models keep nothing, and w0 is the anchor.
    """

    name: str
    function: Callable[..., Blend]
    formula: str
    source: str
    options: tuple[Option, ...] = ()
    kept: str = ""
    toward: str = ""

    def blend(self, gram: Float, options: Mapping[str, Any]) -> Blend:
        """The coefficients (N,) of one tensor's updates, from their inner products (N, N)."""
        return self.function(gram, **{n: value for n, value in options.items() if n not in (self.kept, self.toward)})


def warp(gram: Float, *, pull: float = 0.5) -> Blend:
    """w0 + pull * slerp(v_i): spherical interpolation of the updates, then linear interpolation toward w0.

    slerp: of two updates, halfway, each with its own length, as `nuslerp`; of more, their Karcher mean, which depends
    on no order (the authors' way for more than two: unverified).
    """
    turned = nuslerp(gram) if len(gram) == 2 else karcher(gram)
    return Blend(pull * turned.coefficients, turned.facts)


ROWS = (
    Rule(
        name="model_stock",
        function=model_stock,
        formula="w0 + t * mean(v_i), t = N cos / (1 + (N - 1) cos)",
        source="Jang, Yun, Han, arXiv 2403.19522, eq. 3 and its periodic merging",
        options=OPTIONS,
    ),
    Rule(
        name="uniform",
        function=uniform,
        formula="mean(w_i)",
        source="the control: the average without a ratio, as in local SGD (Stich, arXiv 1805.09767)",
    ),
    # The authors fine-tune by reinforcement learning; the moving average that is the anchor of its KL term has no
    # counterpart here. Each of their iterations is a whole fine-tuning with its own schedule, ours a part of one.
    Rule(
        name="warp",
        function=warp,
        formula="(1 - pull) * w0 + pull * slerp(w_i), w0 the anchor, or the merge before",
        source="Ramé et al., WARP, arXiv 2406.16768, where w0 is the merge before; its default pull: unverified",
        options=(
            Option(name="pull", default=0.5, about="0 gives w0, 1 the merge; the authors' eta", low=0, high=1),
            Option(name="toward", default="last", about="what w0 is", choices=("anchor", "last")),
        ),
        toward="toward",
    ),
    # The authors' populations also differ in mixup and label smoothing, and need not share a start; neither is so here.
    # In their code alpha is the same at every learning rate; the paper speaks of adjusting it (unverified).
    Rule(
        name="papa",
        function=uniform,
        formula="w_i <- alpha * w_i + (1 - alpha) * mean(w), and mean(w) at the end",
        source="Jolicoeur-Martineau et al., PAPA, arXiv 2304.03094, its gradual variant: 0.99, every 10 steps",
        options=(Option(name="alpha", default=0.99, about="what a model keeps of itself at a merge", low=0, high=1),),
        kept="alpha",
    ),
)
RULES: dict[str, Rule] = {row.name: row for row in ROWS}
