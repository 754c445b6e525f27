"""A head and machines on this one: clones with a HOME, caches and settings of their own, a Prefect server, a remote."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.support.ports import free_port

ROOT = Path(__file__).parent.parent.parent
LEASE_S = 18
OURS = ("MLFLOW", "PREFECT", "DVC", "MODELSTOCK")
# Stages of a small project: two seeds on devices, which are slow where a file says so, and what needs both.
PIPELINE = """
stages:
  prepare: {cmd: python work.py prepare prepare.txt, deps: [work.py, in.txt], outs: [prepare.txt]}
  seed:
    foreach: [0, 1]
    do:
      cmd: python work.py seed-${item} seeds/${item}
      deps: [work.py, prepare.txt]
      params: [{settings.yaml: [seconds]}]
      outs: ["seeds/${item}"]
      meta: {device: 1}
  compare: {cmd: python work.py compare out.txt, deps: [work.py, seeds], outs: [out.txt]}
"""
# Counts to `seconds` with a resume point; leaves in MACHINE_LOG what happened, and on which machine.
WORK = """
import os, sys, time
from pathlib import Path
name, out = sys.argv[1:]
machine, log = os.environ.get("MACHINE", "head"), Path(os.environ["MACHINE_LOG"])
def note(what):
    with open(log, "a") as file:
        file.write(f"{name} {what} {machine} {os.getpid()} {time.time()}\\n")
point = Path(os.environ.get("MODELSTOCK_SCRATCH") or "scratch") / name
step = int(point.read_text()) if point.exists() else 0
note(f"begin-{step}")
if name.startswith("seed"):
    seconds = float(os.environ.get("SECONDS_HERE") or float(open("settings.yaml").read().split()[1]))
    while step < 5 * seconds:
        time.sleep(0.2)
        step += 1
        point.parent.mkdir(parents=True, exist_ok=True)
        point.write_text(str(step))
        stop = os.environ.get("MODELSTOCK_STOP")
        if stop and os.path.exists(stop):
            note(f"saved-{step}")
            sys.exit(75)
    Path(out).mkdir(parents=True)
    Path(out, "weights").write_text(f"{name} of {Path('prepare.txt').read_text()}{os.environ.get('BYTES', '')}")
    Path(out, "history").write_text("1 2 3")
else:
    read = sorted(Path("seeds").glob("*/weights")) if name == "compare" else [Path("in.txt")]
    Path(out).write_text("".join(file.read_text() for file in read))
point.unlink(missing_ok=True)
note("end")
"""


def alive(pid: int) -> bool:
    """Whether a process runs."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def within(seconds: float, check):
    """What `check` gives, once it is true, or when time is over."""
    deadline = time.monotonic() + seconds
    while not (value := check()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return value


def run(command: list, cwd: Path, env: dict, **options) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, **options)


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


class Machine:
    """A clone with its own HOME, caches and settings; its processes are known by a variable of their environment."""

    def __init__(self, name: str, folder: Path, origin: Path, env: dict[str, str]) -> None:
        self.name, self.folder = name, folder / "clone"
        home = folder / "home"
        home.mkdir(parents=True)
        git(folder, "clone", "-q", str(origin), str(self.folder))
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(OURS)},
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "PREFECT_HOME": str(home / "prefect"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "MODELSTOCK_LEASE_S": str(LEASE_S),
            "MACHINE": name,
            "TEST_MACHINE": str(folder),
            **env,
        }
        self.worker: subprocess.Popen | None = None

    def __call__(self, *command: str, **options) -> subprocess.CompletedProcess:
        return run([sys.executable, "-m", *command], self.folder, self.env, **options)

    def start(self, *command: str, log: str = "log") -> subprocess.Popen:
        with open(self.folder.parent / log, "a") as file:
            return subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.folder,
                env=self.env,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def join(self, *options: str) -> None:
        """Join the pool, and wait until the server knows it."""
        arguments = ["join", "--server", self.env["PREFECT_API_URL"], "--pool", "gpu", "--name", self.name, *options]
        self.worker = self.start("flows.worker", *arguments)
        deadline = time.monotonic() + 90
        while self.name not in self.online():
            assert self.worker.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.5)

    def online(self) -> list[str]:
        """The names of the pool's workers that the server hears of."""
        user = self.env.get("PREFECT_API_AUTH_STRING", "")
        headers = {"content-type": "application/json"}
        headers |= {"authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else {}
        url = f"{self.env['PREFECT_API_URL']}/work_pools/gpu/workers/filter"
        with urllib.request.urlopen(urllib.request.Request(url, b"{}", headers), timeout=30) as answer:
            return [worker["name"] for worker in json.loads(answer.read()) if worker["status"] == "ONLINE"]

    def status(self) -> str:
        return self("flows.worker", "status", "--server", self.env["PREFECT_API_URL"], "--pool", "gpu").stdout

    @property
    def log(self) -> str:
        return (self.folder.parent / "log").read_text()

    @property
    def files(self) -> dict[str, str]:
        """What a whole run leaves."""
        names = ("prepare.txt", "seeds/0/weights", "seeds/1/weights", "seeds/0/history", "out.txt", "dvc.lock")
        return {name: (self.folder / name).read_text() for name in names}

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mine = process.environ().get("TEST_MACHINE") == self.env["TEST_MACHINE"]
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """The machine is gone at once: every process of it, again until none is left."""
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        if self.worker:
            self.worker.wait(10)

    def leave(self) -> int:
        """End the worker as a person does; its exit code."""
        assert self.worker is not None
        self.worker.send_signal(signal.SIGTERM)
        return self.worker.wait(60)


class Cluster:
    """A head, machines, a remote in a folder, and the log of what ran where."""

    def __init__(self, folder: Path, files: dict[str, str], env: dict[str, str]) -> None:
        self.folder, self.remote, self.events = folder, folder / "remote", folder / "events"
        self.origin = folder / "origin"
        self.origin.mkdir(parents=True)
        self.remote.mkdir()
        git(self.origin, "init", "-q", "-b", "main")
        for name, text in files.items():
            (self.origin / name).parent.mkdir(parents=True, exist_ok=True)
            (self.origin / name).write_text(text)
        git(self.origin, "add", "-A", "-f")
        git(self.origin, "commit", "-q", "-m", "project")
        self.env = {"MACHINE_LOG": str(self.events), **env}
        self.machines: list[Machine] = []
        self.head = self.machine("head")

    def machine(self, name: str, **env: str) -> Machine:
        new = Machine(name, self.folder / name, self.origin, {**self.env, **env})
        self.machines.append(new)
        return new

    def reproduce(self, *options: str) -> subprocess.CompletedProcess:
        return self.head("flows.reproduce", "--pool", "gpu", *options)

    def flow(self, *options: str) -> subprocess.Popen:
        """A flow in the background, its output in the head's log."""
        return self.head.start("flows.reproduce", "--pool", "gpu", *options)

    def flow_on(self, machine: Machine) -> subprocess.Popen:
        """A flow in the background whose two seeds this machine, which joins for it, has begun."""
        machine.join("--slots", "2")
        flow = self.flow()
        assert within(90, lambda: self.happened("seed-0", "begin") and self.happened("seed-1", "begin"))
        return flow

    def deploy(self) -> None:
        """What `make head` does once its services run."""
        script = "import sys; from flows.pool import deploy; deploy(sys.argv[1])"
        done = run([sys.executable, "-c", script, "gpu"], self.head.folder, self.head.env)
        assert done.returncode == 0, done.stderr

    def noted(self) -> list[tuple[str, str, str]]:
        """Stage, what happened, and machine, in the order in which it happened."""
        if not self.events.exists():
            return []
        return [tuple(line.split()[:3]) for line in self.events.read_text().splitlines()]

    def happened(self, stage: str, what: str) -> list[str]:
        """The machines on which this happened to a stage, in that order."""
        return [machine for name, event, machine in self.noted() if name == stage and event.startswith(what)]

    def stage_process(self, stage: str) -> int:
        """The process of a stage that has begun last."""
        lines = [line.split() for line in self.events.read_text().splitlines()]
        return next(int(line[3]) for line in reversed(lines) if line[0] == stage and line[1].startswith("begin"))

    def local_run(self) -> dict[str, str]:
        """The files of `dvc repro` on one machine that knows nothing of the others."""
        alone = self.machine("alone", MACHINE_LOG=str(self.folder / "other-events"))
        alone.env.pop("MODELSTOCK_SCRATCH", None)
        done = alone("dvc", "repro")
        assert done.returncode == 0, done.stderr
        return alone.files

    def close(self) -> None:
        for machine in self.machines:
            machine.kill()


def toy(remote: str, seconds: float = 0.2) -> dict[str, str]:
    """The files of the small project, with a remote."""
    return {
        "dvc.yaml": PIPELINE,
        "work.py": WORK,
        "in.txt": "1",
        "settings.yaml": f"seconds: {seconds}\n",
        ".dvc/config": f"[core]\nanalytics = false\nremote = shared\n['remote \"shared\"']\nurl = {remote}\n",
        ".gitignore": "/scratch\n/prepare.txt\n/out.txt\n/seeds\n__pycache__\n",
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    }


@contextlib.contextmanager
def prefect_server(folder: Path, port: int = 0, **env: str) -> Iterator[dict[str, str]]:
    """A Prefect server, and the environment of its clients."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}/api"
    settings = {
        **{k: v for k, v in os.environ.items() if not k.startswith(OURS)},
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        **env,
    }
    with open(folder / "server.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
            env=settings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=1):
            break
        time.sleep(0.2)
    try:
        yield {"PREFECT_API_URL": url}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
