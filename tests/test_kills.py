"""The whole job killed with -9 at moments spread over all of its stages, and run again: the same files.

Minutes long: `make kills`, or `python -m pytest -n 0 -m kill`.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

pytestmark = [pytest.mark.kill, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent
SMALL = {
    "threads": 1,
    "prepare": {
        "seed": 7,
        "shard_size": 20,
        "reference_draws": 100,
        "reference_epochs": 1,
        "splits": {
            name: {"source": "shapes", "images": images}
            for name, images in (("train", 64), ("held-out", 48), ("shapes", 60))
        },
    },
    "pretrain": {"draws": 512, "batch_size": 64, "warmup_steps": 2},
    "seeds": [0, 1, 2],
    "finetune": {"epochs": 4, "batch_size": 16, "warmup_steps": 1, "lawa": 2, "snapshots": True},
    "periodic": {
        "gradual": {"rule": "papa", "size": 2, "every": 0.5, "alpha": 0.9, "reset_moments": False, "devices": 1},
    },
    "longer": [2],
    "anchors": {
        "weak": {
            "source": "shapes",
            "seed": 1,
            "draws": 128,
            "batch_size": 64,
            "lr": 0.001,
            "weight_decay": 0.1,
            "beta2": 0.98,
            "warmup_steps": 1,
            "clip_norm": 1.0,
            "precision": "float32",
            "log_every": 20,
        },
    },
    "variants": {
        "weak-0": {
            "pool": "weak",
            "seed": 0,
            "anchor": "models/anchors/weak/anchor.safetensors",
            "recipe": {"lr": 0.01},
        },
    },
    "merge": {"methods": ["model_stock", "wise_ft"], "wise_ft": {"alphas": [0.25, 0.5]}},
    "evaluate": {"benchmarks": ["held-out", "shapes"], "batch_size": 16, "precision": "float32"},
}
KINDS = (
    "check",
    "prepare",
    "pretrain",
    "anchor",
    "anchors",
    "finetune",
    "variant",
    "periodic",
    "longer",
    "merge",
    "evaluate",
    "geometry",
    "compare",
)


def update(base: dict, change: dict) -> None:
    for key, value in change.items():
        if isinstance(value, dict) and key not in ("splits", "periodic", "anchors", "variants"):
            update(base[key], value)
        else:
            base[key] = value


def settings(folder: Path, change: dict) -> None:
    """Change some of params.yaml."""
    yaml = YAML(typ="safe")
    params = yaml.load((folder / "params.yaml").read_text())
    update(params, change)
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(params, file)


def project(folder: Path, source: Path = ROOT) -> Path:
    """A copy of a project with very small params, whose jobs save after every step and every batch."""
    for name in ("flows", "modelstock", "stages"):
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, option in (("training/resume.py", "SAVE_EVERY_S"), ("scoring/one_pass.py", "SAVE_EVERY_S")):
        file = folder / "modelstock" / name
        text, count = re.subn(rf"(?m)^{option} = [-\d.]+", f"{option} = -1.0", file.read_text())
        assert count == 1
        file.write_text(text)
    for name in ("dvc.yaml", "params.yaml", ".dvcignore"):
        shutil.copy(source / name, folder / name)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", folder / ".dvc/config")
    (folder / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    settings(folder, SMALL)
    return folder


class Repro:
    """What `make repro` runs, in a process group of its own; iterate over the names of the stages as they start."""

    def __init__(self, folder: Path) -> None:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PREFECT", "DVC"))}
        env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(folder)}
        env |= {"PYTHONUNBUFFERED": "1"}
        self.errors = open(folder / "stderr.txt", "w")  # noqa: SIM115  (closed in `end`)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.dvc_repro"],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "Repro":
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind, also of a test that fails."""
        if self.process.poll() is None:
            self.kill()
            self.end()

    def __iter__(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if started := re.match(r"Running stage '([^']+)'", line):
                yield started.group(1)

    def kill(self) -> None:
        """Kill everything of it at once."""
        os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> int:
        """Wait for its end."""
        assert self.process.stdout is not None
        self.process.stdout.read()
        self.errors.close()
        return self.process.wait()


def up_to_date(folder: Path) -> tuple[list[str], list[float]]:
    """Run everything that must run; returns the stages that ran, and how long each took, in seconds."""
    names, times = [], []
    with Repro(folder) as repro:
        for name in repro:
            names.append(name)
            times.append(time.monotonic())
        assert repro.end() == 0, (folder / "stderr.txt").read_text()[-3000:]
    ends = [*times[1:], time.monotonic()]
    return names, [stop - start for start, stop in zip(times, ends, strict=False)]


def files(folder: Path) -> dict[str, str]:
    """Every output, and everything that DVC knows of it: path -> hash."""
    paths = [
        path for name in ("data", "models", "results", "reports", "metrics") for path in (folder / name).rglob("*")
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*paths, folder / "dvc.lock"]
        if path.is_file()
    }


def training_leaves(folder: Path) -> list[Path]:
    """What trainings have left in scratch/."""
    stages = ("finetune", "longer", "periodic", "pretrain", "variant")
    return [path for stage in stages for path in (folder / "scratch" / stage).rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, float]]:
    """The project brought up to date without interruption, and how long each kind of stage took at most."""
    folder = project(tmp_path_factory.mktemp("whole"))
    names, times = up_to_date(folder)
    took: dict[str, float] = {}
    for name, seconds in zip(names, times, strict=True):
        kind = name.partition("@")[0]
        took[kind] = max(seconds, took.get(kind, 0))
    assert set(took) == set(KINDS)
    return folder, took


def killed_in(
    folder: Path, moments: random.Random, took: dict[str, float], wanted: Callable[[str], bool]
) -> str | None:
    """Run, and kill at a random moment of the first stage that is wanted; returns its name, or None: it has ended."""
    with Repro(folder) as repro:
        for name in repro:
            if wanted(name):
                time.sleep(moments.uniform(0.05, 1.0) * took[name.partition("@")[0]])
                repro.kill()
                repro.end()
                return name
        assert repro.end() == 0, (folder / "stderr.txt").read_text()[-3000:]
    return None


def test_kill_9_of_the_whole_job_in_every_stage_changes_no_byte(tmp_path, whole):
    """Each stage once, at a random moment, its process, DVC and all; the next run goes on from what is there."""
    undisturbed, took = whole
    folder, moments, killed = project(tmp_path / "killed", undisturbed), random.Random(0), []
    while name := killed_in(folder, moments, took, lambda name: name not in killed):
        killed.append(name)
    assert {name.partition("@")[0] for name in killed} == set(KINDS)
    expected, found = files(undisturbed), files(folder)
    assert {path for path in expected | found if expected.get(path) != found.get(path)} == set()
    assert training_leaves(folder) == []


def test_seeds_methods_and_benchmarks_taken_away_leave_nothing_behind_and_come_back_as_they_were(tmp_path, whole):
    folder = Path(shutil.copytree(whole[0], tmp_path / "changed", symlinks=True))
    before = files(folder)
    fewer = {"seeds": [0, 1], "merge": {"methods": ["model_stock"]}}
    settings(folder, fewer)
    up_to_date(folder)
    left = files(folder)
    assert not [path for path in left if path.startswith(("models/finetuned/2/", "models/merged/wise_ft/"))]
    fresh = project(tmp_path / "fresh", whole[0])
    settings(fresh, fewer)
    shutil.copytree(folder / ".dvc/cache", fresh / ".dvc/cache")  # what a clone pulls
    # DVC takes every other stage from its cache: its inputs are those of the other folder.
    assert up_to_date(fresh)[0] == ["check"]
    lock, own = (YAML(typ="safe").load((place / "dvc.lock").read_text())["stages"] for place in (folder, fresh))
    assert {name: lock[name] for name in own} == own
    settings(folder, {"seeds": SMALL["seeds"], "merge": {"methods": SMALL["merge"]["methods"]}})
    names, _ = up_to_date(folder)
    assert not [name for name in names if name.startswith(("prepare", "pretrain", "finetune"))]
    after = files(folder)
    assert {path for path in before | after if before.get(path) != after.get(path)} == set()
