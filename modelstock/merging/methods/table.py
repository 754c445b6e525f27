"""The merge methods, one row each: adding one is a function and a row here, and nothing elsewhere."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from modelstock.errors import MergeError, nearest
from modelstock.merging.methods import search, span, sparse, spectral, weighted
from modelstock.merging.methods.model_stock import OPTIONS, model_stock
from modelstock.merging.methods.normal_equations import normal_equations
from modelstock.merging.methods.rows import Choice, Method, Of, Option, Style

SCALE = Choice(option="scale", name="scales", low=0, high=10, values=(0.4, 0.6, 0.8, 1.0, 1.2))
TENTHS = tuple(step / 10 for step in range(1, 10))
ALPHA = Choice(option="alpha", name="alphas", low=0, high=1, open_end=True, values=TENTHS, curve=True)

AROUND_ONE = Choice(option="scale", name="scales", low=0, high=10, values=(0.6, 0.8, 1.0, 1.2, 1.4, 1.6))

SPACES: tuple[tuple[str, Of], ...] = (("", "updates"), ("_weights", "weights"))

DENSITY = Option(name="density", default=0.2, about="share of the values that is kept", low=0, high=1)
DROP = Option(name="drop", default=0.9, about="chance of a value to be dropped", low=0, high=1, open_end=True)
CRUMBS = (
    Option(name="density", default=0.844, about="share of the values that is kept", low=0, high=1),
    Option(name="outliers", default=0.006, about="share of the largest values that is dropped", low=0, high=1),
)
DELLA = (
    Option(name="drop", default=0.3, about="mean chance of a value to be dropped", low=0, high=1, open_end=True),
    Option(name="window", default=0.14, about="how far that chance goes with the magnitude", low=0, high=1),
)
AT = Option(name="at", default=0.5, about="0 gives the first checkpoint, 1 the second", low=0, high=1)
TURN = Option(name="weights", default=(1, 1), about="shares of the two checkpoints", low=0, per_checkpoint=True)
KARCHER = (
    Option(name="iterations", default=100, about="steps at most", low=1, high=10**6, whole=True),
    Option(name="tolerance", default=1e-12, about="length of a step that ends it", low=0, high=1),
)
HIGH = Option(name="high", default=1.5, about="the largest scale tried", low=0, high=10)

TIES = "Yadav et al., TIES-Merging, arXiv 2306.01708"
DARE = "Yu et al., DARE, arXiv 2311.03099"
BREADCRUMBS = "Davari, Belilovsky, Model Breadcrumbs, arXiv 2312.06795"
DELLA_SOURCE = "Deep et al., DELLA, arXiv 2406.11617"
SOUPS = "Wortsman et al., arXiv 2203.05482"
VOTES = ", signs by one vote each"


def _sparse(
    name: str,
    *,
    parts: sparse.Sparse,
    source: str,
    options: tuple[Option, ...],
    marker: str = "v",
    elsewhere: Mapping[str, str] = MappingProxyType({}),
) -> Method:
    """A row of a method that thins and then agrees."""
    thin, agree = parts.sparsify.__name__, parts.consensus.__name__
    return Method(
        name=name,
        function=parts,
        kind="values",
        formula=f"w0 + scale * {agree}({thin}(v_i))",
        source=source,
        own_options=options,
        chooses=SCALE,
        style=Style(marker, "tab:brown"),
        elsewhere=elsewhere,
    )


ROWS = (
    Method(
        name="model_stock",
        function=model_stock,
        kind="span",
        formula="w0 + t * mean(v_i), t = N cos / (1 + (N - 1) cos)",
        source="Jang, Yun, Han, arXiv 2403.19522, eq. 3",
        own_options=OPTIONS,
        least=2,
        granular=True,
        batched=True,
        standard=True,
        sets="ring",
        style=Style("D", "tab:red", highlight=True),
        title="Model Stock",
        elsewhere={"mergekit": "model_stock", "fusion_bench": "model_stock; adds 1e-8 to the norms' product"},
    ),
    Method(
        name="tuned_stock",
        function=model_stock,
        kind="span",
        formula="w0 + scale * t * mean(v_i), t as model_stock; scale is what an experiment chooses",
        source="Jang, Yun, Han, arXiv 2403.19522, eq. 3, with one factor for all tensors",
        own_options=OPTIONS,
        least=2,
        granular=True,
        batched=True,
        chooses=AROUND_ONE,
        sets="ring",
        style=Style("d", "tab:red"),
        title="Model Stock, tuned",
    ),
    Method(
        name="normal_equations",
        function=normal_equations,
        kind="span",
        formula="w0 + sum_i l_i v_i, G l = b, G_ij = <v_i, v_j>, b_j the mean of G_ij over the others i",
        source="least squares; equal norms and angles give Model Stock",
        own_options=(
            Option(name="clip", default="unit", about="l_i >= 0 and their sum <= 1, or not", choices=("unit", "none")),
        ),
        least=2,
        granular=True,
        batched=True,
        sets="ring",
        style=Style("D", "tab:purple"),
        title="normal equations",
    ),
    Method(
        name="uniform",
        function=span.uniform,
        kind="span",
        formula="w0 + mean(v_i)",
        source=SOUPS,
        batched=True,
        ignores_angles=True,
        standard=True,
        sets="ring",
        style=Style("s", "tab:blue", highlight=True),
        title="uniform soup",
        elsewhere={"mergekit": "linear", "fusion_bench": "simple_average"},
    ),
    Method(
        name="weighted",
        function=span.weighted,
        kind="span",
        formula="w0 + sum_i a_i v_i / sum_i a_i",
        source=f"{SOUPS}, learned soup",
        batched=True,
        ignores_angles=True,
        own_options=(Option(name="weights", default=(), about="a_i, in the checkpoints' order", per_checkpoint=True),),
        ordered=True,
        elsewhere={"mergekit": "linear, with weights", "fusion_bench": "weighted_average"},
    ),
    Method(
        name="wise_ft",
        function=span.wise_ft,
        kind="span",
        formula="w0 + alpha * mean(v_i)",
        source="Wortsman et al., arXiv 2109.01903",
        batched=True,
        ignores_angles=True,
        own_options=(Option(name="alpha", default=0.5, about="share of the mean update", low=0, high=1),),
        chooses=ALPHA,
        standard=True,
        sets="ring",
        style=Style("o", "tab:orange"),
        title="WiSE-FT",
    ),
    Method(
        name="task_arithmetic",
        function=span.task_arithmetic,
        kind="span",
        formula="w0 + scale * sum(v_i)",
        source="Ilharco et al., arXiv 2212.04089",
        batched=True,
        ignores_angles=True,
        scale=0.3,
        chooses=SCALE,
        elsewhere={"mergekit": "task_arithmetic", "fusion_bench": "task_arithmetic"},
    ),
    Method(
        name="lines",
        function=span.lines,
        kind="span",
        formula="w0 + scale * (alpha + (1 - alpha) * depth) * mean(v_i), depth from 0 (input) to 1 (output)",
        source="Wang et al., LiNeS, arXiv 2410.17146, eq. 3, on the uniform soup",
        own_options=(Option(name="alpha", default=0.5, about="scale of the first block", low=0, high=1),),
        ignores_angles=True,
        needs="depth",
        chooses=SCALE,
        style=Style("<", "tab:cyan"),
    ),
    *(
        Method(
            name=f"slerp{suffix}",
            function=span.slerp,
            kind="span",
            formula="w0 + scale * the first update turned toward the second, its length in a line",
            source="Shoemake, SIGGRAPH 1985, on the " + ("updates' directions" if of == "updates" else "weights"),
            own_options=(AT,),
            least=2,
            most=2,
            ordered=True,
            of=of,
            granular=True,
            chooses=SCALE,
        )
        for suffix, of in SPACES
    ),
    *(
        Method(
            name=f"nuslerp{suffix}",
            function=span.nuslerp,
            kind="span",
            formula="w0 + scale * (sin((1-t) a) v_1 + sin(t a) v_2) / sin(a), a the angle between them",
            source="mergekit's nuslerp" + (", on the weights" if of == "weights" else ""),
            own_options=(TURN,),
            least=2,
            most=2,
            ordered=True,
            of=of,
            granular=True,
            chooses=SCALE,
            elsewhere={"mergekit": "nuslerp" if of == "updates" else "slerp"},
        )
        for suffix, of in SPACES
    ),
    *(
        Method(
            name=f"karcher{suffix}",
            function=span.karcher,
            kind="span",
            formula="w0 + scale * the sphere's point of least squared angles to the updates, times their mean norm",
            source="Karcher, Comm. Pure Appl. Math. 30 (1977)" + (", on the weights" if of == "weights" else ""),
            own_options=KARCHER,
            of=of,
            granular=True,
            chooses=SCALE,
            style=Style(">", "tab:cyan"),
            elsewhere={"mergekit": "karcher"} if of == "weights" else {},
        )
        for suffix, of in SPACES
    ),
    _sparse(
        "ties",
        parts=sparse.TIES,
        source=TIES,
        options=(DENSITY,),
        elsewhere={"mergekit": "ties; keeps floor(density * n) values, ours round(density * n), at least one"},
    ),
    _sparse("ties_votes", parts=sparse.TIES_VOTES, source=TIES + VOTES, options=(DENSITY,)),
    _sparse("magnitude", parts=sparse.MAGNITUDE, source=TIES + " (its first step)", options=(DENSITY,)),
    _sparse("dare_linear", parts=sparse.DARE_LINEAR, source=DARE, options=(DROP,), marker="<"),
    _sparse("dare_ties", parts=sparse.DARE_TIES, source=DARE, options=(DROP,), marker=">"),
    _sparse("dare_votes", parts=sparse.DARE_VOTES, source=DARE + VOTES, options=(DROP,), marker=">"),
    _sparse("breadcrumbs", parts=sparse.BREADCRUMBS, source=BREADCRUMBS, options=CRUMBS, marker="d"),
    _sparse("breadcrumbs_ties", parts=sparse.BREADCRUMBS_TIES, source=BREADCRUMBS, options=CRUMBS, marker="d"),
    _sparse("della", parts=sparse.DELLA, source=DELLA_SOURCE, options=DELLA, marker="h"),
    _sparse("della_linear", parts=sparse.DELLA_LINEAR, source=DELLA_SOURCE, options=DELLA, marker="h"),
    Method(
        name="fisher",
        function=weighted.fisher,
        kind="values",
        formula="w0 + scale * sum(F_i v_i) / sum(F_i)",
        source="Matena, Raffel, arXiv 2111.09832",
        needs="fisher",
        chooses=SCALE,
        style=Style("p", "tab:olive"),
        elsewhere={"fusion_bench": "fisher_merging"},
    ),
    Method(
        name="regmean",
        function=weighted.regmean,
        kind="values",
        formula="w0 + scale * sum(v_i G_i) sum(G_i)^-1 for linear layers, the plain mean for everything else",
        source="Jin et al., arXiv 2212.09849, eq. 3",
        own_options=(Option(name="alpha", default=0.9, about="factor of the off-diagonals", low=0, high=1),),
        needs="inner",
        chooses=SCALE,
        style=Style("H", "tab:olive"),
        elsewhere={"fusion_bench": "regmean"},
    ),
    Method(
        name="monosoup",
        function=spectral.monosoup,
        kind="values",
        formula="w0 + (1 - low) * v_high + low * v_low, v_high the leading singular directions of a matrix's update",
        source="Abdollahpoorrostam et al., MonoSoup, arXiv 2602.09689, by its authors' code",
        own_options=(
            Option(name="rank", default="effective", about="of v_high", choices=("effective", "energy")),
            Option(name="energy", default=0.8, about="v_high's share of the squares, with rank energy", low=0, high=1),
        ),
        most=1,
        sets="single",
        style=Style("*", "tab:blue"),
        title="MonoSoup",
        elsewhere={"the authors' MonoSoup.py": "freevariance and variance; float32"},
    ),
    Method(
        name="recalibrated",
        function=span.uniform,
        kind="span",
        formula="w0 + v_1, the checkpoint itself: what estimating BatchNorm's running statistics again changes alone",
        source="the comparison that tells a merge's effect from that of its new statistics",
        most=1,
        batched=True,
        ignores_angles=True,
        recalibrates=True,
        sets="single",
        style=Style("p", "tab:gray"),
        title="seed, recalibrated",
    ),
    Method(
        name="greedy",
        function=search.greedy,
        kind="search",
        formula="w0 + scale * mean of the v_i in the soup: best first, each kept if the mean gets strictly better",
        source=f"{SOUPS}, recipe 1",
        needs="score",
        selects=True,
        standard=True,
        sets="all",
        style=Style("^", "tab:green"),
    ),
    Method(
        name="oracle_scale",
        function=search.oracle_scale,
        kind="search",
        formula="w0 + s * mean(v_i), s the best of `steps` + 1 values from `low` to `high`",
        source="Wortsman et al., arXiv 2109.01903, with alpha beyond 1",
        own_options=(
            Option(name="low", default=0.0, about="the smallest scale tried", low=0, high=10),
            HIGH,
            Option(name="steps", default=30, about="steps from the one to the other", low=1, high=10**6, whole=True),
        ),
        needs="score",
        style=Style("x", "black"),
    ),
    Method(
        name="oracle_scales",
        function=search.oracle_scales,
        kind="search",
        formula="w0 + s_k * mean(v_i), one s_k from 0 to `high` per tensor k, by L-BFGS on the held-out loss",
        source=f"{SOUPS}, learned soup, per tensor",
        own_options=(
            Option(name="high", default=2.0, about="the largest scale", low=0, high=10),
            Option(name="iterations", default=20, about="of L-BFGS at most", low=1, high=10**6, whole=True),
        ),
        needs="gradient",
        style=Style("X", "black"),
    ),
)
METHODS: dict[str, Method] = {row.name: row for row in ROWS}


def find_method(name: str, options: Mapping[str, Any], count: int | None = None) -> Method:
    """The row of that name, once every option is known to exist and to have a value that it takes.

    `count`: of checkpoints, where that is known.

    Raises:
        MergeError: unknown method or option, with the nearest valid one; a value of another type or out of range.
    """
    if name not in METHODS:
        raise MergeError("method", got=repr(name), expected=", ".join(METHODS), cure=nearest(name, list(METHODS)))
    row = METHODS[name]
    for option, value in options.items():
        place = f"method {name}, option {option}"
        if option not in row.options:
            known = list(row.options)
            raise MergeError(place, got="no such option", expected=", ".join(known), cure=nearest(option, known))
        if not row.options[option].takes(value, count):
            raise MergeError(place, got=repr(value), expected=row.options[option].expected, cure="correct the option")
    for declared in row.own_options if count is not None else ():
        value = options.get(declared.name, declared.default)
        if declared.per_checkpoint and not declared.takes(value, count):
            raise MergeError(
                f"method {name}, option {declared.name}",
                got=repr(value),
                expected=declared.expected,
                cure="give one number for each checkpoint, in their order",
            )
    return row
