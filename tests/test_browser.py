"""The pages as a person finds them, in a real browser: `make browser`. Needs Debian's chromium and chromium-driver."""

import re

import pytest

from flows.services import _ask
from modelstock.tracking.mlflow import MlflowTracker
from tests.support.browser import MISSING, browser
from tests.support.ports import free_port
from tests.support.services import ended, within
from tests.test_tracking import comparison, row, server

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} on the PATH")]


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


def accuracy(name, shifts, **params):
    summary = {"shifts": shifts, "shifts_low": shifts - 0.02, "shifts_high": shifts + 0.02, "held_out": 0.75}
    return row(
        name, identity=name.ljust(64, "0"), summary=summary, params={**row().params, **params}, metrics={"shapes": {}}
    )


def test_the_printed_link_opens_on_methods_sorted_by_their_accuracy_on_the_shifts(page, tmp_path):
    port = free_port()
    with server(tmp_path, port):
        tracker = MlflowTracker(tmp_path, "e", f"http://127.0.0.1:{port}")
        rows = [
            accuracy("seed-0", 0.5125, method="seed"),
            accuracy("model_stock/0-1", 0.5875, method="model_stock"),
            accuracy("uniform/0-1", 0.5625, method="uniform"),
        ]
        lines = tracker.record(comparison(*rows))
        address = re.search(r"http://\S+merges", lines[0])[0]
        assert f":{port}/" in address
        page.open(address)
        for text in ("0.5875", "0.5625", "0.5125", "uniform/0-1"):
            page.wait_for(text)
        text = page.text()
        assert text.index("model_stock/0-1") < text.index("uniform/0-1") < text.index("seed-0")
        assert text.index("0.5875") < text.index("0.5625") < text.index("0.5125")
        for column in ("shifts", "shifts_low", "shifts_high", "held_out"):
            assert column in text
        assert "comparison" not in text.split("Run Name")[1]  # neither parents nor trainings among the rows


# ---------------------------------------------------------------- Prefect


def deployment(services):
    return f"http://127.0.0.1:{services.prefect}/deployments/deployment/{services.deployment['id']}"


def schedule_switch(page):
    """Whether the switch of the schedule on the deployment's page is on; None where the page is not there yet."""
    return page.run("const box = document.querySelector('.p-toggle input'); return box ? box.checked : null")


def test_a_run_started_in_the_form_runs_the_stage_that_was_chosen(page, services):
    services.up()
    (services.folder / "slow").write_text("0")
    (services.folder / "in.txt").write_text("from the form")
    page.open(f"{deployment(services)}/run")
    page.click("//option[@value='deep']")
    page.click("//button[contains(., 'Submit')]")
    runs = f"{services.api}/flow_runs/filter"
    run = within(120, lambda: [run for run in _ask(runs, {}) if run["state"]["type"] == "COMPLETED"])[0]
    assert run["parameters"] == {"params": {"targets": ["deep"], "slots": 0, "force": False, "pool": ""}}
    page.open(f"http://127.0.0.1:{services.prefect}/runs/flow-run/{run['id']}")
    page.wait_for("Completed")
    assert (services.folder / "out.txt").read_text() == "done"
    (services.folder / "begun").unlink()


def switch(page, services, *, on: bool) -> None:
    """Click the schedule's switch, and again if the page was not ready for it."""
    for _ in range(2):
        page.click("//*[contains(@class, 'p-toggle')]")
        if within(20, lambda: services.deployment["schedules"][0]["active"] is on):
            return
    raise AssertionError(f"the schedule is not {'on' if on else 'off'} after two clicks")


def test_a_schedule_that_was_switched_on_is_on_after_a_restart(page, services):
    services.up()
    page.open(deployment(services))
    page.wait(lambda page: schedule_switch(page) is False)
    switch(page, services, on=True)
    services("down")
    assert "schedule on (cron 0 2 * * *, UTC)" in services.up()
    page.open(deployment(services))
    page.wait(schedule_switch)
    switch(page, services, on=False)


def test_a_run_cancelled_on_its_page_ends_its_stage_and_is_shown_as_cancelled(page, services, long_run):
    run, flow, stage = long_run
    page.open(f"http://127.0.0.1:{services.prefect}/runs/flow-run/{run}")
    page.click("//button[contains(., 'Cancel')]")
    page.click("//button[contains(., 'Confirm')]")
    assert within(60, lambda: ended(flow, stage))
    page.wait_for("Cancelled")
    services.a_run_completes()


def test_after_down_in_a_run_its_page_says_how_it_ended_and_the_next_run_completes(page, services, long_run):
    run, flow, stage = long_run
    services("down")
    assert ended(flow, stage)
    services.up()
    page.open(f"http://127.0.0.1:{services.prefect}/runs/flow-run/{run}")
    page.wait_for("Crashed")
    services.a_run_completes()
