"""One experiment on several machines: where stages run, and what happens when a machine, a server or a flow is lost.

Machines are clones on this one, with a HOME, a cache and settings of their own; nothing but a Prefect server and a DVC
remote connects them. `make test-cluster`.
"""

import re
import signal
import time
from pathlib import Path

import pytest

from flows.services import _ask
from tests.support.cluster import PIPELINE, Cluster, git, prefect_server, toy, within
from tests.support.ports import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
LEASE_S = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("server")) as env:
        yield env


@pytest.fixture
def cluster(tmp_path, server):
    made = Cluster(tmp_path, toy(str(tmp_path / "remote")), server)
    yield made
    made.close()


def slow(tmp_path: Path, server: dict[str, str], seconds: float) -> Cluster:
    return Cluster(tmp_path, toy(str(tmp_path / "remote"), seconds), server)


def files_of(folder: Path) -> dict[str, str]:
    names = ("prepare.txt", "seeds/0/weights", "seeds/1/weights", "seeds/0/history", "out.txt", "dvc.lock")
    return {name: (folder / name).read_text() for name in names}


def local_run(cluster: Cluster) -> dict[str, str]:
    """The files of `dvc repro` on one machine that has no remote and knows nothing of the others."""
    alone = cluster.machine("alone", MACHINE_LOG=str(cluster.folder / "other-events"))
    done = alone("dvc", "repro")
    assert done.returncode == 0, done.stderr
    return files_of(alone.folder)


def runs_of(cluster: Cluster, name: str) -> list[dict]:
    """The flow runs of a name in this cluster's flow, oldest first."""
    api = cluster.env["PREFECT_API_URL"]
    found = _ask(f"{api}/flow_runs/filter", {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_ASC"})
    return [run for run in found if run["created"] >= cluster.began]


def happened(cluster: Cluster, stage: str, what: str) -> list[str]:
    """The machines on which this happened to a stage."""
    return [machine for name, event, machine in cluster.noted() if name == stage and event.startswith(what)]


def stage_process(cluster: Cluster, stage: str) -> int:
    """The process of a stage that has begun last."""
    lines = [line.split() for line in cluster.events.read_text().splitlines()]
    return next(int(line[3]) for line in reversed(lines) if line[0] == stage and line[1].startswith("begin"))


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_two_machines_end_with_the_files_of_one(cluster):
    cluster.deploy()
    first, second = cluster.machine("first"), cluster.machine("second")
    first.join()
    second.join()
    done = cluster.reproduce()
    assert done.returncode == 0, done.stderr[-3000:]
    where = {stage: machine for stage, what, machine in cluster.noted() if what == "end"}
    assert where["prepare"] == where["compare"] == "head"
    assert {where["seed-0"], where["seed-1"]} <= {"first", "second"}
    assert len([1 for _, what, _ in cluster.noted() if what == "end"]) == 4
    assert files_of(cluster.head.folder) == local_run(cluster)
    # A machine has what its stages read and wrote, and no more; its dvc.lock stays as it was.
    for machine in (first, second):
        assert not (machine.folder / "out.txt").exists()
        assert machine.leave() == 0
        assert git(machine.folder, "status", "--porcelain") == ""
    again = cluster.reproduce()
    assert (again.returncode, again.stdout) == (0, "stages up to date: 4 of 4, nothing to run\n")
    # Another head takes all that devices have made from the remote.
    other = cluster.machine("other head", MACHINE_LOG=str(cluster.folder / "other-events"))
    done = other("flows.reproduce", "--pool", "gpu")
    assert done.returncode == 0, done.stderr[-3000:]
    assert files_of(other.folder) == files_of(cluster.head.folder)
    ran = {line.split()[0] for line in (cluster.folder / "other-events").read_text().splitlines() if "other" in line}
    assert ran == {"prepare", "compare"}


def test_a_machine_with_two_slots_runs_two_stages_and_a_third_waits(tmp_path, server):
    pipeline = PIPELINE.replace("foreach: [0, 1]", "foreach: [0, 1, 2]")
    cluster = Cluster(tmp_path, {**toy(str(tmp_path / "remote"), 20), "dvc.yaml": pipeline}, server)
    try:
        cluster.deploy()
        machine = cluster.machine("wide")
        machine.join("--slots", "2")
        flow = cluster.flow()

        def both() -> str:
            status = machine.status()
            return (
                status
                if {"running, wide, slot 0", "running, wide, slot 1"} <= set(re.findall(r"running, .*", status))
                else ""
            )

        status = within(90, both)
        assert "stages that wait: 1" in status
        assert flow.wait(120) == 0, cluster.head.log[-3000:]
        assert sorted(stage for stage, what, _ in cluster.noted() if what == "end" and stage.startswith("seed")) == [
            "seed-0",
            "seed-1",
            "seed-2",
        ]
    finally:
        cluster.close()


def test_a_machine_that_is_killed_is_missed_and_its_stage_goes_on_elsewhere_from_its_resume_point(tmp_path, server):
    cluster = slow(tmp_path, {**server, "MODELSTOCK_SCRATCH": str(tmp_path / "scratch")}, 12)
    try:
        cluster.deploy()
        first = cluster.machine("first")
        first.join("--slots", "2")
        flow = cluster.flow()
        assert within(90, lambda: happened(cluster, "seed-0", "begin") and happened(cluster, "seed-1", "begin"))
        time.sleep(2)
        killed = time.time()
        first.kill()
        second = cluster.machine("second")
        second.join("--slots", "2")
        assert within(60, lambda: "no sign of life for 12 s; it is queued again" in cluster.head.log)
        noticed = time.time() - killed
        assert flow.wait(120) == 0, cluster.head.log[-3000:]
        assert happened(cluster, "seed-0", "end") == happened(cluster, "seed-1", "end") == ["second"]
        steps = [
            int(what.split("-")[1])
            for stage, what, machine in cluster.noted()
            if machine == "second" and what.startswith("begin")
        ]
        assert min(steps) > 0  # none of them from nothing
        print(f"noticed {noticed:.1f} s after the kill, with a lease of {LEASE_S} s")
        assert files_of(cluster.head.folder) == local_run(cluster)
        # The machine comes back, and has both its slots: nothing of the killed one keeps them.
        assert second.leave() == 0
        first.env["SECONDS_HERE"] = "2"
        first.join("--slots", "2")
        done = cluster.reproduce("seed", "--force")
        assert done.returncode == 0, done.stderr[-3000:]
        assert happened(cluster, "seed-0", "end") == happened(cluster, "seed-1", "end") == ["second", "first"]
    finally:
        cluster.close()


def test_a_server_that_is_killed_and_started_again_loses_no_stage(tmp_path):
    home, port = tmp_path / "server", free_port()
    home.mkdir()
    with prefect_server(home, port) as env:
        cluster = slow(tmp_path / "cluster", env, 15)
        cluster.deploy()
        machine = cluster.machine("first")
        machine.join("--slots", "2")
        flow = cluster.flow()
        assert within(90, lambda: happened(cluster, "seed-0", "begin") and happened(cluster, "seed-1", "begin"))
    try:  # the server is killed
        assert within(30, lambda: "Prefect does not answer" in cluster.head.log), cluster.head.log[-2000:]
        time.sleep(3)
        with prefect_server(home, port):
            flow.wait(200)
            if flow.returncode:  # then what is done is not run again
                assert cluster.reproduce().returncode == 0
            assert sorted(stage for stage, what, _ in cluster.noted() if what == "end") == [
                "compare",
                "prepare",
                "seed-0",
                "seed-1",
            ]
            assert files_of(cluster.head.folder) == local_run(cluster)
    finally:
        cluster.close()


def test_a_flow_that_is_killed_takes_its_stages_with_it_and_another_run_goes_on(tmp_path, server):
    cluster = slow(tmp_path, {**server, "MODELSTOCK_SCRATCH": str(tmp_path / "scratch")}, 30)
    try:
        cluster.deploy()
        first, second = cluster.machine("first"), cluster.machine("second")
        first.join("--slots", "2")
        flow = cluster.flow()
        assert within(90, lambda: happened(cluster, "seed-0", "begin") and happened(cluster, "seed-1", "begin"))
        pids = [stage_process(cluster, seed) for seed in ("seed-0", "seed-1")]
        flow.kill()
        flow.wait()
        # Begun again at once, while the stages of the first flow still run, which have not missed it yet.
        second.join("--slots", "2")
        done = cluster.reproduce()
        assert done.returncode == 0, done.stderr[-3000:]
        assert not any(map(alive, pids))
        assert len(happened(cluster, "seed-0", "end")) == len(happened(cluster, "seed-1", "end")) == 1
        begun = [int(what.split("-")[1]) for stage, what, _ in cluster.noted() if stage == "seed-0" and "begin" in what]
        assert begun[0] == 0 < begun[-1]
        assert "gave no sign of life" in first.log
        assert files_of(cluster.head.folder) == local_run(cluster)
    finally:
        cluster.close()


def test_a_stage_whose_process_is_killed_runs_again_at_once(tmp_path, server):
    cluster = slow(tmp_path, server, 10)
    try:
        cluster.deploy()
        machine = cluster.machine("first")
        machine.join("--slots", "2")
        flow = cluster.flow()
        assert within(90, lambda: happened(cluster, "seed-0", "begin") and happened(cluster, "seed-1", "begin"))
        run = re.search(r"/runs/flow-run/([0-9a-f-]{36})", machine.log)[1]
        killed = next(p for p in machine.processes() if p.environ().get("PREFECT__FLOW_RUN_ID") == run)
        killed.kill()
        assert within(LEASE_S, lambda: "it is queued again" in cluster.head.log), cluster.head.log[-2000:]
        assert flow.wait(120) == 0, cluster.head.log[-3000:]
        assert len(happened(cluster, "seed-0", "end")) == len(happened(cluster, "seed-1", "end")) == 1
    finally:
        cluster.close()


@pytest.mark.parametrize("what", ["flow", "stage"])
def test_a_cancellation_in_the_ui_ends_the_stage_within_seconds(tmp_path, server, what):
    cluster = slow(tmp_path, server, 60)
    try:
        cluster.deploy()
        machine = cluster.machine("first")
        machine.join("--slots", "2")
        flow = cluster.flow()
        assert within(90, lambda: happened(cluster, "seed-0", "begin") and happened(cluster, "seed-1", "begin"))
        run_id = re.search(r"/flow-run/([0-9a-f-]{36})", cluster.head.log)[1]
        api = server["PREFECT_API_URL"]
        if what == "stage":
            seeds = _ask(
                f"{api}/flow_runs/filter",
                {"flow_runs": {"name": {"any_": ["seed@0"]}}, "sort": "EXPECTED_START_TIME_DESC"},
            )
            run_id = seeds[0]["id"]
        pids = {seed: stage_process(cluster, seed) for seed in ("seed-0", "seed-1")}
        _ask(f"{api}/flow_runs/{run_id}/set_state", {"state": {"type": "CANCELLING"}})
        asked = time.time()
        assert within(20, lambda: not alive(pids["seed-0"])), machine.log[-2000:]
        print(f"ended {time.time() - asked:.1f} s after it was asked for")
        if what == "flow":
            assert within(20, lambda: not alive(pids["seed-1"]))
            assert flow.wait(60) == 130
            assert "cancelled in Prefect: no stage runs any more" in cluster.head.log
            assert _ask(f"{api}/flow_runs/{run_id}")["state_type"] == "CANCELLED"
        else:
            assert alive(pids["seed-1"])
            assert within(20, lambda: "stage seed@0: got cancelled in Prefect" in cluster.head.log)
            flow.send_signal(signal.SIGINT)
            assert flow.wait(60) == 130
            assert within(30, lambda: not alive(pids["seed-1"]))
    finally:
        cluster.close()


def test_a_machine_whose_time_is_over_saves_leaves_and_another_goes_on(tmp_path, server):
    cluster = slow(tmp_path, {**server, "MODELSTOCK_SCRATCH": str(tmp_path / "scratch")}, 10)
    try:
        cluster.deploy()
        first, second = cluster.machine("first"), cluster.machine("second")
        first.join("--slots", "2")
        flow = cluster.flow()
        assert within(90, lambda: happened(cluster, "seed-0", "begin") and happened(cluster, "seed-1", "begin"))
        time.sleep(1)
        first.worker.send_signal(signal.SIGUSR1)
        assert first.worker.wait(60) == 75
        saved = {stage: int(what.split("-")[1]) for stage, what, _ in cluster.noted() if what.startswith("saved")}
        assert saved.keys() == {"seed-0", "seed-1"}
        assert within(20, lambda: cluster.head.log.count("it is queued again") == 2), cluster.head.log[-2000:]
        second.join("--slots", "2")
        assert flow.wait(120) == 0, cluster.head.log[-3000:]
        went_on = {
            stage: int(what.split("-")[1])
            for stage, what, machine in cluster.noted()
            if machine == "second" and what.startswith("begin")
        }
        assert went_on == saved
        assert files_of(cluster.head.folder) == local_run(cluster)
    finally:
        cluster.close()


def test_other_bytes_of_another_machine_are_reported_and_dvc_lock_decides(cluster):
    cluster.deploy()
    first = cluster.machine("first")
    first.join()
    assert cluster.reproduce().returncode == 0
    before = files_of(cluster.head.folder)
    assert first.leave() == 0
    second = cluster.machine("second", BYTES=" of another processor")
    second.join()
    done = cluster.reproduce("seed@0", "--force")
    assert done.returncode == 0, done.stderr[-3000:]
    line = re.search(
        r"seed@0: other bytes: seeds/0 (\w+).* by second \(.+\); kept: seeds/0 (\w+).* by first \(.+\), as dvc.lock",
        done.stderr,
    )
    assert line, done.stderr[-3000:]
    assert line[1] != line[2]
    assert files_of(cluster.head.folder) == before
    assert len(list((cluster.remote / "runs").glob("*/*/*"))) == 2  # one for each seed
    # What comes after is made of the kept bytes, on that machine too.
    (cluster.head.folder / "out.txt").unlink()
    assert cluster.reproduce().returncode == 0
    assert files_of(cluster.head.folder) == before


def test_a_machine_that_is_not_as_the_head_does_not_join(cluster):
    cluster.deploy()
    machine = cluster.machine("first")
    url = cluster.env["PREFECT_API_URL"]

    def check() -> str:
        done = machine("flows.worker", "join", "--server", url, "--check", "--name", "first")
        assert done.returncode == (0 if not done.stderr else 1)
        assert done.stderr.count("\n") <= 1
        return done.stderr

    assert check() == ""
    (machine.folder / "dvc.yaml").write_text(PIPELINE.replace("work.py compare", "work.py  compare"))
    assert "got uncommitted changes: dvc.yaml; expected modelstock, stages, flows, dvc.yaml" in check()
    git(machine.folder, "commit", "-q", "-a", "-m", "own")
    here, head = (git(m.folder, "rev-parse", "HEAD").strip()[:12] for m in (machine, cluster.head))
    assert f"got commit {here}; expected as at the head: commit {head}; check out the head's commit here" in check()
    git(machine.folder, "checkout", "-q", "HEAD~1")
    assert check() == ""
    (machine.folder / ".dvc/config.local").write_text("['remote \"shared\"']\nurl = ssh://127.0.0.1:9/nowhere\n")
    assert re.match("error: DVC remote: got .*; expected a remote that answers; `dvc push` must work", check())
    lost = machine("flows.worker", "join", "--server", "http://127.0.0.1:9", "--check")
    assert (lost.returncode, lost.stderr.count("\n")) == (1, 1)
    assert lost.stderr.startswith("error: Prefect at http://127.0.0.1:9/api: got ConnectError")


def test_a_machine_that_changes_after_it_has_joined_refuses_the_stage_and_names_what_differs(cluster):
    cluster.deploy()
    machine = cluster.machine("first")
    machine.join()
    (machine.folder / "work.py").write_text((machine.folder / "work.py").read_text() + "\n# another\n")
    done = cluster.reproduce()
    assert done.returncode == 1
    assert re.search(r"stage seed@0: got work\.py \w{12}, there \w{12}; expected what the head has", done.stderr)
    assert not happened(cluster, "seed-0", "begin")
    git(machine.folder, "checkout", "-q", "work.py")
    (cluster.origin / "in.txt").write_text("2")
    git(cluster.origin, "commit", "-q", "-a", "-m", "another")
    git(cluster.head.folder, "pull", "-q")
    # It leaves the pool, and what it has refused waits for another.
    flow = cluster.flow()
    assert machine.worker.wait(90) == 1
    refusal = r"machine first: got commit \w{12}; expected as at the head: commit \w{12}; check out the head's commit"
    assert re.search(f"error: {refusal}.*; this machine leaves the pool", machine.log)
    assert re.search(f"{refusal}.*; it is queued again", cluster.head.log)
    assert not happened(cluster, "seed-0", "begin")
    other = cluster.machine("other")
    other.join("--slots", "2")
    assert flow.wait(120) == 0, cluster.head.log[-3000:]
    assert happened(cluster, "seed-0", "end") == happened(cluster, "seed-1", "end") == ["other"]


def test_a_pool_that_nobody_has_made_is_refused(cluster):
    cluster.deploy()
    done = cluster.head("flows.reproduce", "--pool", "gpus")
    assert done.returncode == 1
    assert "--pool: got 'gpus'; expected gpu" in done.stderr.splitlines()[-1]
    assert cluster.noted() == []


def test_a_stage_that_fails_there_says_why_here(cluster):
    cluster.deploy()
    machine = cluster.machine("first", SECONDS_HERE="no number")
    machine.join()
    done = cluster.reproduce()
    assert done.returncode == 1
    assert "ValueError: could not convert string to float: 'no number'" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: flow: got failed: seed@0, seed@1; not run: compare")
