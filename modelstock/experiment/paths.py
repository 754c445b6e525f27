"""Where an experiment's files are, below the folders that stages are given."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from modelstock.damage import cure_of
from modelstock.errors import MergeError, WeightsError, few
from modelstock.notices import notice
from modelstock.params import FinetuneParams, Params
from modelstock.scoring.results import Scores
from modelstock.weights.weight_set import WeightSet, load_weights

POINTS = "points"  # in the folder of results
GEOMETRY_SECTION = "section.md"  # of the report, in the folder of the geometry
SCORES = Path("scratch/scores")  # outcomes, whole or so far; see modelstock.scoring.score_cache


def anchor_file(models: Path) -> Path:
    """The anchor."""
    return models / "anchor.safetensors"


def variant_file(models: Path, name: str) -> Path:
    """The final weights of a variant."""
    return models / "variants" / name / "weights.safetensors"


def finetuned_folder(models: Path) -> Path:
    """The seeds' folders."""
    return models / "finetuned"


def centre_folder(models: Path) -> Path:
    """The folders of the seeds that are set aside for the centre."""
    return models / "centre"


def seed_file(finetuned: Path, seed: int) -> Path:
    """The final weights of a seed."""
    return finetuned / str(seed) / "weights.safetensors"


def history_file(weights: Path) -> Path:
    """The history of the training that made a weight set; somebody's own checkpoint has none."""
    return weights.with_name("history.jsonl")


def average_files(finetuned: Path, recipe: FinetuneParams, seeds: Sequence[int]) -> list[Path]:
    """The averages and snapshots that a recipe keeps of each seed."""
    return [seed_file(finetuned, seed).with_name(name) for seed in seeds for name in _averages(recipe)]


def _averages(recipe: FinetuneParams) -> list[str]:
    names = [f"ema-{decay}" for decay in recipe.ema] + ["lawa"] * (recipe.lawa > 0)
    names += [f"epoch-{n}" for n in range(1, recipe.head_first_epochs + recipe.epochs) if recipe.snapshots]
    return [f"{name}.safetensors" for name in names]


def variant_files(models: Path, recipes: Mapping[str, FinetuneParams]) -> list[Path]:
    """The final weights of every variant, with the averages and snapshots that its recipe keeps."""
    return [
        variant_file(models, variant).with_name(name)
        for variant, recipe in recipes.items()
        for name in ("weights.safetensors", *_averages(recipe))
    ]


def snapshot_files(models: Path, params: Params) -> list[Path]:
    """The snapshots of the seeds; where they keep none, those of the first pool of the seeds' anchor that does."""
    runs = {"": average_files(finetuned_folder(models), params.finetune, params.seeds)}
    for name, variant in params.variants.items():
        if models.parent / variant.anchor == anchor_file(models):
            runs.setdefault(variant.pool, []).extend(variant_files(models, {name: params.recipe_of(name)}))
    snapshots = ([file for file in files if file.stem.startswith("epoch-")] for files in runs.values())
    return next((files for files in snapshots if files), [])


def periodic_files(models: Path, arms: Iterable[str], factors: Iterable[int]) -> list[Path]:
    """The periodic runs by arm, and the seeds that train `factors` times as long."""
    runs = [("periodic", arm) for arm in arms] + [("longer", str(factor)) for factor in factors]
    return [models / stage / name / "weights.safetensors" for stage, name in runs]


def merged_file(folder: Path, name: str) -> Path:
    """One merge in its method's folder."""
    return folder / f"{name}.safetensors"


def merged_files(models: Path, methods: Iterable[str]) -> list[Path]:
    """The merges that their methods' reports name, by method; other files beside them are none.

    Raises:
        MergeError: a method whose report is missing or damaged.
    """
    return [file for method in methods for file in _merges(models / "merged" / method)]


def _merges(folder: Path) -> list[Path]:
    report = folder / "report.json"
    try:
        names = list(dict(json.loads(report.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError) as error:
        cure = cure_of(report, f"dvc repro -s -f merge@{folder.name}")
        got, expected = f"{type(error).__name__}: {error}", "the merges' names and facts"
        raise MergeError(report, got=got, expected=expected, cure=cure) from error
    files = sorted(merged_file(folder, name) for name in names)
    for stray in sorted({*folder.glob("*.safetensors")} - {*files}):
        notice(stray, "not a merge that the report beside it names, and not compared")
    return files


def other_files(models: Path, params: Params) -> list[Path]:
    """Every weight set besides anchor and seeds: merges, averages, snapshots, variants, periodic and longer runs.

    Of somebody's own checkpoints there are no averages.
    """
    recipe = None if params.checkpoints else params.finetune
    averages = average_files(finetuned_folder(models), recipe, params.seeds) if recipe else []
    variants = variant_files(models, {name: params.recipe_of(name) for name in params.variants})
    others = variants + periodic_files(models, params.periodic, params.longer)
    return merged_files(models, params.merge.methods) + averages + others


def results_file(results: Path, benchmark: str) -> Path:
    """The results per example on one benchmark."""
    return results / f"{benchmark}.safetensors"


def points_file(results: Path, benchmark: str) -> Path:
    """The results per example of the points that test the geometry, on one benchmark."""
    return results / POINTS / f"{benchmark}.safetensors"


def load_seeds(finetuned: Path, seeds: Sequence[int], *, lazy: bool = False) -> Mapping[int, WeightSet]:
    """The seeds' weight sets by seed; folders of seeds that are not named are left alone."""
    return {seed: load_weights(seed_file(finetuned, seed), lazy=lazy) for seed in seeds}


def files_by_identity(results: Sequence[Scores], files: Sequence[Path]) -> dict[str, Path]:
    """Identity -> file, for every scored row that is a weight set; `files` that are not there count as none.

    Raises:
        WeightsError: no file has a row's weights.
    """
    # Where two files have the same tensors, as a greedy soup of one seed and the seed, the first counts.
    by_identity = {load_weights(file, lazy=True).identity: file for file in reversed(files) if file.exists()}
    missing = [row.name for row in results[0].rows if row.kind != "ensemble" and row.identity not in by_identity]
    if missing:
        raise WeightsError(
            "models",
            got=f"no file with the weights of {few(missing)}",
            expected="those that were scored",
            cure="run the stage evaluate for every benchmark again",
        )
    return by_identity
