"""What `pip install modelstock` gives: a command that merges and inspects, and names the extra that it lacks."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import modelstock
from modelstock.cli.app import STATISTICS, TRAIN
from modelstock.cli.extras import LIBRARIES
from modelstock.merging.engine import merge
from modelstock.merging.files import merge_files
from modelstock.weights.weight_set import load_weights

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIMIT = 100 * 10**6  # bytes on disk of everything that is installed


def uv(*arguments: object) -> str:
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    uv("build", "--wheel", "--out-dir", folder, ROOT)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """An environment with the wheel and what it requires, in the versions of the lock."""
    folder = tmp_path_factory.mktemp("environment")
    uv("venv", "--python", sys.executable, folder)
    uv("pip", "install", "--python", folder / "bin/python", "--constraint", ROOT / "requirements.lock", wheel)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An anchor, two fine-tuned checkpoints, and one of them as torch writes it."""
    folder, random = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    anchor = {"visual.a": random.standard_normal((40, 30)), "visual.b": random.standard_normal(7)}
    for number in range(3):
        tensors = {k: (v + number * 0.1 * random.standard_normal(v.shape)).astype("f4") for k, v in anchor.items()}
        save_file(tensors, folder / f"{number}.safetensors")
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / "torch.pt")
    (folder / "shards").mkdir()
    return folder


def command(environment: Path, folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    settings = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    modelstock = [str(environment / "bin/modelstock"), *map(str, words)]
    return subprocess.run(modelstock, cwd=folder, env=settings, capture_output=True, text=True)


def test_the_wheel_holds_the_library_and_its_data_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"modelstock/py.typed", "modelstock/comparison/published.yaml"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"modelstock"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "modelstock").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_the_core_is_small_and_brings_none_of_the_extras(environment):
    packages = {entry["name"] for entry in json.loads(uv("pip", "list", "--python", environment, "--format", "json"))}
    extras = {name for extra in LIBRARIES for name in requirements(extra)}
    assert "torch" in extras
    assert packages & (extras | {"pandas"}) == set()
    installed = next(environment.glob("lib/python*/site-packages"))
    assert sum(path.stat().st_size for path in installed.rglob("*") if path.is_file()) < LIMIT


def test_the_installed_command_merges_to_the_bytes_of_the_library(environment, files, tmp_path):
    tuned = [files / "1.safetensors", files / "2.safetensors"]
    done = command(environment, tmp_path, "merge", "--anchor", files / "0.safetensors", *tuned, "-o", "a.safetensors")
    assert done.returncode == 0, done.stderr
    merge_files("model_stock", files / "0.safetensors", tuned, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_installed_command_inspects_compares_and_lists(environment, files):
    shown = json.loads(command(environment, files, "inspect", "1.safetensors", "--json").stdout)
    assert [row["tensor"] for row in shown["tensors"]] == ["visual.a", "visual.b"]
    rows = json.loads(command(environment, files, "diff", "1.safetensors", "2.safetensors", "--json").stdout)["rows"]
    assert all(row["distance"] > 0 for row in rows)
    assert "model_stock" in command(environment, files, "methods").stdout
    assert "│ merge" in command(environment, files, "--help").stdout


def test_the_installed_command_measures_a_geometry_without_figures(environment, files, tmp_path):
    done = command(
        environment,
        files,
        "geometry",
        "--anchor",
        "0.safetensors",
        "1.safetensors",
        "2.safetensors",
        "-o",
        tmp_path / "out",
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'modelstock[figures]'" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["geometry.json", "geometry.md", "tensors.csv"]


def test_the_library_merges_in_memory_as_its_docstring_shows(environment, files, tmp_path):
    for name, number in (("anchor", 0), ("a", 1), ("b", 2)):
        shutil.copy(files / f"{number}.safetensors", tmp_path / f"{name}.safetensors")
    shown = "".join(line[4:] + "\n" for line in modelstock.__doc__.splitlines() if line.startswith("    "))
    done = subprocess.run([environment / "bin/python", "-I", "-c", shown], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    anchor, *tuned = (load_weights(files / f"{number}.safetensors") for number in range(3))
    expected, _ = merge("model_stock", anchor, tuned)
    merged = load_file(tmp_path / "merged.safetensors")
    assert merged.keys() == expected.tensors.keys()
    assert all(merged[name].tobytes() == tensor.tobytes() for name, tensor in expected.tensors.items())


def test_importing_the_library_imports_nothing_else(environment, tmp_path):
    code = "import sys; before = set(sys.modules); import modelstock; print(*set(sys.modules) - before)"
    shown = subprocess.run([environment / "bin/python", "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout == "modelstock\n"


NEEDS_TRAIN = {
    "anchor": "ViT-B-32 -o out.safetensors --pretrained random --classes cat,dog",
    "compare": "1.safetensors 2.safetensors --anchor 0.safetensors --benchmark shards -o out",
    "evaluate": "1.safetensors --benchmark shards",
    "export": "1.safetensors -o out --clip 0.safetensors",
    "prepare": "shards -o out --role shift --classes cat,dog",
    "statistics": "fisher 1.safetensors --data shards -o out.safetensors",
}
NEEDS_STATISTICS = {"significance": "a.jsonl b.jsonl"}
MORE = {
    "merge": "--anchor 0.safetensors 1.safetensors torch.pt -o out.safetensors",
    "inspect": "torch.pt",
}


@pytest.mark.parametrize(("name", "words"), [*NEEDS_TRAIN.items(), *NEEDS_STATISTICS.items(), *MORE.items()])
def test_a_command_whose_extra_is_missing_says_which_to_install(environment, files, name, words):
    extra = "statistics" if name in NEEDS_STATISTICS else "train"
    for file in ("a.jsonl", "b.jsonl"):
        (files / file).write_text('{"id": 1, "correct": 1}\n')
    done = command(environment, files, name, *words.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        rf"error: modelstock {name}: got no library \w+; "
        rf"expected the extra {extra}; pip install 'modelstock\[{extra}\]'\n",
        done.stderr,
    )
    assert not list(files.glob("out*"))


def test_help_says_which_commands_need_an_extra(environment, files):
    assert sorted(function.__name__ for function in TRAIN) == sorted(NEEDS_TRAIN)
    for name in NEEDS_TRAIN:
        assert "pip install 'modelstock[train]'" in command(environment, files, name, "--help").stdout
    assert [function.__name__ for function in STATISTICS] == list(NEEDS_STATISTICS)
    for name in NEEDS_STATISTICS:
        assert "pip install 'modelstock[statistics]'" in command(environment, files, name, "--help").stdout
    assert "[train]" not in command(environment, files, "merge", "--help").stdout


def requirements(extra: str) -> set[str]:
    """The distributions that an extra names."""
    lines = PROJECT["optional-dependencies"][extra]
    return {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines if not line.startswith("modelstock")}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def imported(package: str) -> set[str]:
    """The libraries that a package of this repository imports, anywhere in it."""
    names = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"modelstock", "stages", "flows"}


def test_every_library_that_is_imported_is_required_by_the_core_or_by_an_extra():
    core = {canonical(re.match(r"[\w.-]+", line)[0]) for line in PROJECT["dependencies"]}
    distributions = packages_distributions()
    for package in ("modelstock", "stages", "flows"):
        for library in imported(package):
            extra = next((extra for extra, libraries in LIBRARIES.items() if library in libraries), None)
            names = {canonical(name) for name in distributions[library]}
            assert names & (requirements(extra) if extra else core), library


@pytest.mark.parametrize("extra", LIBRARIES)
def test_every_library_of_an_extra_is_one_that_its_requirements_bring(extra):
    distributions = packages_distributions()
    for library in LIBRARIES[extra]:
        assert {canonical(name) for name in distributions[library]} & requirements(extra), library
