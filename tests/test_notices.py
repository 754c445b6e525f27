"""Notices: lines about what is unusual, printed once, and kept with what was made meanwhile."""

import json
import subprocess
import sys
import warnings

import pytest

from modelstock.notices import Notice, collected, notice, printed, so_far


def test_a_notice_is_a_python_warning_of_one_line():
    with pytest.warns(Notice, match=r"^a\.pt: two lines$"):
        notice("a.pt", "two\nlines")


@pytest.mark.filterwarnings("ignore")
def test_blocks_collect_each_notice_once_and_those_around_them_too():
    with collected() as outer:
        notice("a", "first")
        with collected() as inner:
            notice("b", "second")
            notice("b", "second")
        notice("c", "third")
        assert so_far() == ["a: first", "b: second", "c: third"]
    assert (outer, inner) == (["a: first", "b: second", "c: third"], ["b: second"])
    assert so_far() == []


def test_commands_print_a_notice_once_and_leave_other_warnings_alone(capsys):
    shown = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", lambda message, *rest, **more: shown.append(str(message)))
        with printed():
            for _ in range(2):
                notice("a.pt", "unusual")
            warnings.warn("another's", stacklevel=1)
            assert so_far() == ["a.pt: unusual"]
    assert capsys.readouterr().err == "notice: a.pt: unusual\n"
    assert shown == ["another's"]


def test_json_output_has_its_notices(tmp_path):
    code = """
from modelstock.cli.output import show
from modelstock.notices import notice, printed
with printed():
    notice("a.pt", "unusual")
    show("title", [{"x": 1}], True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"rows": [{"x": 1}], "notices": ["a.pt: unusual"]}
    assert done.stderr == "notice: a.pt: unusual\n"
