"""The MLflow UI, a Prefect server with the deployments, and a worker, on 127.0.0.1: `make up`, `make status`,
`make down`. On a head machine (`make head`) flows/head.py says on which databases, with which passwords, and where."""

import base64
import contextlib
import errno
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
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from ruamel.yaml import YAML

from flows import head
from flows.command import run_command
from modelstock.errors import ModelstockError, ParamsError, TrackingError, redacted
from modelstock.files import write_json
from modelstock.params import load_params
from modelstock.tracking.mlflow import MlflowTracker, store_uri

app = typer.Typer(add_completion=False, no_args_is_help=True)
FOLDER = Path(".services")
HOST = "127.0.0.1"
FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # in the environment of the processes that Prefect runs a flow in
GRACE_S = 30  # for a flow run to end its stages and to report its end


class ServiceError(ModelstockError):
    """A service cannot start."""


def started_at(pid: int) -> str | None:
    """The moment a process started, in clock ticks since boot; None for one that is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _note(name: str) -> dict[str, Any]:
    """What `start` wrote of a service; empty where there is nothing, or something damaged."""
    try:
        note = json.loads((FOLDER / f"{name}.json").read_bytes())
        return note if isinstance(note, dict) else {}
    except (OSError, ValueError):
        return {}


def alive(name: str) -> int | None:
    """The pid of a service that we started and that still runs: a pid used again by another process is not it."""
    note = _note(name)
    pid, started = note.get("pid"), note.get("started")
    return pid if isinstance(pid, int) and started is not None and started_at(pid) == started else None


def api_of(port: int, host: str = HOST) -> str:
    """The address of the API of a Prefect server on this machine."""
    return f"http://{host}:{port}/api"


def _api() -> str | None:
    """The address of the Prefect server that `up` started last, whether it runs or not."""
    note = _note("prefect")
    port = note.get("port")
    return api_of(port, note.get("host", HOST)) if isinstance(port, int) else None


def start(
    name: str,
    command: list[str],
    env: dict[str, str],
    *,
    port: int = 0,
    umask: int = -1,
    about: Mapping[str, str] | None = None,
) -> None:
    """Start a service in its own session, its output in `.services/<name>.log`; `umask`: another than ours; `about`:
    what its note says besides.

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
            umask=umask,
        )
    note = {"pid": process.pid, "started": started_at(process.pid), "port": port, **(about or {})}
    write_json(FOLDER / f"{name}.json", note)


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


def _ask(url: str, body: dict[str, Any] | None = None, *, method: str | None = None) -> Any:
    """The answer of Prefect's API, with a body to a POST; asked again for a while where its database is busy."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **_authorization(_note("prefect").get("auth"))}
    request = urllib.request.Request(url, data, headers, method=method)
    deadline = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as error:
            if error.code != http.HTTPStatus.SERVICE_UNAVAILABLE or time.monotonic() > deadline:
                raise
            time.sleep(1)


def _authorization(user_and_password: str | None) -> dict[str, str]:
    """The header by which a server knows a user."""
    if not user_and_password:
        return {}
    return {"authorization": f"Basic {base64.b64encode(user_and_password.encode()).decode()}"}


def _deployments(api: str) -> list[dict[str, Any]]:
    """What this project has deployed: none before the first `up`."""
    found: list[dict[str, Any]] = _ask(f"{api}/deployments/filter", {"flows": {"name": {"any_": ["reproduce"]}}})
    return found


def _flow_processes(api: str) -> dict[int, str]:
    """The processes on this machine that belong to flow runs of this server: pid -> the run's id."""
    processes = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            env = process.environ()
            if env.get("PREFECT_API_URL") == api and FLOW_RUN in env and process.status() != psutil.STATUS_ZOMBIE:
                processes[process.pid] = env[FLOW_RUN]
    return processes


def _end_flow_processes(api: str) -> None:
    """End what runs of flows here: each run ends its stages and reports that it has ended."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_S
        for pid in _flow_processes(api):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while _flow_processes(api) and time.monotonic() < deadline:
            time.sleep(0.2)


def _end_lost_runs(api: str, reason: str) -> None:
    """Mark the deployments' runs that no process runs any more as ended, and free their slots: a slot that a lost run
    keeps would block its deployment for good."""
    running = set(_flow_processes(api).values())
    pending = [] if alive("worker") else ["PENDING"]  # a worker takes a run before it starts its process
    for deployment in _deployments(api):
        mine = {"deployments": {"id": {"any_": [deployment["id"]]}}}
        runs = _ask(f"{api}/flow_runs/filter", {**mine, "flow_runs": _in([*pending, "RUNNING", "CANCELLING"])})
        for run in runs:
            if run["id"] not in running:
                _end(f"{api}/flow_runs/{run['id']}", reason, cancelled=run["state_type"] == "CANCELLING")
        # Tasks that could not tell how they ended, also of runs that could.
        over = {**mine, "flow_runs": _in(["CANCELLED", "COMPLETED", "CRASHED", "FAILED"])}
        for task in _ask(f"{api}/task_runs/filter", {**over, "task_runs": _in(["PENDING", "RUNNING"])}):
            _end(f"{api}/task_runs/{task['id']}", reason)
        if pending and not any(run["id"] in running for run in runs):
            # Also a slot of a run that was deleted, or whose lease a server took to its end.
            with contextlib.suppress(urllib.error.HTTPError):  # no limit
                _ask(f"{api}/v2/concurrency_limits/deployment:{deployment['id']}", {"active_slots": 0}, method="PATCH")


def _in(states: list[str]) -> dict[str, Any]:
    """Prefect's filter for runs in one of these states."""
    return {"state": {"type": {"any_": states}}}


def _end(run: str, reason: str, *, cancelled: bool = False) -> None:
    """Mark a run of a flow or a task as crashed, or as cancelled where that was asked for."""
    state = {"type": "CANCELLED" if cancelled else "CRASHED", "message": reason}
    _ask(f"{run}/set_state", {"state": state, "force": True})


def _skip_missed_runs(api: str) -> None:
    """Of the runs that schedules had while no worker ran, keep the last: it does the work of all."""
    for deployment in _deployments(api):
        due = {"next_scheduled_start_time": {"before_": datetime.now(UTC).isoformat()}, **_in(["SCHEDULED"])}
        body = {"deployments": {"id": {"any_": [deployment["id"]]}}, "flow_runs": due}
        runs = _ask(f"{api}/flow_runs/filter", {**body, "sort": "EXPECTED_START_TIME_DESC"})
        for run in [run for run in runs if run["auto_scheduled"]][1:]:
            _ask(f"{api}/flow_runs/{run['id']}", method="DELETE")


def _schedule_text(schedule: dict[str, Any]) -> str:
    """A schedule as a person reads it, with its state."""
    when = schedule["schedule"]
    rule = next((f"{key} {when[key]}" for key in ("cron", "rrule", "interval") if when.get(key)), "?")
    return f"{'on' if schedule['active'] else 'off'} ({rule}, {when.get('timezone') or 'UTC'})"


def _schedules(api: str) -> list[str]:
    """A line per deployment: its schedules as they are now, whoever set them."""
    lines = []
    for deployment in _deployments(api):
        schedules = deployment["schedules"]
        text = ", ".join(map(_schedule_text, schedules)) or "none"
        paused = ", the deployment is paused" if deployment["paused"] else ""
        lines.append(f"deployment reproduce/{deployment['name']}, schedule {text}{paused}")
    return lines


def _deploy(env: dict[str, str]) -> None:
    """Create the work pool and the deployments, or bring them up to date.

    A schedule in prefect.yaml is that of the first time: later ones are what was set in the UI, and are left alone.

    Raises:
        ServiceError: Prefect refuses.
    """
    config = YAML().load(Path("prefect.yaml").read_text(encoding="utf-8"))
    known = {deployment["name"] for deployment in _deployments(env["PREFECT_API_URL"])}
    for deployment in config["deployments"]:
        if deployment["name"] in known:
            deployment.pop("schedules", None)
    file = FOLDER / "deployments.yaml"
    with open(file, "w", encoding="utf-8") as stream:
        YAML().dump(config, stream)
    for command in (
        ["work-pool", "create", "modelstock", "--type", "process", "--overwrite"],
        ["--no-prompt", "deploy", "--all", "--prefect-file", str(file)],
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


def _holder(port: int) -> str:
    """Which process listens on a port, as far as this user may see."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr[1] == port:
                if connection.pid is None:
                    break
                return f"used by {psutil.Process(connection.pid).name()}, process {connection.pid}"
    return "used by a process of another user"


def environment(prefect: int, mlflow: int) -> dict[str, str]:
    """What the servers, the worker and the flows it runs share."""
    root = Path.cwd()
    store = store_uri(root)
    return {
        "PREFECT_HOME": str(root / FOLDER / "prefect"),
        "PREFECT_API_URL": api_of(prefect),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # In files, a slot's lease outlives the server, and ends some minutes after the run that renewed it.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # The stages write to the store itself: it is local, and a hard link then stands for a copy.
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_BACKEND_STORE_URI": store,
        "MODELSTOCK_MLFLOW_URL": store if store.startswith("http") else f"http://{HOST}:{mlflow}",  # where people look
    }


class Profile(StrEnum):
    """What the services are for."""

    local = "local"
    head = "head"


PrefectPort = Annotated[int, typer.Option(envvar="MODELSTOCK_PREFECT_PORT")]
MlflowPort = Annotated[int, typer.Option(envvar="MODELSTOCK_MLFLOW_PORT")]
ProfileOption = Annotated[
    Profile, typer.Option(help="local: this machine; head: the head of several, docs/cluster.md.")
]
Pool = Annotated[str, typer.Option(help="The work pool that GPU machines join; of profile head.")]


@app.command()
def up(
    prefect_port: PrefectPort = 4200,
    mlflow_port: MlflowPort = 5000,
    profile: ProfileOption = Profile.local,
    pool: Pool = "gpu",
) -> None:
    """Start what does not run yet, deploy the flow, and print where to look."""
    if profile is Profile.head:
        if pool == "modelstock":
            got, expected = "modelstock, the pool of the head itself", "a pool that GPU machines join"
            raise ServiceError("--pool", got=got, expected=expected, cure="choose another name, as gpu")
        settings = head.head_settings(prefect_port, mlflow_port)
        head.check(settings)
        _up_head(settings, pool)
    else:
        _up_local(prefect_port, mlflow_port)


def _private_folder() -> int:
    """Make `.services`; from here on logs, notes and stores are their owner's alone. Returns the umask before."""
    umask = os.umask(0o077)
    FOLDER.mkdir(exist_ok=True)
    FOLDER.chmod(0o700)
    return umask


def _same_settings(settings: str | None) -> None:
    """Refuse to add to services that run with other settings: None for those of profile local.

    Raises:
        ServiceError: one runs.
    """
    for name in ("prefect", "mlflow", "worker"):
        if alive(name) is not None and _note(name).get("settings") != settings:
            mine = Profile.local if settings is None else Profile.head
            profile = Profile.local if _note(name).get("settings") is None else Profile.head
            raise ServiceError(
                f"--profile {mine}",
                got=f"{name} that runs with " + ("other settings" if profile is mine else f"profile {profile}"),
                expected="services with these settings, or none",
                cure="end them first: make down",
            )


def _free(host: str, port: int, name: str) -> None:
    """Refuse a port that another process holds.

    Raises:
        ServiceError: it is not free, or the address is not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if alive(name) is None:
            try:
                probe.bind((host, port))
            except OSError as error:
                used = error.errno == errno.EADDRINUSE
                raise ServiceError(
                    f"{host}:{port}",
                    got=_holder(port) if used else error.strerror,
                    expected=f"a free port for {name}",
                    cure=f"end that process, or set MODELSTOCK_{name.upper()}_PORT",
                ) from error


def _up_local(prefect_port: int, mlflow_port: int) -> None:
    umask = _private_folder()
    _same_settings(None)
    if alive("prefect") is not None:
        prefect_port = _note("prefect").get("port") or prefect_port
    env = environment(prefect_port, mlflow_port)
    remote = env["MLFLOW_TRACKING_URI"].startswith("http")  # a server that runs elsewhere
    services = {"prefect": prefect_port} | ({} if remote else {"mlflow": mlflow_port})
    for name, port in services.items():
        _free(HOST, port, name)
    if alive("mlflow") is None and not remote:
        # The store is made before the server's process and a stage could both try to.
        MlflowTracker(Path.cwd())
        command = ["mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1"]
        start("mlflow", [*command, "--artifacts-destination", str(Path.cwd() / "mlruns")], env)
    if alive("prefect") is None:
        command = ["prefect", "server", "start", "--host", HOST, "--port", str(prefect_port)]
        start("prefect", command, env, port=prefect_port)
    await_service("prefect", f"http://{HOST}:{prefect_port}/api/health")
    _start_worker(env, umask=umask)
    if not remote:
        await_service("mlflow", f"http://{HOST}:{mlflow_port}/health")
    for line in _schedules(env["PREFECT_API_URL"]):
        print(f"Prefect: http://{HOST}:{prefect_port}   {line}")
    print(f"MLflow:  {redacted(env['MLFLOW_TRACKING_URI']) if remote else f'http://{HOST}:{mlflow_port}'}")
    for line in _comparison_links(env):
        print(line)
    print("`make down` stops them.")


def _start_worker(env: dict[str, str], *, umask: int, about: Mapping[str, str] | None = None) -> None:
    """Deploy the flow, repair what is lost, and start the worker that runs the deployments here."""
    api = env["PREFECT_API_URL"]
    _deploy(env)
    _end_lost_runs(api, "its process is gone")
    if alive("worker") is None:
        _skip_missed_runs(api)
        command = ["prefect", "worker", "start", "--pool", "modelstock", "--limit", "1"]
        start("worker", command, env, umask=umask, about=about)  # what its flows write is as the user has it


def _up_head(settings: head.Head, pool: str) -> None:
    umask, root, host = _private_folder(), Path.cwd(), settings.host
    about = {"settings": settings.fingerprint}
    _same_settings(settings.fingerprint)
    _free(host, settings.prefect_port, "prefect")
    _free(host, settings.mlflow_port, "mlflow")
    head.hide()
    env = settings.clients(root, FOLDER)
    if alive("mlflow") is None:
        options, its_env = settings.mlflow_server(root, FOLDER)
        command = ["mlflow", "server", "--host", host, "--port", str(settings.mlflow_port), "--workers", "1"]
        start("mlflow", [*command, *options], its_env, about=about)
    if alive("prefect") is None:
        command = ["prefect", "server", "start", "--host", host, "--port", str(settings.prefect_port)]
        about_prefect = {**about, "host": settings.near, "auth": settings.prefect_auth}
        start("prefect", command, {**env, **settings.prefect_server()}, port=settings.prefect_port, about=about_prefect)
    await_service("prefect", f"{env['PREFECT_API_URL']}/health")
    await_service("mlflow", f"{env['MLFLOW_TRACKING_URI']}/health")
    _log_in(settings, env["MLFLOW_TRACKING_URI"])
    os.environ.update(env)  # for what follows, which reads it there
    file = settings.write_environment(root, FOLDER)
    _start_worker(env, umask=umask, about=about)
    _deploy_stages(pool)
    for line in _schedules(env["PREFECT_API_URL"]):
        print(f"Prefect: http://{settings.far}:{settings.prefect_port}   {line}")
    print(f"MLflow:  {env['MODELSTOCK_MLFLOW_URL']}, artifacts in {settings.artifacts}")
    for line in [*_comparison_links(env), *settings.joining(pool)]:
        print(line)
    print(f"A run: . {file} && python -m flows.reproduce --pool {pool}")
    print("`make down` stops them.")


def _log_in(settings: head.Head, url: str) -> None:
    """Refuse a user or a password that MLflow does not know: it keeps those that its database was made with.

    Raises:
        ServiceError: it does not.
    """
    headers = _authorization(f"{settings.mlflow_user}:{settings.mlflow_password}" if settings.mlflow_user else None)
    request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30):
            return
    except urllib.error.HTTPError as error:
        if error.code not in (http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN):
            return
        raise ServiceError(
            f"{head.MLFLOW_USER} and {head.MLFLOW_PASSWORD}",
            got="a password that MLflow refuses",
            expected="that of its database, which keeps the first one",
            cure="make down, then start with the first one; docs/cluster.md says how to change it",
        ) from error


def _deploy_stages(pool: str) -> None:
    """Create the work pool that GPU machines join, and what runs a stage there."""
    from flows.pool import deploy  # late: importing Prefect fixes its settings, which the environment now has

    deploy(pool)


def _comparison_links(env: Mapping[str, str]) -> list[str]:
    """Where MLflow shows the latest comparison; nothing where there is none, or the settings name no experiment."""
    try:
        tracking = load_params().tracking
        if tracking.tracker == "mlflow":
            return MlflowTracker(Path.cwd(), tracking.experiment).links(env["MODELSTOCK_MLFLOW_URL"])
    except (ParamsError, TrackingError) as error:
        return [f"warning: {error}"]
    return []


def _stop(name: str) -> bool:
    """End a service; whether it ran."""
    pid = alive(name)
    if pid is not None:
        os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + 15
        while alive(name) is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        if alive(name) is not None:
            os.killpg(pid, signal.SIGKILL)
    (FOLDER / f"{name}.json").unlink(missing_ok=True)
    return pid is not None


@app.command()
def down() -> None:
    """End the services that `up` started and the flow runs of its worker, and nothing else."""
    api = _api()
    if api is not None:
        _end_flow_processes(api)  # while there is a server to tell, and a worker that waits for them
    stopped = {"worker": _stop("worker")}
    if api is not None:
        _end_flow_processes(api)  # one that the worker has just begun
        if answers(f"{api}/health"):
            _end_lost_runs(api, "ended by `make down`")
    stopped |= {name: _stop(name) for name in ("prefect", "mlflow")}
    for secret in head.SECRETS:
        (FOLDER / secret).unlink(missing_ok=True)
    for name, ran in stopped.items():
        if ran:
            print(f"{name}: stopped")


@app.command()
def status() -> None:
    """Which services run, the schedules, and how many runs are going on."""
    for name in ("mlflow", "prefect", "worker"):
        pid = alive(name)
        print(f"{name}: {'not running' if pid is None else f'running, process {pid}'}")
    api = _api()
    if api is not None and answers(f"{api}/health"):
        for line in _schedules(api):
            print(line)
        for run in sorted(set(_flow_processes(api).values())):
            print(f"flow run {_ask(f'{api}/flow_runs/{run}')['name']}: running")


if __name__ == "__main__":
    run_command(app)
