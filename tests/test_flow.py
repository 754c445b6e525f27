"""The flow over real DVC projects: order, slots, caching, failure, and an end that leaves nothing running."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flows.children import GUARD
from flows.graph import FlowError, choices, plan
from flows.progress import TIMES, read_times
from flows.services import _ask, alive
from modelstock.files import write_json
from tests.support.cluster import prefect_server
from tests.support.ports import free_port

ROOT = Path(__file__).parent.parent
PIPELINE = """
stages:
  a: {cmd: "python log.py a 0.1 > a.txt", deps: [in.txt], outs: [a.txt]}
  b: {cmd: "python log.py b 1.0 > b.txt", deps: [a.txt], outs: [b.txt], meta: {device: 1}}
  c: {cmd: "python log.py c 1.0 > c.txt", deps: [a.txt], outs: [c.txt], meta: {device: 1}}
  d: {cmd: "python log.py d 0.1 > d.txt", deps: [b.txt, c.txt], outs: [d.txt]}
  e: {cmd: "python log.py e 0.1 > e.txt", deps: [in.txt], outs: [e.txt]}
"""
SEEDS = """
stages:
  prepare: {cmd: "cp in.txt prepare.txt", deps: [in.txt], outs: [prepare.txt]}
  finetune:
    foreach: [0, 1]
    do: {cmd: "cp prepare.txt ${item}.txt", deps: [prepare.txt], outs: ["${item}.txt"]}
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


SHARE = {"value": 0.8, "low": 0.75, "high": 0.85}
LESS = {"value": 0.6, "low": 0.55, "high": 0.65}
COMPARISON = {
    "champion": "uniform/0-1",
    "advice": "**Advised:** ship **uniform/0-1**.",
    "in_distribution": "shapes",
    "held_out": "held-out",
    "shifts": ["sketch"],
    "summaries": ["in-distribution", "shifts"],
    "lines": [
        {
            "name": "uniform of 2, mean of 3",
            "size": 2,
            "accuracy": {"shapes": SHARE, "sketch": LESS},
            "summary": {"in-distribution": SHARE, "shifts": LESS},
        }
    ],
}


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
    with prefect_server(home) as api:
        yield {
            **os.environ,
            **api,
            "PREFECT_HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "true",
        }


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
    everything = plan(project, [], force=True)
    assert everything.dirty == everything.forced == {"a", "b", "c", "d", "e"}
    (project / "dvc.yaml").write_text(PIPELINE.replace("log.py c 1.0", "log.py c 0.0"))
    assert plan(project, []).dirty == {"c", "d"}


def test_by_force_runs_what_was_named_and_not_what_it_needs(project):
    subprocess.run([sys.executable, "-m", "dvc", "repro", "-q"], check=True, env={**os.environ, "PATH": path()})
    forced = plan(project, ["b"], force=True)
    assert (set(forced.needs), forced.dirty, forced.forced) == ({"a", "b"}, {"b"}, {"b"})
    # What depends on it is looked at where it was named too, and runs if the outputs changed.
    both = plan(project, ["b", "d"], force=True)
    assert (both.dirty, both.forced) == ({"b", "d"}, {"b", "d"})
    assert plan(project, ["a", "d"], force=True).dirty == {"a", "b", "c", "d"}


def test_stages_are_named_one_by_one_or_by_their_kind(project):
    (project / "dvc.yaml").write_text(SEEDS)
    assert choices(project) == ["prepare", "finetune", "finetune@0", "finetune@1"]
    assert set(plan(project, ["finetune"]).needs) == {"prepare", "finetune@0", "finetune@1"}
    assert set(plan(project, ["finetune@1"]).needs) == {"prepare", "finetune@1"}
    with pytest.raises(FlowError, match=r"got 'finetun@1'; expected prepare, finetune, or .*; did you mean finetune@1"):
        plan(project, ["finetun@1"])


def path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def test_an_unknown_stage_and_a_folder_that_is_no_project_are_one_line(project, tmp_path):
    with pytest.raises(FlowError, match="targets: got 'f'; expected a, b, c, d, e, or one stage of these; choose one"):
        plan(project, ["f"])
    with pytest.raises(FlowError, match=r"got NotDvcRepoError: .*; expected a DVC project"):
        plan(tmp_path, [])


def test_the_flow_keeps_order_and_slots_and_a_second_run_runs_nothing(project, server):
    done = flow(project, server)
    assert done.returncode == 0, done.stderr[-2000:]
    at = moments(project)
    assert at["a", "end"] < min(at["b", "begin"], at["c", "begin"])
    assert at["d", "begin"] > max(at["b", "end"], at["c", "end"])
    first, second = sorted((at[n, "begin"], at[n, "end"]) for n in "bc")
    assert first[1] < second[0]  # one device slot
    assert task_runs(server, done) == dict.fromkeys("abcde", "COMPLETED")
    (project / "log").unlink()
    again = flow(project, server)
    assert (again.returncode, again.stdout, again.stderr) == (0, "stages up to date: 5 of 5, nothing to run\n", "")
    assert not (project / "log").exists()


def ask(server, path: str, body: dict):
    return _ask(f"{server['PREFECT_API_URL']}/{path}/filter", body)


def task_runs(server, done) -> dict[str, str]:
    """The tasks of the flow run that was logged, by name, with their states."""
    run = re.search(r"/flow-run/([0-9a-f-]{36})", done.stderr)[1]
    return {t["name"]: t["state_type"] for t in ask(server, "task_runs", {"flow_runs": {"id": {"any_": [run]}}})}


def test_a_stage_that_waits_for_a_device_is_no_task_that_runs(project, server):
    (project / "dvc.yaml").write_text(PIPELINE.replace(" 1.0 >", " 8.0 >"))
    env = {**server, "PREFECT_LOGGING_LEVEL": "INFO"}
    with subprocess.Popen(
        [sys.executable, "-m", "flows.reproduce"], cwd=project, env=env, stderr=subprocess.PIPE, text=True
    ) as process:
        written = ""
        while not re.search(r"> python log.py [bc] ", written):
            written += process.stderr.readline()
        run = re.search(r"/flow-run/([0-9a-f-]{36})", written)[1]
        states = {"PENDING", "RUNNING"}
        of_run = {"flow_runs": {"id": {"any_": [run]}}}
        assert within(5, lambda: "RUNNING" in {t["state_type"] for t in ask(server, "task_runs", of_run)})
        active = [t["name"] for t in ask(server, "task_runs", of_run) if t["state_type"] in states]
        assert len({"b", "c"} & set(active)) == 1
        assert not [name for name in active if name.startswith("stage")]
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
    assert within(10, lambda: "CANCELLED" in {t["state_type"] for t in ask(server, "task_runs", of_run)})
    assert "FAILED" not in {t["state_type"] for t in ask(server, "task_runs", of_run)}


def test_a_forced_stage_runs_and_what_it_needs_does_not(project, server):
    assert flow(project, server).returncode == 0
    (project / "log").unlink()
    forced = flow(project, server, "b", "--force")
    assert forced.returncode == 0, forced.stderr[-2000:]
    assert {name for name, _ in moments(project)} == {"b"}


# What a stage does that keeps a resume point: the steps that it takes, and the point, which a kill leaves behind.
STEPS = """
from pathlib import Path
from modelstock.files import SCRATCH
point = SCRATCH / "finetune/key/step"
step = int(point.read_text()) if point.exists() else 0
print(f"from step {step} of 9")
point.parent.mkdir(parents=True, exist_ok=True)
point.write_text("9")
Path("a.txt").write_text("weights")
"""


def test_a_forced_stage_goes_on_from_no_resume_point(project, server):
    (project / "dvc.yaml").write_text("stages: {a: {cmd: python steps.py, outs: [a.txt]}}")
    (project / "steps.py").write_text(STEPS)
    assert "from step 0 of 9" in flow(project, server).stderr
    assert (project / "scratch/finetune/key/step").read_text() == "9"
    assert "from step 0 of 9" in flow(project, server, "--force").stderr
    by_dvc = [sys.executable, "-m", "flows.dvc_repro", "--force"]
    assert "from step 0 of 9" in subprocess.run(by_dvc, env=server, capture_output=True, text=True).stdout
    assert not list((project / "scratch/forced").iterdir())
    (project / "dvc.yaml").write_text("stages: {a: {cmd: python steps.py , outs: [a.txt], desc: b, deps: [in.txt]}}")
    assert "from step 9 of 9" in flow(project, server).stderr


def test_the_comparison_is_shown_by_the_run_that_made_it_and_by_no_other(project, server):
    (project / "compare.py").write_text(
        f"import json, os; os.makedirs('reports', exist_ok=True)\n"
        f"open('reports/comparison.json', 'w').write(json.dumps({COMPARISON!r}))\n"
        "open('reports/figure.png', 'wb').write(b'png')"
    )
    (project / "dvc.yaml").write_text(
        "stages:\n"
        "  compare: {cmd: python compare.py, deps: [in.txt], outs: [reports]}\n"
        "  other: {cmd: echo 1 > o, outs: [o]}\n"
    )
    env = {**server, "MODELSTOCK_MLFLOW_URL": "http://127.0.0.1:5000"}
    done = flow(project, env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "Comparison: reports/comparison.html\n"
    run = re.search(r"/flow-run/([0-9a-f-]{36})", done.stderr)[1]
    shown = {a["key"]: a["data"] for a in ask(server, "artifacts", {"artifacts": {"flow_run_id": {"any_": [run]}}})}
    assert shown.keys() == {"comparison", "comparison-figure"}
    lines = [line for line in shown["comparison"].splitlines() if line.startswith("|")]
    assert lines == [
        "| weights | seeds | mean of shifts | shapes | held-out | sketch |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| uniform of 2, mean of 3 | 2 | 60.0 ± 5.0 | 80.0 ± 5.0 |  | 60.0 |",
    ]
    assert "[MLflow](http://127.0.0.1:5000)" in shown["comparison"]
    assert json.dumps(shown["comparison-figure"]) == '"data:image/png;base64,cG5n"'
    other = flow(project, env, "other", "--force")
    run = re.search(r"/flow-run/([0-9a-f-]{36})", other.stderr)[1]
    assert ask(server, "artifacts", {"artifacts": {"flow_run_id": {"any_": [run]}}}) == []


def test_two_slots_run_two_device_stages_at_once(project, server):
    # Long enough that a busy machine, which starts them seconds apart, still sees them overlap.
    (project / "dvc.yaml").write_text(PIPELINE.replace(" 1.0 >", " 8.0 >"))
    assert flow(project, server, "--slots", "2").returncode == 0
    at = moments(project)
    assert max(at["b", "begin"], at["c", "begin"]) < min(at["b", "end"], at["c", "end"])
    # As after `dvc repro`, and not in the order in which they ended: e did long before b.
    assert at["e", "end"] < at["b", "end"]
    assert re.findall(r"^  (\w):", (project / "dvc.lock").read_text(), re.MULTILINE) == list(plan(project, []).needs)


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


def test_a_bar_that_rewrites_its_line_is_one_line_in_the_log(project, server):
    (project / "bar.py").write_text("print(*(f'\\rbar: {done} of 50' for done in range(51)), sep='', flush=True)")
    (project / "dvc.yaml").write_text("stages: {a: {cmd: python bar.py, deps: [in.txt]}}")
    done = flow(project, server)
    assert done.returncode == 0
    assert re.findall(r"bar: \d+ of 50", done.stderr) == ["bar: 50 of 50"]


def test_an_interrupt_is_one_line_and_the_run_and_its_task_say_how_they_ended(project, server):
    (project / "dvc.yaml").write_text("stages: {a: {cmd: sleep 300, deps: [in.txt], outs: [never]}}")
    with subprocess.Popen(
        [sys.executable, "-m", "flows.reproduce"],
        cwd=project,
        env=server,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        written = ""
        while "> sleep 300" not in written:
            written += process.stderr.readline()
        process.send_signal(signal.SIGINT)
        ended = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in ended
    assert ended.splitlines()[-1] == "interrupted: no stage runs any more, and what is done is not run again"
    run = re.search(r"/flow-run/([0-9a-f-]{36})", written)[1]
    assert _ask(f"{server['PREFECT_API_URL']}/flow_runs/{run}")["state_type"] == "CRASHED"
    of_run = {"flow_runs": {"id": {"any_": [run]}}}
    assert within(10, lambda: [t["state_type"] for t in ask(server, "task_runs", of_run)] == ["CANCELLED"])


def test_a_failed_stage_stops_what_needs_it_and_nothing_else(project, server):
    (project / "dvc.yaml").write_text(PIPELINE.replace("python log.py b 1.0 > b.txt", "echo it broke; exit 3"))
    done = flow(project, server)
    assert done.returncode == 1
    assert "it broke" in done.stderr
    assert "error: flow: got failed: b; not run: d; expected all stages completed" in done.stderr
    assert task_runs(server, done) == {**dict.fromkeys("ace", "COMPLETED"), "b": "FAILED"}
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
    assert done.stderr.startswith("error: targets: got 'f'; expected a, b, c, d, e, or one")


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


@pytest.fixture(scope="module")
def prefect_home(tmp_path_factory):
    """Where flows without a server keep Prefect's database: only the first of them makes it."""
    return tmp_path_factory.mktemp("without-server")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_outlives_a_flow_neither_its_stages_nor_its_own_server(project, tmp_path, prefect_home, number):
    (project / "dvc.yaml").write_text("stages: {deep: {cmd: python deep.py, outs: [never]}}")
    (project / "deep.py").write_text(DEEP)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.reproduce"],
        cwd=project,
        env={**env, "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(prefect_home), "MARK": str(tmp_path)},
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
