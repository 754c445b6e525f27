"""One experiment on several machines: what happens when a machine, a server or a flow is lost.

Machines are clones on this one, with a HOME, a cache and settings of their own; nothing but a Prefect server and a DVC
remote connects them. `make test-cluster`.
"""

import signal
import time

import pytest

from tests.support.cluster import LEASE_S, Cluster, alive, prefect_server, toy, within
from tests.support.ports import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def test_a_machine_that_is_killed_is_missed_and_its_stage_goes_on_elsewhere_from_its_resume_point(tmp_path, make):
    cluster = make(25, MODELSTOCK_SCRATCH=str(tmp_path / "scratch"))
    cluster.deploy()
    first = cluster.machine("first")
    flow = cluster.flow_on(first)
    time.sleep(2)
    killed = time.time()
    first.kill()
    second = cluster.machine("second")
    second.join("--slots", "2")
    assert within(60, lambda: f"no sign of life for {LEASE_S} s; it is queued again" in cluster.head.log)
    noticed = time.time() - killed
    assert flow.wait(120) == 0, cluster.head.log[-3000:]
    assert cluster.happened("seed-0", "end") == cluster.happened("seed-1", "end") == ["second"]
    steps = [
        int(what.split("-")[1])
        for stage, what, machine in cluster.noted()
        if machine == "second" and what.startswith("begin")
    ]
    assert min(steps) > 0  # none of them from nothing
    print(f"noticed {noticed:.1f} s after the kill, with a lease of {LEASE_S} s")
    assert cluster.head.files == cluster.local_run()
    # The machine comes back, and has both its slots: nothing of the killed one keeps them.
    assert second.leave() == 0
    first.env["SECONDS_HERE"] = "2"
    first.join("--slots", "2")
    done = cluster.reproduce("seed", "--force")
    assert done.returncode == 0, done.stderr[-3000:]
    assert cluster.happened("seed-0", "end") == cluster.happened("seed-1", "end") == ["second", "first"]


def test_a_server_that_is_killed_and_started_again_loses_no_stage(tmp_path):
    home, port = tmp_path / "server", free_port()
    home.mkdir()
    with prefect_server(home, port) as env:
        cluster = Cluster(tmp_path / "cluster", toy(str(tmp_path / "cluster/remote"), 25), env)
        cluster.deploy()
        machine = cluster.machine("first")
        flow = cluster.flow_on(machine)
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
            assert cluster.head.files == cluster.local_run()
    finally:
        cluster.close()


def test_a_flow_that_is_killed_takes_its_stages_with_it_and_another_run_goes_on(tmp_path, make):
    cluster = make(40, MODELSTOCK_SCRATCH=str(tmp_path / "scratch"))
    cluster.deploy()
    first, second = cluster.machine("first"), cluster.machine("second")
    flow = cluster.flow_on(first)
    pids = [cluster.stage_process(seed) for seed in ("seed-0", "seed-1")]
    flow.kill()
    flow.wait()
    # Begun again at once, while the stages of the first flow still run, which have not missed it yet.
    second.join("--slots", "2")
    done = cluster.reproduce()
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any(map(alive, pids))
    assert len(cluster.happened("seed-0", "end")) == len(cluster.happened("seed-1", "end")) == 1
    begun = [int(what.split("-")[1]) for stage, what, _ in cluster.noted() if stage == "seed-0" and "begin" in what]
    assert begun[0] == 0 < begun[-1]
    assert "gave no sign of life" in first.log
    assert cluster.head.files == cluster.local_run()


def test_a_stage_whose_process_is_killed_runs_again_at_once(tmp_path, make):
    cluster = make(20)
    cluster.deploy()
    machine = cluster.machine("first")
    flow = cluster.flow_on(machine)
    killed = next(p for p in machine.processes() if "prefect.engine" in p.cmdline())
    killed.kill()
    assert within(LEASE_S, lambda: "it is queued again" in cluster.head.log), cluster.head.log[-2000:]
    assert flow.wait(120) == 0, cluster.head.log[-3000:]
    assert len(cluster.happened("seed-0", "end")) == len(cluster.happened("seed-1", "end")) == 1


def test_a_machine_whose_time_is_over_saves_leaves_and_another_goes_on(tmp_path, make):
    cluster = make(20, MODELSTOCK_SCRATCH=str(tmp_path / "scratch"))
    cluster.deploy()
    first, second = cluster.machine("first"), cluster.machine("second")
    flow = cluster.flow_on(first)
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
    assert cluster.head.files == cluster.local_run()
