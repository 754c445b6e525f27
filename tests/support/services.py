"""A project whose services run on ports of their own, with one stage that lasts as long as a test wants."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from flows.services import FLOW_RUN, _ask, started_at
from tests.support.ports import free_port

ROOT = Path(__file__).parent.parent.parent
# One stage that lasts as long as the file `slow` says.
PIPELINE = "stages: {deep: {cmd: python deep.py, deps: [in.txt], outs: [out.txt], meta: {device: 1}}}"
DEEP = """
import os, time
from pathlib import Path
Path("begun").write_text(str(os.getpid()))
time.sleep(float(Path("slow").read_text()))
Path("out.txt").write_text("done")
"""


def within(seconds: float, check):
    deadline = time.monotonic() + seconds
    while not (value := check()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return value


class Services:
    """A project whose services run on ports of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.prefect, self.mlflow = folder, free_port(), free_port()
        self.api = f"http://127.0.0.1:{self.prefect}/api"
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PREFECT"))},
            "MODELSTOCK_PREFECT_PORT": str(self.prefect),
            "MODELSTOCK_MLFLOW_PORT": str(self.mlflow),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PREFECT_WORKER_QUERY_SECONDS": "2",
        }

    def __call__(self, *words: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "flows.services", *words]
        return subprocess.run(line, cwd=self.folder, env=self.env, capture_output=True, text=True)

    def up(self, *options: str) -> str:
        done = self("up", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def kill(self, *names: str) -> None:
        for name in names:
            pid = json.loads((self.folder / f".services/{name}.json").read_text())["pid"]
            os.killpg(pid, signal.SIGKILL)
            assert within(10, lambda pid=pid: started_at(pid) is None)

    @property
    def deployment(self) -> dict:
        return _ask(f"{self.api}/deployments/name/reproduce/shapes")

    @property
    def slots(self) -> int:
        return _ask(f"{self.api}/v2/concurrency_limits/deployment:{self.deployment['id']}")["active_slots"]

    def run(self, **params) -> str:
        body = {"parameters": {"params": params}}
        return _ask(f"{self.api}/deployments/{self.deployment['id']}/create_flow_run", body)["id"]

    def state(self, run: str) -> tuple[str, str]:
        state = _ask(f"{self.api}/flow_runs/{run}")["state"]
        return state["type"], state["message"] or ""

    def tasks(self, run: str) -> dict[str, str]:
        found = _ask(f"{self.api}/task_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        return {task["name"]: task["state"]["type"] for task in found}

    def begun(self, run: str) -> tuple[int, int]:
        """Once the run's stage runs: the processes of the flow and of the stage."""
        note = self.folder / "begun"
        assert within(90, lambda: note.exists() and note.read_text()), self.state(run)
        stage = int(note.read_text())
        note.unlink()
        return next(self.processes(run)), stage

    def processes(self, run: str):
        for process in psutil.process_iter():
            try:
                if process.environ().get(FLOW_RUN) == run and process.status() != psutil.STATUS_ZOMBIE:
                    yield process.pid
            except psutil.Error:
                continue

    def long_run(self) -> tuple[str, int, int]:
        """A run from the deployment whose stage lasts: its id, and the processes of the flow and of the stage."""
        self.up()
        (self.folder / "slow").write_text("600")
        (self.folder / "in.txt").write_text(str(time.time()))
        run = self.run()
        return run, *self.begun(run)

    def a_run_completes(self) -> None:
        """Nothing keeps the slot: the deployment runs."""
        (self.folder / "slow").write_text("0")
        (self.folder / "in.txt").write_text(str(time.time()))
        run = self.run()
        assert within(120, lambda: self.state(run)[0] == "COMPLETED"), self.state(run)
        (self.folder / "begun").unlink()
        assert within(10, lambda: self.slots == 0)


def ended(*pids: int) -> bool:
    return all(started_at(pid) is None for pid in pids)


@contextmanager
def running(folder: Path) -> Iterator[Services]:
    """Services in a new project in this folder; they are stopped at the end."""
    for name in ("flows", "modelstock", "stages"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "deep.py").write_text(DEEP)
    (folder / "in.txt").write_text("1")
    (folder / "prefect.yaml").write_text((ROOT / "prefect.yaml").read_text())
    services = Services(folder)
    try:
        yield services
    finally:
        assert services("down").returncode == 0
