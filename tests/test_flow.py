"""The flow over real DVC projects: order, slots, caching, failure, and an end that leaves nothing running."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from flows.graph import FlowError, plan
from flows.progress import TIMES, read_times
from flows.reproduce import GUARD, devices
from flows.services import _ask, alive, started_at
from modelstock.files import write_json

ROOT = Path(__file__).parent.parent
PIPELINE = """
stages:
  a: {cmd: "python log.py a 0.1 > a.txt", deps: [in.txt], outs: [a.txt]}
  b: {cmd: "python log.py b 1.0 > b.txt", deps: [a.txt], outs: [b.txt], meta: {device: 1}}
  c: {cmd: "python log.py c 1.0 > c.txt", deps: [a.txt], outs: [c.txt], meta: {device: 1}}
  d: {cmd: "python log.py d 0.1 > d.txt", deps: [b.txt, c.txt], outs: [d.txt]}
  e: {cmd: "python log.py e 0.1 > e.txt", deps: [in.txt], outs: [e.txt]}
"""
LOG = """
import os, sys, time
name, seconds = sys.argv[1], float(sys.argv[2])
def note(what):
    with open(os.environ.get("LOG", "log"), "a") as file:
        file.write(f"{name} {what} {time.time()}\\n")
note("begin")
time.sleep(seconds)
note("end")
print(name)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "project"
    (folder / ".dvc").mkdir(parents=True)
    (folder / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (folder / "dvc.yaml").write_text(PIPELINE)
    (folder / "log.py").write_text(LOG)
    (folder / "in.txt").write_text("1")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One Prefect server for the module: starting one a flow would cost most of the time."""
    home = tmp_path_factory.mktemp("prefect")
    port = free_port()
    env = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PYTHONPATH": str(ROOT),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{env['PREFECT_API_URL']}/health", timeout=1)
            break
        except OSError:
            time.sleep(0.2)
    yield env
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flow(project, env, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "flows.reproduce", *arguments],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        **options,
    )


def moments(project):
    lines = [line.split() for line in (project / "log").read_text().splitlines()]
    return {(name, what): float(at) for name, what, at in lines}


def test_the_plan_is_dvcs_own(project):
    planned = plan(project, [])
    assert planned.needs["d"] == {"b", "c"}
    assert planned.dirty == {"a", "b", "c", "d", "e"}
    assert planned.device == {"b", "c"}
    order = list(planned.needs)
    assert all(order.index(n) < order.index(name) for name, needs in planned.needs.items() for n in needs)
    assert set(plan(project, ["b"]).needs) == {"a", "b"}


def test_what_depends_on_a_changed_stage_must_run_and_the_rest_need_not(project):
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True, env={**os.environ, "PATH": path()})
    assert plan(project, []).dirty == frozenset()
    assert plan(project, [], force=True).dirty == {"a", "b", "c", "d", "e"}
    (project / "dvc.yaml").write_text(PIPELINE.replace("log.py c 1.0", "log.py c 0.0"))
    assert plan(project, []).dirty == {"c", "d"}


def path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_an_unknown_stage_and_a_folder_that_is_no_project_are_one_line(project, tmp_path):
    with pytest.raises(FlowError, match="targets: got 'f'; expected a, b, c, d, e; name one of these"):
        plan(project, ["f"])
    with pytest.raises(FlowError, match=r"got NotDvcRepoError: .*; expected a DVC project"):
        plan(tmp_path, [])


def test_devices_are_gpus_or_cpu_slots(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices(0) == [{}]
    assert devices(3) == [{}, {}, {}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert devices(0) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert len(devices(3)) == 3


def test_the_flow_keeps_order_and_slots_and_a_second_run_runs_nothing(project, server):
    done = flow(project, server)
    assert done.returncode == 0, done.stderr[-2000:]
    at = moments(project)
    assert at["a", "end"] < min(at["b", "begin"], at["c", "begin"])
    assert at["d", "begin"] > max(at["b", "end"], at["c", "end"])
    first, second = sorted((at[n, "begin"], at[n, "end"]) for n in "bc")
    assert first[1] < second[0]  # one device slot
    (project / "log").unlink()
    (project / "reports").mkdir()
    (project / "reports/comparison.md").write_text("# The table")
    again = flow(project, server)
    assert again.returncode == 0
    assert not (project / "log").exists()
    assert again.stderr.count("Cached(") == 5
    assert "# The table" in again.stdout
    request = urllib.request.Request(
        f"{server['PREFECT_API_URL']}/artifacts/filter",
        method="POST",
        headers={"content-type": "application/json"},
        data=json.dumps({"artifacts": {"key": {"any_": ["comparison"]}}}).encode(),
    )
    with urllib.request.urlopen(request) as answer:
        assert "# The table" in [artifact["data"] for artifact in json.load(answer)]


def test_two_slots_run_two_device_stages_at_once(project, server):
    # Long enough that a busy machine, which starts them seconds apart, still sees them overlap.
    (project / "dvc.yaml").write_text(PIPELINE.replace(" 1.0 >", " 8.0 >"))
    assert flow(project, server, "--slots", "2").returncode == 0
    at = moments(project)
    assert max(at["b", "begin"], at["c", "begin"]) < min(at["b", "end"], at["c", "end"])


def test_the_flow_logs_how_far_it_is_and_how_long_it_will_take(project, server):
    (project / "dvc.yaml").write_text(PIPELINE.replace(" 1.0 >", " 0.1 >"))
    first = flow(project, server)
    assert first.returncode == 0, first.stderr[-2000:]
    written = re.findall(r"stage (\d) of 5: (\w), \d+ s elapsed, (.*)", first.stderr)
    assert [number for number, *_ in written] == ["1", "2", "3", "4", "5"]
    assert (written[0][2], written[-1][1]) == ("no estimate yet", "d")
    assert read_times(project / TIMES).keys() == {"a", "b", "c", "d", "e"}

    write_json(project / TIMES, {"a": 600.0, "c": 120.0, "d": 60.0})
    (project / "dvc.yaml").write_text(PIPELINE.replace(" 1.0 >", " 0.1 >").replace("log.py c 0.1", "log.py c 0.2"))
    second = flow(project, server)
    assert second.returncode == 0
    assert re.search(r"stage \d of 5: c, \d+ s elapsed, about 3 min left", second.stderr)
    times = read_times(project / TIMES)
    assert times["a"] == 600
    assert times["c"] < 120

    # What comes from the cache is as fast as the cache: no time of the stage.
    (project / "dvc.yaml").write_text(PIPELINE.replace(" 1.0 >", " 0.1 >"))
    third = flow(project, server)
    assert "'c' is cached" in third.stderr
    assert re.search(r"stage \d of 5: c, ", third.stderr)
    assert read_times(project / TIMES)["c"] == times["c"]


def test_a_failed_stage_stops_what_needs_it_and_nothing_else(project, server):
    (project / "dvc.yaml").write_text(PIPELINE.replace("python log.py b 1.0 > b.txt", "echo it broke; exit 3"))
    done = flow(project, server)
    assert done.returncode == 1
    assert "it broke" in done.stderr
    assert "error: flow: got not completed: b, d" in done.stderr
    assert {"a", "c", "e"} <= {name for name, _ in moments(project)}
    assert not (project / "d.txt").exists()


REPRO = [sys.executable, "-m", "flows.dvc_repro", "-q"]
# Another job, for some seconds.
SLEEP = """
import sys, time
from flows.workspace import ready
with ready(f"sleep {sys.argv[1]}"):
    time.sleep(float(sys.argv[1]))
"""
JOB = [sys.executable, "-c", SLEEP]


def test_bad_params_are_refused_before_dvc_deletes_an_output(project, server):
    (project / "dvc.yaml").write_text("stages: {a: {cmd: python log.py a 0 > a.txt, params: [threads], outs: [a.txt]}}")
    (project / "params.yaml").write_text("threads: 0")
    (project / "a.txt").write_text("precious")
    for command in (REPRO, [sys.executable, "-m", "flows.reproduce"]):
        done = subprocess.run(command, cwd=project, env=server, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert done.stderr.startswith("error: params.yaml: got ")
        assert (project / "a.txt").read_text() == "precious"


def test_a_second_job_in_a_workspace_is_refused_at_once_and_says_who_is_at_work(project, server):
    with subprocess.Popen([*JOB, "300"], cwd=project, env=server) as first:
        lock = project / ".dvc/tmp/modelstock.lock"
        assert within(30, lambda: lock.exists() and lock.read_text())
        for command in (REPRO, [sys.executable, "-m", "flows.reproduce"]):
            done = subprocess.run(command, cwd=project, env=server, capture_output=True, text=True)
            assert (done.returncode, done.stderr.count("\n")) == (2 if "flows.reproduce" in command else 1, 1)
            assert f"got another job at work: process {first.pid}, `sleep 300`, since 20" in done.stderr
        first.kill()
    assert subprocess.run([*JOB, "0"], cwd=project, env=server).returncode == 0


def test_what_dvc_knows_about_files_lies_in_a_private_folder(project, server):
    env = {name: value for name, value in server.items() if name != "DVC_SITE_CACHE_DIR"}
    assert subprocess.run([*REPRO, "a"], cwd=project, env=env).returncode == 0
    site = project / ".dvc/tmp/site"
    assert oct(site.stat().st_mode)[-3:] == "700"
    assert (site / "repo").is_dir()


def test_a_stage_that_runs_already_is_not_started_again_and_its_neighbour_is(project, server):
    script = "import sys, time; from stages import run; run(lambda seed: time.sleep(float(seed)))"
    (project / "stage.py").write_text(script)
    stage = [sys.executable, "stage.py"]
    with subprocess.Popen([*stage, "300"], cwd=project, env=server) as first:
        assert within(60, lambda: any(f.read_text() for f in (project / "scratch").rglob("stage-*")))
        again = subprocess.run([*stage, "300"], cwd=project, env=server, capture_output=True, text=True)
        assert (again.returncode, again.stderr.count("\n")) == (1, 1)
        assert f"got another job at work: process {first.pid}, `stage 300`" in again.stderr
        assert subprocess.run([*stage, "0"], cwd=project, env=server).returncode == 0
        first.kill()


def test_a_prefect_server_that_does_not_answer_is_one_line_without_its_password(project, server):
    env = {**server, "PREFECT_API_URL": "http://user:sesame@127.0.0.1:9/api"}
    done = flow(project, env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr[-2000:]
    assert done.stderr.startswith("error: Prefect at http://***@127.0.0.1:9/api: got ")
    assert "sesame" not in done.stderr


def test_a_stage_that_is_not_there_is_one_line_before_the_flow_starts(project, server):
    done = flow(project, server, "f")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
    assert done.stderr.startswith("error: targets: got 'f'; expected a, b, c, d, e;")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"pid": 1, "started": null}'])
def test_a_damaged_note_of_a_service_is_no_service(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".services").mkdir()
    (tmp_path / ".services/worker.json").write_bytes(content)
    assert alive("worker") is None


# A stage with a process below it that has a session of its own, as torchrun's workers have.
DEEP = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
open("begun", "w").close()
time.sleep(300)
"""


def marked(mark: str) -> list[psutil.Process]:
    """The processes that have this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if mark in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def within(seconds: float, check) -> bool:
    deadline = time.monotonic() + seconds
    while not check() and time.monotonic() < deadline:
        time.sleep(0.1)
    return check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_outlives_a_flow_neither_its_stages_nor_its_own_server(project, tmp_path, number):
    (project / "dvc.yaml").write_text("stages: {deep: {cmd: python deep.py, outs: [never]}}")
    (project / "deep.py").write_text(DEEP)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.reproduce"],
        cwd=project,
        env={**env, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path / "prefect"), "MARK": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Where the tests run in a shell's background, SIGINT is ignored, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert within(120, (project / "begun").exists)
        commands = [" ".join(p.cmdline()) for p in marked(str(tmp_path))]
        assert any("uvicorn" in command for command in commands)
        assert any("time.sleep(300)" in command for command in commands)
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
        assert within(15, lambda: not marked(str(tmp_path))), [p.cmdline() for p in marked(str(tmp_path))]
    finally:
        for left in marked(str(tmp_path)):
            left.kill()


def test_a_guard_gives_its_commands_exit_code_and_ends_what_the_command_leaves_running(tmp_path):
    script = "import subprocess, sys; subprocess.Popen(['sleep', '300'], start_new_session=True); sys.exit(7)"
    env = {**os.environ, "MARK": str(tmp_path)}
    with subprocess.Popen([*GUARD, sys.executable, "-c", script], env=env, stdin=subprocess.PIPE) as guard:
        assert guard.wait(timeout=60) == 7
    assert marked(str(tmp_path)) == []


def read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_a_stores_password_is_not_shown_by_the_services_and_their_folder_is_private(tmp_path):
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PREFECT"))},
        "MLFLOW_TRACKING_URI": "mysql+none://user:sesame@127.0.0.1:9/runs",
        "MODELSTOCK_PREFECT_PORT": str(free_port()),
        "MODELSTOCK_MLFLOW_PORT": str(free_port()),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "flows.services", "up"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "error: MLflow at mysql+none://***@127.0.0.1:9/runs" in done.stderr
    assert "sesame" not in done.stdout + done.stderr
    assert oct((tmp_path / ".services").stat().st_mode)[-3:] == "700"


def kill(folder: Path, service: str) -> None:
    pid = json.loads((folder / f".services/{service}.json").read_text())["pid"]
    os.killpg(pid, signal.SIGKILL)
    assert within(10, lambda: started_at(pid) is None)


def got(url: str):
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def test_services_start_deploy_and_stop(tmp_path):
    for name in ("flows", "modelstock", "stages"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "prefect.yaml").write_text((ROOT / "prefect.yaml").read_text())
    prefect, mlflow = free_port(), free_port()
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "PREFECT"))},
        "MODELSTOCK_PREFECT_PORT": str(prefect),
        "MODELSTOCK_MLFLOW_PORT": str(mlflow),
        "PYTHONPATH": str(ROOT),
    }

    def services(command):
        return subprocess.run(
            [sys.executable, "-m", "flows.services", command], cwd=tmp_path, env=env, capture_output=True, text=True
        )

    try:
        begun = services("up")
        assert begun.returncode == 0, begun.stderr
        with urllib.request.urlopen(f"http://127.0.0.1:{prefect}/api/deployments/name/reproduce/shapes") as answer:
            deployment = json.load(answer)
        schedules = [(s["active"], s["schedule"]["cron"], s["schedule"]["timezone"]) for s in deployment["schedules"]]
        assert schedules == [(False, "0 2 * * *", "UTC")]
        assert deployment["enforce_parameter_schema"]
        assert "slots" in json.dumps(deployment["parameter_openapi_schema"])
        with urllib.request.urlopen(f"http://127.0.0.1:{mlflow}/health") as answer:
            assert answer.status == 200
        assert services("status").stdout.count("running, process") == 3
        # A run holds the deployment's slot; its worker and the server, which leases the slot, are killed.
        api = f"http://127.0.0.1:{prefect}/api"
        kill(tmp_path, "worker")
        lost = _ask(f"{api}/deployments/{deployment['id']}/create_flow_run", {})["id"]
        _ask(f"{api}/flow_runs/{lost}/set_state", {"state": {"type": "PENDING"}})
        limit = f"{api}/v2/concurrency_limits/deployment:{deployment['id']}"
        assert got(limit)["active_slots"] == 1
        kill(tmp_path, "prefect")
        begun = services("up")
        assert begun.returncode == 0, begun.stderr
        assert got(f"{api}/flow_runs/{lost}")["state"]["type"] == "CRASHED"
        assert got(limit)["active_slots"] == 0
        pids = [json.loads(p.read_text())["pid"] for p in (tmp_path / ".services").glob("*.json")]
        # Everyone on the machine may read these; a store's URL may carry a password.
        assert not [p for p in pids if b"mlflow.db" in read(Path(f"/proc/{p}/cmdline"))]
    finally:
        ended = services("down")
    assert ended.stdout.count("stopped") == 3
    time.sleep(0.5)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists() and read(Path(f"/proc/{pid}/cmdline")) != b""] == []
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        env["MODELSTOCK_MLFLOW_PORT"] = str(busy.getsockname()[1])
        refused = services("up")
    assert refused.returncode == 1
    assert "expected a free port for mlflow; end what uses it, or set MODELSTOCK_MLFLOW_PORT" in refused.stderr
    assert services("status").stdout.count("not running") == 3
