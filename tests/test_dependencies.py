"""What must run again when something changes, asked of DVC itself on a project whose stages are all up to date."""

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path

import networkx
import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from flows.graph import plan
from modelstock.provenance import files_of
from tests.support.settings import full_params

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:dvc")  # of a library that DVC uses
ROOT = Path(__file__).parent.parent
STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
FILES = {"centre": "finetune"}  # stages that do the work of another one's file
TRAINING = {"finetune", "centre", "variant", "periodic", "longer"}
BELOW = {"merge", "evaluate", "points", "geometry", "compare"}
EVERYTHING = {"prepare", "pretrain", "anchor", "anchors", *TRAINING, *BELOW}


# --- dvc.yaml against what the stages import


def code_of(name: str) -> set[str]:
    """The files that a stage's `deps` name, and those in the folders that they name, without the packages' faces."""
    deps = [d for d in STAGES[name].get("do", STAGES[name])["deps"] if d.startswith(("modelstock", "stages"))]
    files = {f for d in deps for f in ([ROOT / d] if (ROOT / d).is_file() else (ROOT / d).rglob("*.*"))}
    named = {f.relative_to(ROOT) for f in files}
    return {str(f) for f in named if "__pycache__" not in f.parts and f.name not in ("__init__.py", "py.typed")}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_the_code_that_computes_it_and_on_no_other(name):
    computes = {str(file.relative_to(ROOT)) for file in files_of(f"stages.{FILES.get(name, name)}")}
    missing, superfluous = sorted(computes - code_of(name)), sorted(code_of(name) - computes)
    assert not missing, f"dvc.yaml, deps of {name}: add {', '.join(missing)}"
    assert not superfluous, f"dvc.yaml, deps of {name}: drop {', '.join(superfluous)} (or the folder: name its files)"


@pytest.mark.parametrize("name", STAGES)
def test_what_a_stage_depends_on_exists(name):
    deps = [d for d in STAGES[name].get("do", STAGES[name])["deps"] if d.startswith(("modelstock", "stages"))]
    assert [d for d in deps if not (ROOT / d).exists()] == []


# --- the table


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project with a placeholder for every output, committed to DVC: nothing must run."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("modelstock", "stages"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    text = full_params()
    for nothing, some in (
        ("benchmarks: [] #", "benchmarks: [held-out, shapes] #"),
        ("centre: [] #", "centre: [20, 21] #"),
    ):
        assert nothing in text
        text = text.replace(nothing, some)
    (folder / "params.yaml").write_text(text)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    with chdir(folder), Repo() as repo:
        for output in [*repo.index.outs, *repo.index.deps]:
            path = Path(output.fs_path)
            file = path if path.suffix else path / "placeholder"
            if not path.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(str(path.relative_to(folder)))
        repo.commit(force=True)
        assert plan(folder, []).dirty == frozenset()
    return folder


@pytest.fixture(autouse=True)
def inside(request, monkeypatch):
    """DVC names stages as they are seen from the working directory."""
    if "project" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("project"))


def dirty(project: Path) -> set[str]:
    """The stages that must run, without their items: what changed, and all that depends on it."""
    return {name.partition("@")[0] for name in plan(project, []).dirty}


@contextmanager
def changed(project: Path, *files: str, edit: Callable[[str], str] = "{}\n# a change\n".format) -> Iterator[None]:
    """Some files edited, and as they were afterwards."""
    before = {project / file: (project / file).read_text() for file in files}
    for path, text in before.items():
        assert edit(text) != text
        path.write_text(edit(text))
    try:
        yield
    finally:
        for path, text in before.items():
            path.write_text(text)


TABLE = {
    "a merge method": (["modelstock/merging/methods/sparse.py"], BELOW, EVERYTHING - BELOW),
    "the method that periodic merging uses": (
        ["modelstock/merging/methods/model_stock.py"],
        {"periodic"} | BELOW,
        {"prepare", "pretrain", "finetune", "variant", "longer"},
    ),
    "the rules of periodic merging": (
        ["modelstock/merging/rules.py"],
        {"periodic", "evaluate"},
        TRAINING - {"periodic"},
    ),
    "a new merge method": (["modelstock/merging/methods/table.py"], BELOW, EVERYTHING - BELOW),
    "an error text, the command line, a tracker, files, params, progress, docs": (
        [
            "modelstock/errors.py",
            "modelstock/cli/__init__.py",
            "modelstock/tracking/mlflow/tracker.py",
            "modelstock/files.py",
            "modelstock/params.py",
            "modelstock/progress.py",
            "modelstock/provenance.py",
            "modelstock/training/__init__.py",
            "stages/__init__.py",
            "README.md",
        ],
        set(),
        EVERYTHING - {"compare"},
    ),
    "an export": (["modelstock/models/export.py"], set(), EVERYTHING),
    "the training loop": (["modelstock/training/loop.py"], TRAINING | BELOW, {"prepare"}),
    "the recipe": (["modelstock/training/recipe.py"], TRAINING | BELOW, {"prepare", "pretrain", "anchor"}),
    "periodic merging": (
        ["modelstock/training/periodic.py"],
        {"periodic", "evaluate"},
        {"finetune", "variant", "longer", "merge"},
    ),
    "how an image is decoded": (
        ["modelstock/data/images.py"],
        {"prepare", *TRAINING, "merge", "evaluate", "compare"},
        set(),
    ),
    "a layout of a published data set": (["modelstock/data/layouts.py"], {"prepare"}, {"pretrain"}),
    "scoring code": (["modelstock/scoring/one_pass.py"], BELOW, EVERYTHING - BELOW),
    "a point that is scored for the geometry": (
        ["modelstock/geometry/points.py"],
        {"points", "geometry", "compare"},
        EVERYTHING - {"points", "geometry", "compare"},
    ),
    "a claim about accuracy": (
        ["modelstock/geometry/accuracy_claims.py"],
        {"geometry", "compare"},
        EVERYTHING - {"geometry", "compare"},
    ),
    "published figures": (["modelstock/comparison/published.yaml"], {"compare"}, EVERYTHING - {"compare"}),
    "the report": (["modelstock/comparison/report.py"], {"compare"}, EVERYTHING - {"compare"}),
}


@pytest.mark.parametrize("change", TABLE)
def test_what_must_run_again_and_what_must_not(project, change):
    files, must, must_not = TABLE[change]
    with changed(project, *files):
        stages = dirty(project)
    assert must <= stages
    assert not stages & must_not


def test_a_changed_layout_retrains_nothing_if_the_shards_bytes_stay(project):
    with changed(project, "modelstock/data/layouts.py", "dvc.lock", edit="{}\n".format):
        with Repo() as repo:
            repo.commit("prepare", force=True)  # as after a run that wrote the same bytes
        assert dirty(project) == set()


@pytest.mark.parametrize(
    ("old", "new", "must"),
    [
        ("  in_memory: true", "  in_memory: false", set()),
        ("  workers: 2 # processes", "  workers: 3 # processes", set()),
        ("  experiment: modelstock", "  experiment: other", {"compare"}),
        ("  ties: {sets: brief, density: 0.2", "  ties: {sets: brief, density: 0.3", BELOW),
        ("  epochs: 12", "  epochs: 13", TRAINING | BELOW),
        ("  margin: 0.005", "  margin: 0.01", {"compare"}),
        ("  noise: 0", "  noise: 1", {"points", "geometry", "compare"}),
        ("threads: 2", "threads: 1", EVERYTHING),
    ],
)
def test_what_a_changed_setting_runs_again(project, old, new, must):
    with changed(project, "params.yaml", edit=lambda text: text.replace(old, new)):
        assert dirty(project) == {"check"} | must


def test_the_picture_in_the_docs_is_dvcs_graph_by_kind(project):
    needs = [(need, name) for name, needed in plan(project, []).needs.items() for need in needed]
    kinds = {(need.partition("@")[0], name.partition("@")[0]) for need, name in needs}
    graph = networkx.DiGraph((need, kind) for need, kind in kinds if need != kind)
    picture = re.findall(r"^  (\w+) --> (\w+)$", (ROOT / "docs/pipeline.md").read_text(), re.MULTILINE)
    assert set(picture) == set(networkx.transitive_reduction(graph).edges)
    assert set(graph) == set(STAGES)


def test_a_setting_of_one_method_merges_by_no_other_method_again(project):
    with changed(project, "params.yaml", edit=lambda text: text.replace("density: 0.2,", "density: 0.3,")):
        assert {name for name in plan(project, []).dirty if name.startswith("merge@")} == {"merge@ties"}


def test_a_variant_of_its_own_recipe_trains_alone(project):
    def edit(text: str) -> str:
        return text.replace("recipe: {schedule: constant}", "recipe: {schedule: constant, lr: 1.0e-4}", 1)

    with changed(project, "params.yaml", edit=edit):
        trained = {name for name in plan(project, []).dirty if name.partition("@")[0] in TRAINING}
    assert trained == {"variant@constant-0"}


def test_another_arm_of_periodic_merging_trains_that_arm_alone(project):
    new = "periodic:\n  other: {rule: uniform, size: 2, every: 2.0, reset_moments: false, devices: 1}\n"
    with changed(project, "params.yaml", edit=lambda text: re.sub(r"\nperiodic:.*\n", f"\n{new}", text)):
        trained = {name for name in plan(project, []).dirty if name.partition("@")[0] in TRAINING}
    assert trained == {"periodic@other"}
    with changed(project, "params.yaml", edit=lambda text: text.replace("pull: 0.5", "pull: 0.4")):
        trained = {name for name in plan(project, []).dirty if name.partition("@")[0] in TRAINING}
    assert trained == {"periodic@warp"}


def test_another_seed_trains_that_seed_alone(project):
    with changed(project, "params.yaml", edit=lambda text: text.replace("6, 7]", "6, 7, 8]")):
        assert {name for name in plan(project, []).dirty if name.startswith("finetune@")} == {"finetune@8"}
