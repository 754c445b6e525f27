"""Pilots in a real Slurm of one node, with a worker in them that writes down what it is asked."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support.services import ended, within
from tests.support.slurm import MISSING, missing, running_slurm

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(missing(), reason=MISSING)]
ROOT = Path(__file__).parent.parent.parent
SECRET = "head:only-the-job-may-know"

# Stands for flows/worker.py: as its `join`, USR1 lets stages save and ends it with 75, and TERM ends it. What it does
# besides is for a test to say, per start of the job.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path

project = Path(os.environ["MODELSTOCK_PROJECT"])
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
note = project.parent / "starts" / f"{os.environ['SLURM_JOB_ID']}.{start}"
heard = []

def end(number, frame):
    heard.append(signal.Signals(number).name)
    write()
    sys.exit(75 if number == signal.SIGUSR1 else 0)

def write():
    record = {"pid": os.getpid(), "arguments": sys.argv[1:], "folder": os.getcwd(), "heard": heard}
    record |= {"password": os.environ.get("PREFECT_API_AUTH_STRING"), "kept": Path("kept").exists()}
    Path(f"{note}.tmp").write_text(json.dumps(record))
    os.replace(f"{note}.tmp", note)

does = json.loads((project / "does.json").read_text())[start]
if does == "waits":
    signal.signal(signal.SIGUSR1, end)
    signal.signal(signal.SIGTERM, end)
write()
Path("kept").touch()
if does in ("waits", "has not begun"):
    time.sleep(600)
sys.exit(does)
"""


class Project:
    """A clone whose worker does what a test says, on its first, second, ... start in a job."""

    def __init__(self, folder: Path, slurm) -> None:
        self.folder, self.slurm, self.clones = folder / "project", slurm, folder / "modelstock-pilots"
        (folder / "starts").mkdir(parents=True)
        (self.folder / "flows").mkdir(parents=True)
        for file in ("flows/__init__.py", "flows/command.py", "flows/slurm.py"):
            shutil.copy(ROOT / file, self.folder / file)
        shutil.copytree(ROOT / "deploy/slurm", self.folder / "deploy/slurm")
        (self.folder / "flows/worker.py").write_text(WORKER)
        (self.folder / ".dvc").mkdir()
        (self.folder / ".dvc/config").touch()
        self.git("init", "--quiet")
        self.git("add", ".")
        self.git("commit", "--quiet", "--message", "A project")

    def git(self, *arguments: str) -> None:
        who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=self.folder, check=True)

    def submit(self, *does: str | int, jobs: int = 1, env: dict[str, str] | None = None, **settings) -> list[str]:
        done = self.call(*does, jobs=jobs, env=env, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    def call(self, *does: str | int, jobs: int = 1, env: dict[str, str] | None = None, **settings):
        (self.folder / "does.json").write_text(json.dumps(does))
        settings = {"server": "http://127.0.0.1:4200/api", "time": "10", "cpus_per_task": 1, "idle_s": 30, **settings}
        (self.folder / "pilots.yaml").write_text(json.dumps(settings))  # JSON is YAML
        env = {**self.slurm.env, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **(env or {})}
        line = [sys.executable, "-m", "flows.slurm", "submit", "--jobs", str(jobs), "--config", "pilots.yaml"]
        return subprocess.run(line, cwd=self.folder, env=env, capture_output=True, text=True, timeout=60)

    def start(self, job: str, number: int = 0, seconds: float = 30) -> dict:
        """What the worker of a start of a job has written down."""
        note = self.folder.parent / f"starts/{job}.{number}"
        assert within(seconds, note.exists), self.output(job)
        return json.loads(note.read_text())

    def output(self, job: str) -> str:
        file = self.clones / f"pilot-{job}.out"
        return "\n".join([file.read_text() if file.exists() else "", str(self.slurm.job(job)), self.slurm.logs()])

    def ends(self, job: str, seconds: float = 30) -> tuple[str, str]:
        """A job's last state and exit code."""
        assert within(seconds, lambda: self.slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING")), self.output(
            job
        )
        return self.slurm.state(job), self.slurm.job(job)["ExitCode"]


@pytest.fixture(scope="module")
def slurm():
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, running_slurm(Path(folder) / "slurm") as slurm:
        yield slurm


@pytest.fixture
def project(slurm, tmp_path):
    yield Project(tmp_path, slurm)
    slurm.cancel_all()


def test_before_the_time_limit_the_worker_is_asked_to_end_and_its_job_starts_again(slurm, project):
    [job] = project.submit("waits", 0, time="2", signal_s=55)
    assert project.start(job)["heard"] == []
    assert within(100, lambda: project.start(job)["heard"]), project.output(job)
    assert project.start(job)["heard"] == ["SIGUSR1"]
    again = project.start(job, 1, seconds=60)
    assert again["kept"]  # the same clone, with what the first start left there
    assert again["folder"] == project.start(job)["folder"]
    assert project.ends(job) == ("COMPLETED", "0:0")
    assert slurm.job(job)["Restarts"] == "1"


def test_pilots_run_side_by_side_each_in_a_clone_of_its_own_and_an_idle_one_removes_it(project):
    jobs = project.submit("waits", jobs=2, slots=3, pool="big")
    first, second = (project.start(job) for job in jobs)
    host = os.uname().nodename.split(".")[0]
    for job, start in zip(jobs, (first, second), strict=True):
        server = ["join", "--server", "http://127.0.0.1:4200/api", "--pool", "big"]
        options = ["--idle", "30", "--drain", "100", "--slots", "3"]
        assert start["arguments"] == [*server, "--name", f"{host}-{job}", *options]
        assert start["folder"] == str(project.clones / job)
        project.slurm("scancel", job)
    [job] = project.submit(0)
    assert project.ends(job) == ("COMPLETED", "0:0")
    assert "--slots" not in project.start(job)["arguments"]  # one per GPU is the worker's to count
    assert not (project.clones / job).exists()


def test_a_cancelled_pilot_ends_its_worker_and_does_not_come_again(slurm, project):
    [job] = project.submit("waits")
    pid = project.start(job)["pid"]
    slurm("scancel", job)
    assert project.ends(job)[0] == "CANCELLED"
    assert within(10, lambda: ended(pid))
    assert project.start(job)["heard"][0] in ("SIGTERM", "SIGUSR1")  # Slurm asks both, the script and the worker
    assert slurm.job(job)["Restarts"] == "0"


def test_where_the_job_alone_is_asked_to_end_the_worker_saves_and_its_exit_code_is_the_jobs(slurm, project):
    [job] = project.submit("waits")
    project.start(job)
    slurm("scancel", "--batch", "--signal=TERM", job)
    assert project.ends(job) == ("FAILED", "75:0")
    assert project.start(job)["heard"] == ["SIGUSR1"]
    assert slurm.job(job)["Restarts"] == "0"


def test_a_worker_that_has_not_begun_when_the_limit_comes_is_queued_again_too(slurm, project):
    [job] = project.submit("has not begun", 0)
    project.start(job)
    slurm("scancel", "--batch", "--signal=USR1", job)
    project.start(job, 1)
    assert project.ends(job) == ("COMPLETED", "0:0")


def test_a_worker_that_fails_fails_its_job_and_its_clone_stays(project):
    [job] = project.submit(3)
    assert project.ends(job) == ("FAILED", "3:0")
    assert (project.clones / job / "flows/worker.py").exists()


def test_passwords_reach_the_worker_by_its_environment_and_a_private_file_and_no_argument(slurm, project):
    local = project.folder / ".dvc/config.local"
    local.touch(mode=0o600)
    local.write_text("['remote \"store\"']\n    password = hidden\n")
    [job] = project.submit("waits", env={"PREFECT_API_AUTH_STRING": SECRET})
    start = project.start(job)
    assert start["password"] == SECRET
    copy = Path(start["folder"]) / ".dvc/config.local"
    assert (copy.read_text(), copy.stat().st_mode & 0o777) == (local.read_text(), 0o600)
    assert project.clones.stat().st_mode & 0o777 == 0o700
    shown = [slurm("scontrol", "show", "job", job), *(f"{p.info['cmdline']}" for p in psutil.process_iter(["cmdline"]))]
    assert not [text for text in shown if SECRET in text or "hidden" in text]


def test_a_pilot_works_at_the_commit_that_its_project_is_at_when_it_starts(project):
    (project.folder / "flows/worker.py").write_text("raise SystemExit(4)")
    project.git("commit", "--quiet", "--all", "--message", "Another worker")
    (project.folder / "flows/worker.py").write_text(WORKER)  # not committed
    [job] = project.submit(0)
    assert project.ends(job) == ("FAILED", "4:0")


def test_what_sbatch_refuses_is_one_line(project):
    done = project.call(0, partition="long")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: sbatch: got sbatch: error: "), done.stderr
    assert "invalid partition specified: long" in done.stderr
    assert done.stderr.endswith("; expected a job; correct pilots.yaml\n")
