"""Pilots: what the settings may be, and the call of sbatch that comes of them. tests/cluster runs them in Slurm."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.slurm import CONFIG, OURS, Pilot, SlurmError, load, seconds

ROOT = Path(__file__).parent.parent
GOOD = "server: http://head:4200/api\ntime: 12:00:00\n"


@pytest.fixture
def clone(tmp_path):
    """A checkout with the settings and the script of pilots."""
    clone = tmp_path / "project"
    shutil.copytree(ROOT / "deploy/slurm", clone / "deploy/slurm")
    (clone / ".git").mkdir()
    (clone / CONFIG).write_text(GOOD)
    return clone


def submit(clone, *options, path=os.environ["PATH"], **env):
    return subprocess.run(
        [sys.executable, "-m", "flows.slurm", "submit", *options],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("", "server is not set; time is not set"),
        (f"{GOOD}partiton: gpu", "partiton is not a setting: did you mean partition?"),
        (f"{GOOD}nodes: 2", "nodes is not a setting"),
        ("server: head:4200\ntime: 60", "server: must be an address like http://HOST:4200/api"),
        (
            "server: http://me:secret@head:4200/api\ntime: 60",
            "server: must not hold a password, which belongs in PREFECT_API_AUTH_STRING",
        ),
        (
            "server: http://head/api\ntime: half a day",
            "time: must be a time limit like 12:00:00, 1-00:00:00 or 720 (minutes) (got 'half a day')",
        ),
        (f"{GOOD}slots: -1", "slots: Input should be greater than or equal to 0 (got -1)"),
        (f"{GOOD}slots: two", "slots: Input should be a valid integer (got 'two')"),
        (f"{GOOD}mem: a lot", "mem: must be an amount of memory like 64G, or 65536 (MB) (got 'a lot')"),
        (f"{GOOD}signal_s: 70000", "signal_s: Input should be less than or equal to 65535 (got 70000)"),
        (
            "server: http://head/api\ntime: 3",
            "time: 3 leaves no time for work: stages are asked to end signal_s = 120 s before it, "
            "and up to 60 s earlier",
        ),
        (
            f"{GOOD}extra: [-p gpu]",
            "extra: '-p gpu' must be an option in its long form, like --qos=long (got ['-p gpu'])",
        ),
        (
            f"{GOOD}extra: [--export=NONE]",
            "extra: '--export=NONE' is not for `extra`: the other settings, or the pilot itself, say it "
            "(got ['--export=NONE'])",
        ),
        ("- server", "no settings, which are lines like `pool: gpu`"),
    ],
)
def test_each_wrong_setting_is_refused_in_one_line(tmp_path, text, got):
    file = tmp_path / "worker.yaml"
    file.write_text(text)
    with pytest.raises(SlurmError) as refused:
        load(file)
    assert str(refused.value) == f"{file}: got {got}; expected valid settings; correct them: docs/cluster.md"


@pytest.mark.parametrize("ours", sorted(OURS))
def test_no_start_of_an_options_name_takes_a_pilots_own_option_away(ours):
    for length in range(1, len(ours) + 1):
        with pytest.raises(ValueError, match="is not for `extra`"):
            Pilot(server="http://head/api", time="60", extra=[f"--{ours[:length]}=x"])


def test_a_file_that_is_not_there_or_no_yaml_is_refused_in_one_line(tmp_path):
    with pytest.raises(SlurmError, match=r"none\.yaml: got No such file or directory; expected settings of pilots; "):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("server: [")
    with pytest.raises(SlurmError, match=r"bad\.yaml: got while parsing .* expected YAML; correct what it names$"):
        load(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("time", "length"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("12:00:00", 12 * 3600),
        ("2-12", 60 * 3600),
        ("2-12:30", 60 * 3600 + 1800),
        ("2-12:30:15", 60 * 3600 + 1815),
    ],
)
def test_times_are_read_as_slurm_does(time, length):
    assert seconds(time) == length


def test_the_shipped_settings_name_every_setting_and_lack_only_the_server():
    shipped = YAML(typ="safe").load((ROOT / CONFIG).read_text())
    assert set(shipped) == set(Pilot.model_fields)
    with pytest.raises(SlurmError, match=r"worker\.yaml: got server is not set; "):
        load(ROOT / CONFIG)


def test_the_call_of_sbatch_is_shown_with_every_option_and_without_passwords(clone):
    settings = "partition: a100\naccount: vision\ngres: gpu:2\ncpus_per_task: 16\nmem: 128G\npool: big\nslots: 2\n"
    settings += "signal_s: 300\nidle_s: 60\nclones: /shared/pilots\nextra: [--qos=long, --exclusive]\n"
    (clone / CONFIG).write_text(GOOD + settings)
    done = submit(clone, "--dry-run", PREFECT_API_AUTH_STRING="head:secret", MLFLOW_TRACKING_PASSWORD="secret")
    assert (done.returncode, done.stderr) == (0, "")
    assert shlex.split(done.stdout.replace("\\\n", "")) == [
        f"MODELSTOCK_PROJECT={clone}",
        "MODELSTOCK_CLONES=/shared/pilots",
        "MODELSTOCK_SERVER=http://head:4200/api",
        "MODELSTOCK_POOL=big",
        "MODELSTOCK_SLOTS=2",
        "MODELSTOCK_IDLE_S=60",
        "MODELSTOCK_DRAIN=280",
        *("sbatch", "--qos=long", "--exclusive", "--parsable", "--requeue"),
        *("--partition=a100", "--account=vision", "--gres=gpu:2", "--cpus-per-task=16", "--mem=128G"),
        *("--time=12:00:00", "--signal=B:USR1@300"),
        *(f"--chdir={clone}", "--output=/shared/pilots/pilot-%j.out", "--export=ALL"),
        f"{clone}/deploy/slurm/worker.sbatch",
    ]


def test_settings_that_are_empty_are_left_to_slurm(clone):
    (clone / CONFIG).write_text(f"{GOOD}partition:\ngres:\n")
    done = submit(clone, "--dry-run")
    assert "--time=12:00:00" in done.stdout
    assert "--partition" not in done.stdout
    assert "--gres" not in done.stdout
    assert f"--output={clone.parent}/modelstock-pilots/pilot-%j.out" in done.stdout


def test_a_folder_that_is_no_clone_and_a_machine_without_slurm_are_refused_in_one_line(clone):
    done = submit(clone, path="")
    line = "error: sbatch: got no such program; expected Slurm's; submit where Slurm's commands are\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    (clone / ".git").rmdir()
    done = submit(clone)
    line = f"error: {clone}: got no git checkout; expected a clone of the project; run in the root of one\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


def test_what_prints_no_jobs_number_is_no_job(clone, tmp_path):
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho slurm 22.05\n")
    (tmp_path / "sbatch").chmod(0o755)
    done = submit(clone, path=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    line = "error: sbatch: got slurm 22.05; expected a job; correct deploy/slurm/worker.yaml\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
