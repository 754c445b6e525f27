"""The MLflow UI, a Prefect server with the deployments, and a worker, on 127.0.0.1: `make up`, `make down`."""

import http
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from modelstock.errors import ModelstockError, redacted
from modelstock.files import write_json
from modelstock.tracking.mlflow import MlflowTracker, store_uri

app = typer.Typer(add_completion=False, no_args_is_help=True)
FOLDER = Path(".services")
HOST = "127.0.0.1"


class ServiceError(ModelstockError):
    """A service cannot start."""


def started_at(pid: int) -> str | None:
    """The moment a process started, in clock ticks since boot; None for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def alive(name: str) -> int | None:
    """The pid of a service that we started and that still runs: a pid used again by another process is not it."""
    try:
        known = json.loads((FOLDER / f"{name}.json").read_bytes())
        pid, started = int(known["pid"]), known["started"]
    except (OSError, ValueError, LookupError, TypeError):  # none, or damaged
        return None
    return pid if started is not None and started_at(pid) == started else None


def start(name: str, command: list[str], env: dict[str, str]) -> None:
    """Start a service in its own session, its output in `.services/<name>.log`.

    Everyone on the machine can read a command line: what may hold a password is passed in `env`.
    """
    with open(FOLDER / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    write_json(FOLDER / f"{name}.json", {"pid": process.pid, "started": started_at(process.pid)})


def answers(url: str) -> bool:
    """Whether a server answers."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (OSError, urllib.error.URLError):
        return False


def await_service(name: str, url: str, seconds: float = 90) -> None:
    """Wait until a service answers.

    Raises:
        ServiceError: it ended or did not answer in time; its log is named.
    """
    deadline = time.monotonic() + seconds
    while not answers(url):
        if alive(name) is None or time.monotonic() > deadline:
            raise ServiceError(
                name, got="no answer", expected=f"a server at {url}", cure=f"read {FOLDER / f'{name}.log'}"
            )
        time.sleep(0.3)


def _ask(url: str, body: dict[str, Any]) -> Any:
    """The answer of Prefect's API to a POST; asked again for a while where its database is busy."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _end_lost_runs(api: str) -> None:
    """Mark the runs of a worker that is gone as crashed: each would keep the deployment's only slot, for good where
    the server went too."""
    states = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
    body = {"flow_runs": {"state": states}, "deployments": {"name": {"any_": ["shapes"]}}}
    for run in _ask(f"{api}/flow_runs/filter", body):
        state = {"type": "CRASHED", "message": "its worker is gone"}
        _ask(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def environment(prefect: int, mlflow: int) -> dict[str, str]:
    """What the servers, the worker and the flows it runs share."""
    root = Path.cwd()
    return {
        "PREFECT_HOME": str(root / FOLDER / "prefect"),
        "PREFECT_API_URL": f"http://{HOST}:{prefect}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # The stages write to the store itself: it is local, and a hard link then stands for a copy.
        "MLFLOW_TRACKING_URI": store_uri(root),
        "MLFLOW_BACKEND_STORE_URI": store_uri(root),
    }


PrefectPort = Annotated[int, typer.Option(envvar="MODELSTOCK_PREFECT_PORT")]
MlflowPort = Annotated[int, typer.Option(envvar="MODELSTOCK_MLFLOW_PORT")]


@app.command()
def up(prefect_port: PrefectPort = 4200, mlflow_port: MlflowPort = 5000) -> None:
    """Start what does not run yet, deploy the flow, and print where to look."""
    FOLDER.mkdir(exist_ok=True)
    FOLDER.chmod(0o700)
    env = environment(prefect_port, mlflow_port)
    remote = env["MLFLOW_TRACKING_URI"].startswith("http")  # a server that runs elsewhere
    services = {"prefect": prefect_port} | ({} if remote else {"mlflow": mlflow_port})
    for name, port in services.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if alive(name) is None:
                try:
                    probe.bind((HOST, port))
                except OSError as error:
                    raise ServiceError(
                        f"{HOST}:{port}",
                        got=error.strerror,
                        expected=f"a free port for {name}",
                        cure=f"end what uses it, or set MODELSTOCK_{name.upper()}_PORT",
                    ) from error
    if alive("mlflow") is None and not remote:
        # The store is made before the server's process and a stage could both try to.
        MlflowTracker(Path.cwd())
        command = ["mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"]
        start("mlflow", [*command, "--artifacts-destination", str(Path.cwd() / "mlruns")], env)
    if alive("prefect") is None:
        start("prefect", ["prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)], env)
    await_service("prefect", f"http://{HOST}:{prefect_port}/api/health")
    if alive("worker") is None:
        for command in (
            ["work-pool", "create", "modelstock", "--type", "process", "--overwrite"],
            ["--no-prompt", "deploy", "--all"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "prefect", *command], env={**os.environ, **env}, capture_output=True, text=True
            )
            if done.returncode:
                raise ServiceError(
                    f"prefect {' '.join(command)}",
                    got=f"exit code {done.returncode}: {redacted(done.stderr.strip())[-300:]}",
                    expected="0",
                    cure=f"read {FOLDER / 'prefect.log'}",
                )
        _end_lost_runs(env["PREFECT_API_URL"])
        start("worker", ["prefect", "worker", "start", "--pool", "modelstock", "--limit", "1"], env)
    if not remote:
        await_service("mlflow", f"http://{HOST}:{mlflow_port}/health")
    print(f"Prefect: http://{HOST}:{prefect_port}   deployment reproduce/shapes, schedule off until you switch it on")
    print(f"MLflow:  {redacted(env['MLFLOW_TRACKING_URI']) if remote else f'http://{HOST}:{mlflow_port}'}")
    print("`make down` stops them.")


@app.command()
def down() -> None:
    """End the services that `up` started, and nothing else."""
    for name in ("worker", "prefect", "mlflow"):
        pid = alive(name)
        if pid is not None:
            os.killpg(pid, signal.SIGTERM)
            deadline = time.monotonic() + 15
            while alive(name) is not None and time.monotonic() < deadline:
                time.sleep(0.1)
            if alive(name) is not None:
                os.killpg(pid, signal.SIGKILL)
            print(f"{name}: stopped")
        (FOLDER / f"{name}.json").unlink(missing_ok=True)


@app.command()
def status() -> None:
    """Which services run."""
    for name in ("mlflow", "prefect", "worker"):
        pid = alive(name)
        print(f"{name}: {'not running' if pid is None else f'running, process {pid}'}")


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
