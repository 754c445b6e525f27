"""Tests claims about where the seeds' weights lie and how accurate they are there, with figures, for the report."""

from pathlib import Path

from modelstock.comparison.choice import choose
from modelstock.experiment.geometry import judge, write_findings
from modelstock.experiment.left_over import remove_left_over, remove_left_over_models
from modelstock.experiment.paths import (
    POINTS,
    anchor_file,
    files_by_identity,
    finetuned_folder,
    other_files,
    points_file,
    results_file,
    seed_file,
    snapshot_files,
)
from modelstock.experiment.pools import load_pools, one_recipe
from modelstock.experiment.space import load_space
from modelstock.experiment.updates import distance
from modelstock.geometry.measure import measure
from modelstock.geometry.space import checkpoint_of
from modelstock.geometry.steps import measure_steps
from modelstock.params import ChampionParams, load_params
from modelstock.scoring.results import load_scores
from modelstock.weights.weight_set import load_weights
from stages import run


def main(results: Path, models: Path, out: Path) -> None:
    """RESULTS: results per example; MODELS: all weight sets; OUT: the folder of claims and figures."""
    params = load_params()
    remove_left_over_models(models, params)
    benchmarks, section = params.evaluate.benchmarks, params.geometry
    remove_left_over(results / POINTS, [points_file(results, name).name for name in section.benchmarks])
    compared = [load_scores(results_file(results, name)) for name in benchmarks]
    others = other_files(models, params)
    seeds = [seed_file(finetuned_folder(models), seed) for seed in params.seeds]
    space = load_space(models, params)
    identities = [checkpoint.identity for checkpoint in space.seeds.values()]
    files = files_by_identity(compared, [anchor_file(models), *seeds, *others])
    anchor, margin = load_weights(anchor_file(models), lazy=True), params.compare.champion.margin
    distances = {identity: distance(anchor, load_weights(file, lazy=True)) for identity, file in files.items()}
    rules = [ChampionParams(rule="nearest", margin=margin), ChampionParams(rule="best", margin=margin)]
    findings = judge(
        compared,
        [load_scores(points_file(results, name)) for name in section.benchmarks],
        space,
        section,
        files=files,
        champions={rule.rule: choose(compared, rule, distances).chosen for rule in rules},
    )
    measured = measure(
        space.anchor,
        list(space.seeds.values()),
        centre=list(space.set_aside.values()),
        labels=[f"seed-{seed}" for seed in (*space.seeds, *space.set_aside)],
    )
    snapshots = snapshot_files(models, params)
    steps = measure_steps(anchor_file(models), snapshots) if snapshots else None
    settings = {
        pool.name: measure(checkpoint_of(pool.anchor), [checkpoint_of(weights) for weights in pool.members.values()])
        for pool in load_pools(one_recipe(params.variants), models, seeds=identities)
    }
    write_findings(findings, measured, out, steps=steps, settings=settings)
    for claim in findings.claims:
        print(f"{claim.title}: {claim.verdict}")


if __name__ == "__main__":
    run(main)
