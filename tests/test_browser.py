"""The pages as a person finds them, in a real browser: `make browser`. Needs Debian's chromium and chromium-driver."""

import re
import socket

import pytest

from modelstock.tracking.mlflow import MlflowTracker
from tests.support.browser import MISSING, browser
from tests.test_tracking import comparison, row, server

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} on the PATH")]


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def page():
    with browser() as opened:
        yield opened


def accuracy(name, shifts, **params):
    summary = {"shifts": shifts, "shifts_low": shifts - 0.02, "shifts_high": shifts + 0.02, "held_out": 0.75}
    return row(
        name, identity=name.ljust(64, "0"), summary=summary, params={**row().params, **params}, metrics={"shapes": {}}
    )


def test_the_printed_link_opens_on_methods_sorted_by_their_accuracy_on_the_shifts(page, tmp_path, free_port):
    with server(tmp_path, free_port):
        tracker = MlflowTracker(tmp_path, "e", f"http://127.0.0.1:{free_port}")
        rows = [
            accuracy("seed-0", 0.5125, method="seed"),
            accuracy("model_stock/0-1", 0.5875, method="model_stock"),
            accuracy("uniform/0-1", 0.5625, method="uniform"),
        ]
        lines = tracker.record(comparison(*rows))
        address = re.search(r"http://\S+merges", lines[0])[0]
        assert f":{free_port}/" in address
        page.open(address)
        for text in ("0.5875", "0.5625", "0.5125", "uniform/0-1"):
            page.wait_for(text)
        text = page.text()
        assert text.index("model_stock/0-1") < text.index("uniform/0-1") < text.index("seed-0")
        assert text.index("0.5875") < text.index("0.5625") < text.index("0.5125")
        for column in ("shifts", "shifts_low", "shifts_high", "held_out"):
            assert column in text
        assert "comparison" not in text.split("Run Name")[1]  # neither parents nor trainings among the rows
