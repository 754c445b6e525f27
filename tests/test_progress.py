"""How far a run of stages is, in one line per stage, over real DVC projects; and bars, which elsewhere are lines."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from flows.graph import Plan
from flows.progress import TIMES, Progress, read_times
from modelstock import progress
from modelstock.cli.output import progress_of
from modelstock.progress import Lines, duration, progress_bar
from modelstock.training.finetune import finetune_seed
from modelstock.training.inputs import Inputs
from modelstock.training.job import Setting
from tests.support.training import RECIPE, examples

ROOT = Path(__file__).parent.parent
PIPELINE = """
stages:
  prepare: {cmd: cat in.txt > prepare.txt, deps: [in.txt], outs: [prepare.txt]}
  finetune:
    foreach: [0, 1, 2]
    do: {cmd: "cat prepare.txt > ${item}.txt", deps: [prepare.txt], outs: ["${item}.txt"], meta: {device: 1}}
  compare: {cmd: cat option.txt > compare.txt, deps: [0.txt, 1.txt, 2.txt, option.txt], outs: [compare.txt]}
"""
KNOWN = {"prepare": 60.0, "finetune@0": 300.0, "finetune@1": 500.0, "compare": 31.0}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
}
DVC = [sys.executable, "-m", "dvc", "repro"]
WATCHED = [sys.executable, "-m", "flows.dvc_repro"]


@pytest.fixture
def project(tmp_path):
    """A project of five stages, none of which has run."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (tmp_path / "dvc.yaml").write_text(PIPELINE)
    (tmp_path / "in.txt").write_text("1")
    (tmp_path / "option.txt").write_text("1")
    return tmp_path


def edit(project: Path, old: str, new: str) -> None:
    file = project / "dvc.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def know(project: Path, times: dict) -> None:
    """The times of a last run."""
    (project / TIMES).parent.mkdir(parents=True, exist_ok=True)
    (project / TIMES).write_text(json.dumps(times))


def repro(project: Path, *arguments: str, command=WATCHED) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *arguments], cwd=project, env=ENVIRONMENT, capture_output=True, text=True)


def lines(done: subprocess.CompletedProcess) -> list[str]:
    """The lines of how far the run is, without the time that has passed."""
    written = [line for line in done.stdout.splitlines() if re.match(r"stage \d", line)]
    return [re.sub(r", (\d+ (h|min|s) ?)+ elapsed, ", "; ", line) for line in written]


# ---------------------------------------------------------------- a line per stage


def test_a_first_run_counts_its_stages_and_the_next_one_has_an_estimate(project):
    first = repro(project)
    assert first.returncode == 0, first.stderr
    assert re.sub(r"\d s\b", "0 s", "\n".join(lines(first))).splitlines() == [
        "stage 1 of 5: prepare; no estimate yet",
        "stage 2 of 5: finetune@0; no estimate yet",
        "stage 3 of 5: finetune@1; at least 0 s left, 1 stage never timed",
        "stage 4 of 5: finetune@2; at least 0 s left, 1 stage never timed",
        "stage 5 of 5: compare; no estimate yet",
    ]
    assert read_times(project / TIMES).keys() == {"prepare", "finetune@0", "finetune@1", "finetune@2", "compare"}
    assert first.stdout.index("stage 1 of 5") < first.stdout.index("Running stage 'prepare'")
    again = repro(project, "--force")
    assert all(re.search(r"about \d+ s left$", line) for line in lines(again))
    assert len(lines(again)) == 5


def test_what_is_left_is_the_last_times_of_all_that_must_run_and_of_a_new_seed_its_siblings_mean(project):
    know(project, KNOWN)
    assert lines(repro(project)) == [
        "stage 1 of 5: prepare; about 22 min left",  # 60 + 300 + 500 + 400 + 31 s
        "stage 2 of 5: finetune@0; about 21 min left",
        # The times of this run count from here on: finetune@0 took no time.
        "stage 3 of 5: finetune@1; about 13 min left",
        "stage 4 of 5: finetune@2; about 30 s left",
        "stage 5 of 5: compare; about 30 s left",
    ]


def test_stages_that_are_up_to_date_or_come_from_the_cache_count_as_done_and_are_not_timed(project):
    assert repro(project).returncode == 0
    know(project, KNOWN)
    (project / "option.txt").write_text("2")
    done = repro(project)
    assert lines(done) == ["stage 5 of 5: compare; about 30 s left"]
    assert read_times(project / TIMES) == {**KNOWN, "compare": pytest.approx(0, abs=20)}
    know(project, KNOWN)
    (project / "option.txt").write_text("1")
    done = repro(project)
    assert "'compare' is cached" in done.stdout
    assert lines(done) == []
    assert read_times(project / TIMES) == KNOWN


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        (["finetune@1"], ["stage 1 of 2: prepare; about 9 min left", "stage 2 of 2: finetune@1; about 8 min left"]),
        (["--single-item", "prepare"], ["stage 1 of 1: prepare; about 1 min left"]),
        (["--quiet"], []),
        (["--dry", "--single-item", "prepare"], []),
    ],
)
def test_only_the_stages_that_the_run_looks_at_count(project, arguments, written):
    know(project, KNOWN)
    done = repro(project, *arguments)
    assert (done.returncode, lines(done)) == (0, written)


def test_downstream_counts_what_depends_on_the_target(project):
    assert repro(project).returncode == 0
    know(project, KNOWN)
    (project / "in.txt").write_text("2")
    assert repro(project, "prepare").returncode == 0
    assert lines(repro(project, "--downstream", "finetune@2"))[0].startswith("stage 1 of 2: finetune@2;")


def test_a_failed_stage_ends_the_run_as_in_dvc_and_its_time_is_not_kept(project):
    edit(project, "cat option.txt > compare.txt", "exit 3")
    know(project, KNOWN)
    plain, done = repro(project, command=DVC), repro(project, "--force")
    assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)
    assert done.returncode == 255
    assert "exited with 3" in done.stderr
    assert read_times(project / TIMES)["compare"] == KNOWN["compare"]
    assert read_times(project / TIMES)["finetune@1"] < KNOWN["finetune@1"]


def test_a_failed_stage_that_others_go_on_after_is_not_timed(project):
    edit(project, '"cat prepare.txt > ${item}.txt"', '"test ${item} != 0 && cat prepare.txt > ${item}.txt"')
    know(project, KNOWN)
    done = repro(project, "--keep-going")
    assert (done.returncode, len(lines(done))) == (255, 4)
    times = read_times(project / TIMES)
    assert times["finetune@0"] == KNOWN["finetune@0"]
    assert times["finetune@1"] < KNOWN["finetune@1"]


@pytest.mark.parametrize("arguments", [["--nonsense"], ["no-such-stage"]])
def test_what_dvc_refuses_it_refuses_in_its_own_words(project, arguments):
    plain, done = repro(project, *arguments, command=DVC), repro(project, *arguments)
    assert (done.returncode, done.stderr, lines(done)) == (plain.returncode, plain.stderr, [])
    (project / "dvc.yaml").write_text("stages: [")
    assert repro(project).returncode == repro(project, command=DVC).returncode == 255


def test_a_run_in_which_nothing_can_be_kept_goes_on(project):
    (project / TIMES).mkdir(parents=True)  # where the file would be
    done = repro(project)
    assert (done.returncode, len(lines(done))) == (0, 5)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": "b"}', '{"a": null}', "\xff"])
def test_damaged_times_are_none(tmp_path, content):
    (tmp_path / "times.json").write_text(content)
    assert read_times(tmp_path / "times.json") == {}
    (tmp_path / "times.json").write_text('{"a": NaN, "b": -1, "c": 2}')
    assert read_times(tmp_path / "times.json") == {"c": 2.0}


def test_the_times_are_no_file_of_git_or_dvc():
    ignored = subprocess.run(["git", "check-ignore", "-q", str(TIMES)], cwd=ROOT)
    assert ignored.returncode == 0 or not (ROOT / ".git").exists()
    assert str(TIMES) not in (ROOT / "dvc.yaml").read_text()


def test_stages_at_once_share_what_is_left_and_what_has_run_of_them_is_over(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    (tmp_path / "times.json").write_text(json.dumps({"finetune@0": 600, "merge": 240}))
    names = ["finetune@0", "finetune@1", "finetune@2", "merge"]
    planned = Plan(needs=dict.fromkeys(names, frozenset()), dirty=frozenset(names), device=frozenset())
    run = Progress(planned, tmp_path / "times.json", slots=2)
    assert run.started("finetune@0").endswith("0 s elapsed, about 17 min left")  # (3 * 600 + 240) / 2
    now[0] = 300
    assert run.started("finetune@1").endswith("5 min elapsed, about 14 min left")  # (300 + 2 * 600 + 240) / 2
    now[0] = 900
    for name in ("finetune@0", "finetune@1"):
        run.ended(name, whole=name == "finetune@0")
    assert read_times(tmp_path / "times.json") == {"finetune@0": 900, "merge": 240}
    # Not half of 900 + 240 s: one of them alone takes 15 minutes.
    assert run.started("finetune@2") == "stage 3 of 4: finetune@2, 15 min elapsed, about 15 min left"


@pytest.mark.parametrize(
    ("seconds", "exact", "rough"),
    [
        (0, "0 s", "1 s"),
        (42.4, "42 s", "40 s"),
        (80, "1 min 20 s", "1 min 20 s"),
        (559, "9 min 19 s", "9 min"),
        (3599.7, "1 h", "1 h"),
        (7530, "2 h 5 min", "2 h 5 min"),
        (90000, "25 h", "25 h"),
    ],
)
def test_times_are_as_people_say_them(seconds, exact, rough):
    assert (duration(seconds), duration(seconds, rough=True)) == (exact, rough)


# ---------------------------------------------------------------- in a terminal


def in_terminal(command: list[str], folder: Path, *, interrupt: bytes = b"") -> tuple[str, int]:
    """What a command writes to a terminal, and its exit code; Ctrl-C once it has written `interrupt`."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (40, 100))

    def become_the_terminals() -> None:
        os.login_tty(theirs)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored, and inherited so, where tests run in the background

    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, preexec_fn=become_the_terminals) as process:
        os.close(theirs)
        written, deadline = b"", time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if select.select([ours], [], [], 1)[0]:
                    written += os.read(ours, 65536)
            except OSError:  # the command has ended
                break
            if interrupt and interrupt in written:
                os.write(ours, b"\x03")
                interrupt = b""
        os.close(ours)
    return written.decode(), process.returncode


LOOP = """
import time
from modelstock.progress import progress_bar
with progress_bar(total=4, desc="work", unit="step") as bar:
    for _ in range(4):
        time.sleep(SECONDS)
        bar.update()
for _ in progress_bar(range(2), desc="a name " * 40):
    pass
"""


def test_a_terminal_shows_bars_and_a_pipe_short_lines(tmp_path):
    command = [sys.executable, "-c", LOOP.replace("SECONDS", "0.2")]
    shown, code = in_terminal(command, tmp_path)
    assert code == 0
    assert re.search(r"\rwork: +50%\|█+ .*\| 2/4 \[00:0\d<", shown)
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True)
    assert b"\r" not in done.stderr
    first, second = done.stderr.decode().splitlines()
    assert re.fullmatch(r"work: 4 of 4 steps, \d s elapsed", first)
    assert re.fullmatch(r"a name .*: 2 of 2 its, 0 s elapsed", second)
    assert len(second) == 99


def test_in_a_terminal_a_run_shows_the_lines_and_the_stages_bars_and_an_interrupt_ends_it_as_dvc(project):
    (project / "work.py").write_text(LOOP.replace("SECONDS", "0.1"))
    edit(project, "cat in.txt > prepare.txt", "python work.py > prepare.txt")
    shown, code = in_terminal([*WATCHED, "prepare"], project)
    assert code == 0
    assert re.search(r"stage 1 of 1: prepare, \d s elapsed, no estimate yet\r\nRunning stage 'prepare':", shown)
    assert re.search(r"\rwork: +75%\|█+ +\| 3/4 ", shown)
    know(project, KNOWN)
    (project / "work.py").write_text(LOOP.replace("SECONDS", "60"))
    ends = {}
    for name, command in (("dvc", DVC), ("watched", WATCHED)):
        (project / "in.txt").write_text(name)
        shown, ends[name] = in_terminal([*command, "prepare"], project, interrupt=b"0/4")
        assert "KeyboardInterrupt" in shown
    assert ends["watched"] == ends["dvc"] == 255
    assert read_times(project / TIMES) == KNOWN


def test_a_run_ends_at_once_on_sigterm(project):
    edit(project, "cat in.txt > prepare.txt", "touch begun; exec sleep 5")
    with subprocess.Popen([*WATCHED, "-q"], cwd=project, env=ENVIRONMENT) as process:
        deadline = time.monotonic() + 60
        while not (project / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=4) == -signal.SIGTERM


# ---------------------------------------------------------------- lines instead of bars


@pytest.fixture
def clock(monkeypatch):
    """The time, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_most_every_half_minute_and_one_at_the_end(clock, capsys):
    with progress_bar(total=100, desc="seed-0", unit="step", mininterval=2) as bar:
        for second in range(100):
            clock[0] = second + 1.0
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "seed-0: 30 of 100 steps, 30 s elapsed, about 1 min 10 s left",
        "seed-0: 60 of 100 steps, 1 min elapsed, about 40 s left",
        "seed-0: 90 of 100 steps, 1 min 30 s elapsed, about 10 s left",
        "seed-0: 100 of 100 steps, 1 min 40 s elapsed",
    ]


def test_a_resumed_loop_is_estimated_by_what_it_has_done_itself(clock, capsys):
    with progress_bar(total=100, initial=80, desc="seed-0", unit="step") as bar:
        clock[0] = 40
        bar.update(10)
    assert capsys.readouterr().err.startswith("seed-0: 90 of 100 steps, 40 s elapsed, about 40 s left\n")


def test_seeds_that_are_trained_in_turns_have_one_clock_each(clock, capsys):
    for done in range(0, 40, 10):
        for name in ("seed-0", "seed-1"):
            with progress_bar(total=40, initial=done, desc=name, unit="step", leave=done == 30) as bar:
                clock[0] += 10
                bar.update(10)
    assert capsys.readouterr().err.splitlines() == [
        "seed-0: 20 of 40 steps, 30 s elapsed, about 30 s left",
        "seed-1: 20 of 40 steps, 30 s elapsed, about 30 s left",
        "seed-0: 40 of 40 steps, 1 min 10 s elapsed",
        "seed-1: 40 of 40 steps, 1 min 10 s elapsed",
    ]


def test_short_work_that_leaves_no_bar_and_a_disabled_bar_write_nothing(clock, capsys):
    with progress_of("merging") as update:
        update(5, 10)
    list(progress_bar(range(3), leave=False))
    with progress_bar(total=3, disable=True) as bar:
        clock[0] = 100
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_long_merge_and_a_count_without_a_total_are_lines_too(clock, capsys):
    with progress_of("merging") as update:
        clock[0] = 30
        update(10**9, 4 * 10**9)
    for _ in progress_bar(iter(range(2)), desc="train: listing", unit="file", leave=False):
        clock[0] += 30
    assert capsys.readouterr().err.splitlines() == [
        "merging: 1,000,000,000 of 4,000,000,000 values, 30 s elapsed, about 1 min 30 s left",
        "train: listing: 1 files, 30 s elapsed",
        "train: listing: 2 files, 1 min elapsed",
    ]


def test_interrupted_work_says_how_far_it_came(capsys):
    def broken():
        yield from range(2)
        raise KeyError

    with pytest.raises(KeyError):
        list(progress_bar(broken(), total=9, desc="seed-0", unit="step"))
    assert capsys.readouterr().err.startswith("seed-0: 2 of 9 steps, 0 s elapsed")


def test_work_goes_on_when_nobody_reads_stderr_any_more():
    code = "import sys; from modelstock.progress import progress_bar\nprint(sum(progress_bar(range(4))))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert done.stdout == b"6\n"


def test_training_in_a_log_writes_short_lines_and_no_carriage_return(anchor, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    inputs = Inputs(anchor=anchor, train=examples(), held_out=examples(), identities={"anchor": anchor.identity})
    made_by = {"stage": "finetune", "seed": 0}
    finetune_seed(inputs, RECIPE, name="seed-0", made_by=made_by, setting=Setting(), out=Path("out"))
    written = capsys.readouterr().err
    assert "\r" not in written
    assert "seed-0: 9 of 9 steps, " in written
    assert all(len(line) < 100 for line in written.splitlines())


def test_lines_take_what_bars_are_given():
    assert list(Lines(range(3), mininterval=2, unit_scale=True, leave=False)) == [0, 1, 2]


# --- what a kill leaves


def test_a_list_of_files_in_use_that_a_kill_left_in_part_stops_nothing(project):
    subprocess.run(WATCHED, cwd=project, env=ENVIRONMENT, check=True, capture_output=True)
    rwlock = project / ".dvc/tmp/rwlock"
    for torn in ("", '{"read": {"in.tx'):
        rwlock.write_text(torn)
        assert subprocess.run(DVC, cwd=project, env=ENVIRONMENT, capture_output=True).returncode != 0
        done = subprocess.run(WATCHED, cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(rwlock.read_text()) == {}


def test_a_lock_file_that_a_kill_left_in_part_is_set_aside_and_its_stages_come_from_the_run_cache(project):
    subprocess.run(WATCHED, cwd=project, env=ENVIRONMENT, check=True, capture_output=True)
    lock = project / "dvc.lock"
    whole = lock.read_text()
    lock.write_text(whole[: whole.index("size:") + 3])
    done = subprocess.run(WATCHED, cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "dvc.lock: cut short, as by a kill: moved to dvc.lock.torn" in done.stderr
    assert lock.read_text() == whole
    assert "Running stage" not in done.stdout
    lock.write_text("<<<<<<< one\n=======\n>>>>>>> other\n" + whole)
    done = subprocess.run(WATCHED, cwd=project, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode != 0
    assert lock.read_text().startswith("<<<<<<<")
