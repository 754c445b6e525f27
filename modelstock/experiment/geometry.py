"""The geometry of weights in the experiment: every claim with what was measured of it, as files for the report."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from modelstock.comparison.text import worded
from modelstock.errors import WeightsError
from modelstock.experiment.paths import GEOMETRY_SECTION
from modelstock.files import atomic_path, dump_json
from modelstock.geometry import accuracy_claims, questions
from modelstock.geometry.accuracy import Scored
from modelstock.geometry.accuracy_figures import Picture, accuracy_figures, alpha_figure, plane_figure, ray_figure
from modelstock.geometry.claims import Claim, claims_table
from modelstock.geometry.measure import Geometry
from modelstock.geometry.page import draw, geometry_json, page, tensors_csv
from modelstock.geometry.points import AVERAGED, points
from modelstock.geometry.space import Distance, Space
from modelstock.geometry.tables import tensor_rows
from modelstock.geometry.weight_claims import weight_claims
from modelstock.merging.methods.table import METHODS
from modelstock.params import GeometryParams
from modelstock.scoring.results import Scores
from modelstock.weights.checkpoints import open_safetensors

PREFIX = "geometry-"  # of pictures, which lie beside the report's
SHOWN = ("distance.png", "sizes.png", "plane.png")  # in the report's section; the page has all
WITHOUT_DISTANCE = ("ray", "plane", "noise", "pool")


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was measured. `distances`: from the centre, by row; `pictures`: by file; `modality`: of the data."""

    claims: Sequence[Claim]
    distances: Mapping[str, Distance | str]
    pictures: Mapping[str, Picture]
    modality: str = "image"


def row_distances(scores: Scores, space: Space, files: Mapping[str, Path]) -> dict[str, Distance | str]:
    """Distances of the anchor, the seeds and their merges. `files`: identity -> file."""
    return {
        row.name: space.distance(open_safetensors(files[row.identity], keep_open=False), row.members)
        for row in scores.rows
        if row.kind in ("anchor", "seed", *METHODS)
    }


def point_distances(scores: Scores, space: Space, params: GeometryParams) -> dict[str, Distance | str]:
    """Distances of the points that are not of the centre's own seeds, made again from the weights.

    Raises:
        WeightsError: other weights than those that were scored.
    """
    identities = {row.name: row.options.get(AVERAGED, row.identity) for row in scores.rows}
    distances = {}
    for point in points(space, params):
        if point.kind in WITHOUT_DISTANCE:
            continue
        if point.checkpoint.identity != identities.get(point.name):
            raise WeightsError(
                f"point {point.name}",
                got="other weights than those that were scored",
                expected="the same",
                cure="run the stage points for every benchmark again",
            )
        of_centre = point.kind == "centre"
        distances[point.name] = (
            space.distance_of_centre() if of_centre else space.distance(point.checkpoint, point.members)
        )
    return distances


def judge(
    compared: Sequence[Scores],
    scored_points: Sequence[Scores],
    space: Space,
    params: GeometryParams,
    *,
    files: Mapping[str, Path],
    champions: Mapping[str, str],
) -> Findings:
    """Every claim about accuracy that there are rows to judge by.

    `compared`: the comparison's results; `scored_points`: those of the points, none where none were asked for, and
    then the comparison's rows are judged. `files`: identity -> file of the comparison's weight sets.
    `champions`: rule -> the row that it chooses.
    """
    rows = Scored(compared, draws=params.draws, seed=params.seed)
    if scored_points:
        scored = Scored(scored_points, draws=params.draws, seed=params.seed)
        distances = point_distances(scored_points[0], space, params)
    else:
        scored, distances = rows, row_distances(compared[0], space, files)
    marks = _Marks(space, scored)
    found = [
        accuracy_claims.lens(scored),
        accuracy_claims.closer_is_better(scored, distances),
        accuracy_claims.centre_beats_seeds(scored),
        accuracy_claims.plane_peak(scored, marks.projection, marks.plane_gram),
        accuracy_claims.noise_like_seeds(scored),
        accuracy_claims.best_alpha_is_cosine(scored, marks.cosines),
        accuracy_claims.more_seeds_add_little(scored),
        accuracy_claims.tensors_are_the_unit(scored),
        accuracy_claims.periodic_beats_post_hoc(rows),
        questions.cost(rows),
        questions.formula_costs_little(scored),
        questions.s_curve(scored, marks.stock, marks.slerp),
        questions.selection_regret(rows, champions),
        questions.failure_map(scored),
        questions.pools_against_two(scored),
    ]
    claims = [claim for claim in found if claim]
    pictures = {
        **accuracy_figures(scored, distances, claims),
        **plane_figure(scored, marks.plane_gram, marks.projection, next(iter(marks.stock.values()), 0.0)),
        **ray_figure(scored, marks.stock, marks.slerp),
        **alpha_figure(scored, marks.cosines),
    }
    return Findings(claims=claims, distances=distances, pictures=pictures, modality=compared[0].modality)


class _Marks:
    """What claims and figures mark, from the weights."""

    def __init__(self, space: Space, scored: Scored) -> None:
        seeds = list(space.seeds)
        self.plane_gram = space.gram(seeds[:2])
        planes = bool(scored.places("plane")) and bool(space.set_aside)
        self.projection = space.plane_projection(seeds[0], seeds[1]) if planes else None
        pairs = dict.fromkeys([tuple(seeds[:2]), *(scored.rows[place].members for place in scored.places("ray"))])
        self.stock = {pair: space.stock_scale(pair) for pair in pairs}
        self.slerp = {pair: space.slerp_scale(pair) for pair in pairs}
        between = {pair: space.cosine(pair) for pair in combinations(seeds, 2)}
        self.cosines = {
            seed: float(np.mean([cosine for pair, cosine in between.items() if seed in pair])) for seed in seeds
        }


def section(findings: Findings) -> str:
    """What the report shows of it: what accuracy has decided."""
    parts = [
        "## Geometry",
        "Where the weight sets lie, and whether that says how accurate they are; a verdict is by the 95 % interval "
        "alone. `geometry.md`, beside this report, has the claims that weights alone decide and every picture; "
        "`geometry.json` and `accuracy.json` have every number.",
        claims_table(findings.claims),
        *(f"![{findings.pictures[name][0]}]({PREFIX}{name})" for name in SHOWN if name in findings.pictures),
    ]
    return "\n\n".join(parts) + "\n"


def accuracy_part(findings: Findings) -> str:
    """The part of the page about accuracy: figures, which the page of the weights does not have."""
    parts = [
        "## Accuracy",
        "Distances are in units of the mean norm of a seed's update; lines and points are single weight sets unless a "
        "picture says otherwise.",
        *(f"![{title}]({PREFIX}{name})\n\n{title}" for name, (title, _) in findings.pictures.items()),
    ]
    return "\n\n".join(parts) + "\n"


def write_findings(
    findings: Findings,
    measured: Geometry,
    folder: Path,
    *,
    steps: Mapping[int, Geometry] | None = None,
    settings: Mapping[str, Geometry] | None = None,
) -> None:
    """Write what weights alone and what accuracies say to `folder`, and the report's section.

    geometry.json and tensors.csv as `modelstock geometry` writes them, with the claims about accuracy too;
    accuracy.json: distances and what the pictures show; geometry.md, the pictures.
    """
    claims = sorted(
        [*weight_claims(measured, steps, settings), *findings.claims], key=lambda claim: claim.artefact or 99
    )
    of_weights = {f"{PREFIX}{name}": picture for name, picture in draw(measured, steps).items()}
    pictures = of_weights | {f"{PREFIX}{name}": picture for name, picture in findings.pictures.items()}
    written = geometry_json(measured, claims, steps)
    distances = {
        name: distance if isinstance(distance, str) else asdict(distance)
        for name, distance in findings.distances.items()
    }
    titles = {name: title for name, (title, _) in pictures.items()}
    contents = {
        "geometry.json": dump_json(written).encode(),
        "tensors.csv": tensors_csv(tensor_rows(measured)).encode(),
        "geometry.md": worded(
            f"{page(written, claims, of_weights)}\n{accuracy_part(findings)}", findings.modality
        ).encode(),
        "accuracy.json": dump_json({"distances": distances, "pictures": titles}).encode(),
        GEOMETRY_SECTION: worded(section(findings), findings.modality).encode(),
        **{name: picture for name, (_, picture) in pictures.items()},
    }
    for name, content in contents.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
