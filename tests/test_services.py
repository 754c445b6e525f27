"""`make up`, `make status` and `make down` with real servers: what is lost is repaired, what is set is kept."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from flows.services import _ask
from tests.support.services import ended, within


def test_down_in_a_run_ends_it_and_its_stage_and_says_so_and_the_next_run_runs(services, long_run):
    run, flow, stage = long_run
    assert services.slots == 1
    done = services("down")
    assert done.stdout.split() == ["worker:", "stopped", "prefect:", "stopped", "mlflow:", "stopped"]
    assert ended(flow, stage)
    services.up()
    assert services.state(run)[0] == "CRASHED"
    assert services.tasks(run) == {"deep": "CANCELLED"}
    assert services.slots == 0
    services.a_run_completes()


@pytest.mark.kill
def test_a_run_whose_worker_was_killed_still_runs_and_up_leaves_it_alone(services, long_run):
    run, flow, stage = long_run
    services.kill("worker")
    services.up()
    assert (services.state(run)[0], services.slots, ended(flow), ended(stage)) == ("RUNNING", 1, False, False)
    assert f"flow run {_ask(f'{services.api}/flow_runs/{run}')['name']}: running" in services("status").stdout
    services("down")
    assert ended(flow, stage)
    services.up()
    assert services.state(run)[0] == "CRASHED"
    services.a_run_completes()


@pytest.mark.kill
@pytest.mark.parametrize("lost", [(), ("worker",), ("prefect",), ("worker", "prefect", "mlflow")], ids="-".join)
def test_up_repairs_what_kills_left_whatever_still_lives(services, long_run, lost):
    run, flow, stage = long_run
    services.kill(*lost)
    os.kill(flow, signal.SIGKILL)
    assert within(20, lambda: ended(flow, stage))
    services.up()
    assert within(30, lambda: services.state(run)[0] == "CRASHED"), services.state(run)
    services.up()  # where the worker has only now seen it
    assert services.tasks(run) == {"deep": "CRASHED"}
    assert within(10, lambda: services.slots == 0)
    services.a_run_completes()


@pytest.mark.kill
def test_a_run_outlives_its_server_and_blocks_nothing_afterwards(services, long_run):
    _, flow, stage = long_run
    services.kill("prefect")
    services.up()
    assert not ended(flow, stage)
    os.kill(stage, signal.SIGTERM)
    assert within(200, lambda: ended(flow))
    services.up()
    services.a_run_completes()


def test_a_cancelled_run_is_cancelled_and_so_is_its_task(services, long_run):
    run, flow, stage = long_run
    _ask(f"{services.api}/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert within(60, lambda: services.state(run)[0] == "CANCELLED"), services.state(run)
    assert within(20, lambda: ended(flow, stage))
    assert within(10, lambda: services.tasks(run) == {"deep": "CANCELLED"}), services.tasks(run)
    services.a_run_completes()


@pytest.mark.kill
def test_a_run_that_was_to_be_cancelled_when_all_was_killed_is_cancelled_by_up(services, long_run):
    run, flow, stage = long_run
    services.kill("worker")
    _ask(f"{services.api}/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    os.kill(flow, signal.SIGKILL)
    assert within(20, lambda: ended(flow, stage))
    services.up()
    assert services.state(run) == ("CANCELLED", "its process is gone")
    services.a_run_completes()


def test_a_slot_that_no_run_holds_is_freed_by_up(services):
    services.up()
    services.kill("worker")
    limit = f"{services.api}/v2/concurrency_limits/deployment:{services.deployment['id']}"
    _ask(limit, {"active_slots": 1}, method="PATCH")
    services.up()
    assert services.slots == 0


def test_a_flow_started_by_hand_is_not_ended_by_up(services):
    services.up()
    env = {**services.env, "PREFECT_API_URL": services.api, "PREFECT_HOME": str(services.folder / "home")}
    (services.folder / "slow").write_text("600")
    (services.folder / "in.txt").write_text(str(time.time()))
    with subprocess.Popen([sys.executable, "-m", "flows.reproduce"], cwd=services.folder, env=env) as flow:
        note = services.folder / "begun"
        assert within(90, lambda: note.exists() and note.read_text())
        services.kill("worker")
        services.up()
        runs = _ask(f"{services.api}/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}})
        assert [run["deployment_id"] for run in runs] == [None]
        assert flow.poll() is None
        flow.send_signal(signal.SIGTERM)
        assert flow.wait(timeout=60)
        note.unlink()


def test_a_schedule_is_as_it_was_set_after_down_and_up(services):
    assert "schedule off (cron 0 2 * * *, UTC)" in services.up()
    schedules = f"{services.api}/deployments/{services.deployment['id']}/schedules"
    (schedule,) = services.deployment["schedules"]
    _ask(f"{schedules}/{schedule['id']}", {"active": True}, method="PATCH")
    services("down")
    assert "schedule on (cron 0 2 * * *, UTC)" in services.up()
    berlin = {"schedule": {"cron": "30 4 * * 1", "timezone": "Europe/Berlin"}, "active": True}
    _ask(f"{schedules}/{schedule['id']}", berlin, method="PATCH")
    services("down")
    assert "schedule on (cron 30 4 * * 1, Europe/Berlin)" in services.up()
    _ask(f"{schedules}/{schedule['id']}", {"active": False}, method="PATCH")
    services("down")
    assert "schedule off (cron 30 4 * * 1, Europe/Berlin)" in services.up()
    assert "schedule off (cron 30 4 * * 1, Europe/Berlin)" in services("status").stdout


def test_a_schedule_starts_a_run(services):
    services.up()
    (services.folder / "slow").write_text("0")
    schedules = f"{services.api}/deployments/{services.deployment['id']}/schedules"
    soon = {"interval": 20, "anchor_date": (datetime.now(UTC) + timedelta(seconds=10)).isoformat(), "timezone": "UTC"}
    (added,) = _ask(schedules, [{"schedule": soon, "active": True}])
    try:
        body = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}

        def auto_scheduled():
            return [run for run in _ask(f"{services.api}/flow_runs/filter", body) if run["auto_scheduled"]]

        assert within(150, auto_scheduled)[0]["deployment_id"] == services.deployment["id"]
    finally:
        _ask(f"{schedules}/{added['id']}", method="DELETE")


@pytest.mark.kill
def test_of_the_runs_that_were_missed_while_no_worker_ran_only_the_last_is_caught_up(services):
    services.up()
    services.kill("worker")
    schedules = f"{services.api}/deployments/{services.deployment['id']}/schedules"
    often = {"interval": 5, "anchor_date": datetime.now(UTC).isoformat(), "timezone": "UTC"}
    (added,) = _ask(schedules, [{"schedule": often, "active": True}])
    try:

        def late():
            due = {"next_scheduled_start_time": {"before_": datetime.now(UTC).isoformat()}}
            runs = _ask(
                f"{services.api}/flow_runs/filter", {"flow_runs": {**due, "state": {"type": {"any_": ["SCHEDULED"]}}}}
            )
            return {run["id"] for run in runs}

        missed = within(120, lambda: runs if len(runs := late()) > 2 else None)
        services.up()
        # More may have become due since: the last that is kept need not be of these.
        of_them = {"flow_runs": {"id": {"any_": list(missed)}}}
        assert len(_ask(f"{services.api}/flow_runs/filter", of_them)) <= 1
    finally:
        _ask(f"{schedules}/{added['id']}", method="DELETE")


def test_the_form_offers_the_stages_and_other_names_are_refused(services):
    services.up()
    schema = services.deployment["parameter_openapi_schema"]
    assert schema["definitions"]["ReproduceParams"]["properties"]["targets"]["items"]["enum"] == ["deep"]
    assert services.deployment["enforce_parameter_schema"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        services.run(targets=["deeep"])
    assert refused.value.code in (409, 422)


def test_what_the_services_write_is_their_owners_alone(services):
    services.up()
    folder = services.folder / ".services"
    results = (
        folder / "prefect/storage"
    )  # of flows, which write as the user has it, in a folder that nobody else enters
    files = [path for path in folder.rglob("*") if path.is_file() and results not in path.parents]
    files += list(services.folder.glob("mlflow.db*"))
    assert (services.folder / ".services/prefect/prefect.db") in files
    assert [path for path in files if path.stat().st_mode & 0o077] == []
    assert oct((services.folder / ".services").stat().st_mode)[-3:] == "700"
    pids = [json.loads(p.read_text())["pid"] for p in (services.folder / ".services").glob("*.json")]
    # Everyone on the machine may read these; a store's URL may carry a password.
    assert not [p for p in pids if b"mlflow.db" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.parametrize("service", ["prefect", "mlflow"])
def test_a_port_in_use_is_refused_with_the_process_that_holds_it(services, service):
    services("down")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        name = f"MODELSTOCK_{service.upper()}_PORT"
        before, services.env[name] = services.env[name], str(port)
        refused = services("up")
        services.env[name] = before
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    holder = f"used by {psutil.Process().name()}, process {os.getpid()}"
    cure = f"expected a free port for {service}; end that process, or set {name}"
    assert refused.stderr == f"error: 127.0.0.1:{port}: got {holder}; {cure}\n"
    assert services("status").stdout.count("not running") == 3
