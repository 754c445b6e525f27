"""One experiment on several machines: where stages run, and who is refused.

Machines are clones on this one, with a HOME, a cache and settings of their own; nothing but a Prefect server and a DVC
remote connects them. `make test-cluster`.
"""

import re
import signal
import time

import pytest

from flows.services import _ask
from tests.support.cluster import PIPELINE, alive, git, within

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


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
    assert cluster.head.files == cluster.local_run()
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
    assert other.files == cluster.head.files
    ran = {line.split()[0] for line in (cluster.folder / "other-events").read_text().splitlines() if "other" in line}
    assert ran == {"prepare", "compare"}


def test_a_machine_with_two_slots_runs_two_stages_and_a_third_waits(make):
    pipeline = PIPELINE.replace("foreach: [0, 1]", "foreach: [0, 1, 2]")
    cluster = make(20, files={"dvc.yaml": pipeline})
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


@pytest.mark.parametrize("what", ["flow", "stage"])
def test_a_cancellation_in_the_ui_ends_the_stage_within_seconds(make, what):
    cluster = make(60)
    cluster.deploy()
    machine = cluster.machine("first")
    flow = cluster.flow_on(machine)
    run_id = re.search(r"/flow-run/([0-9a-f-]{36})", cluster.head.log)[1]
    api = cluster.env["PREFECT_API_URL"]
    if what == "stage":
        seeds = _ask(
            f"{api}/flow_runs/filter",
            {"flow_runs": {"name": {"any_": ["seed@0"]}}, "sort": "EXPECTED_START_TIME_DESC"},
        )
        run_id = seeds[0]["id"]
    pids = {seed: cluster.stage_process(seed) for seed in ("seed-0", "seed-1")}
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


def test_other_bytes_of_another_machine_are_reported_and_dvc_lock_decides(cluster):
    cluster.deploy()
    first = cluster.machine("first")
    first.join()
    assert cluster.reproduce().returncode == 0
    before = cluster.head.files
    assert first.leave() == 0
    second = cluster.machine("second", BYTES=" of another processor")
    second.join()
    done = cluster.reproduce("seed@0", "--force")
    assert done.returncode == 0, done.stderr[-3000:]
    line = re.search(
        r"seed@0: other bytes: seeds/0 (\w+).* by second \(.+\); kept: seeds/0 (\w+).* by \w+ \(.+\), as dvc.lock",
        done.stderr,
    )
    assert line, done.stderr[-3000:]
    assert line[1] != line[2]
    assert cluster.head.files == before
    assert len(list((cluster.remote / "runs").glob("*/*/*"))) == 2  # one for each seed
    # What comes after is made of the kept bytes, on that machine too.
    (cluster.head.folder / "out.txt").unlink()
    assert cluster.reproduce().returncode == 0
    assert cluster.head.files == before


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
    assert not cluster.happened("seed-0", "begin")
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
    assert not cluster.happened("seed-0", "begin")
    other = cluster.machine("other")
    other.join("--slots", "2")
    assert flow.wait(120) == 0, cluster.head.log[-3000:]
    assert cluster.happened("seed-0", "end") == cluster.happened("seed-1", "end") == ["other"]


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
