"""What goes between machines: clones of one project with a DVC remote, in this process, without a Prefect server."""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml
from dvc.repo import Repo

from flows.graph import FlowError
from flows.transport import Order, Result, Transport, differences, reads
from tests.support.cluster import git, toy
from tests.support.ports import free_port

# A folder as output of which a stage reads one file, beside one that it does not read.
PARTS = """
stages:
  models: {cmd: python make.py models/clip, deps: [make.py], outs: [models/clip]}
  others: {cmd: python make.py models/other, deps: [make.py], outs: [models/other]}
  read: {cmd: cp models/clip/clip.safetensors copy, deps: [models/clip/clip.safetensors], outs: [copy]}
  all: {cmd: ls models > list, deps: [models], outs: [list]}
"""
MAKE = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
for name in ("clip.safetensors", "vocabulary"):
    (folder / name).write_text(f"{name} of {folder}")
"""


class Clone:
    """A clone with a transport and what DVC knows about files of its own."""

    def __init__(self, name: str, project: "Project") -> None:
        self.name, self.project, self.folder = name, project, project.folder / name
        git(project.folder, "clone", "-q", str(project.origin), str(self.folder))
        site = project.folder / f"{name}-site"
        (self.folder / ".dvc/config.local").write_text(f"[core]\nsite_cache_dir = {site}\n")
        self._transport = Transport(self.folder)

    @property
    def transport(self) -> Transport:
        """The transport, in its folder: DVC finds stages in the working directory."""
        os.chdir(self.folder)
        return self._transport

    def run(self, *names: str, **env: str) -> None:
        """`dvc repro --single-item`, or without names `dvc repro`."""
        env = {"MACHINE": self.name, "MACHINE_LOG": str(self.project.events), "SECONDS_HERE": "0", **env}
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with mock.patch.dict(os.environ, env), contextlib.chdir(self.folder), Repo() as repo:
            repo.reproduce(list(names) or None, single_item=bool(names))

    def order(self, name: str, **options: bool) -> Order:
        transport = self.transport
        return transport.order(name, reads(self.folder)[name], **options)

    def give(self, name: str) -> Order:
        """As the head: order a stage, and send what it reads."""
        order = self.order(name)
        self.transport.send_inputs(order)
        return order

    def work(self, order: Order, **env: str) -> tuple[Result, list[Result]]:
        """As a machine: all that there is to an order."""
        self.transport.take_inputs(order)
        self.transport.compare(order)
        self.run(order.name, **env)
        result = self.transport.written(order)
        return result, self.transport.send(order, result)

    def cache(self) -> set[str]:
        """The hashes in DVC's cache."""
        return hashes(self.folder / ".dvc/cache")

    def lock(self, name: str) -> dict:
        return yaml.safe_load((self.folder / "dvc.lock").read_text())["stages"][name]

    def file(self, name: str) -> str:
        return (self.folder / name).read_text()


@pytest.fixture(autouse=True)
def working_directory(monkeypatch, tmp_path):
    """Put back after each test."""
    monkeypatch.chdir(tmp_path)


class Project:
    """An origin, a remote in a folder, and the log of what ran where."""

    def __init__(self, folder: Path, **files: str) -> None:
        self.folder, self.remote, self.events, self.origin = (
            folder, folder / "remote", folder / "events", folder / "origin",
        )  # fmt: skip
        self.remote.mkdir()
        self.origin.mkdir()
        git(self.origin, "init", "-q", "-b", "main")
        for name, text in {**toy(str(self.remote)), **files}.items():
            (self.origin / name).parent.mkdir(exist_ok=True)
            (self.origin / name).write_text(text)
        git(self.origin, "add", "-A", "-f")
        git(self.origin, "commit", "-q", "-m", "project")

    def clone(self, name: str) -> Clone:
        return Clone(name, self)

    def ran(self) -> list[tuple[str, str]]:
        """Stage and machine of every run, in order."""
        lines = self.events.read_text().splitlines() if self.events.exists() else []
        return [(line.split()[0], line.split()[2]) for line in lines if line.split()[1] == "end"]

    def files(self) -> set[str]:
        return {str(file.relative_to(self.remote)) for file in self.remote.rglob("*") if file.is_file()}

    def object(self, digest: str) -> Path:
        return self.remote / "files/md5" / digest[:2] / digest[2:]

    def runs(self, order: Order) -> Path:
        return self.remote / "runs" / order.key[:2] / order.key


def hashes(odb: Path) -> set[str]:
    return {file.parent.name + file.name for file in (odb / "files/md5").rglob("*") if file.is_file()}


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.fixture
def head(project):
    """The head, where `prepare` has run."""
    clone = project.clone("head")
    clone.run("prepare")
    return clone


SEED = "seed-0 of 1"  # the weights of seed 0
HISTORY = "1 2 3"


# ---------------------------------------------------------------- what is carried


def test_a_machine_takes_what_the_stage_reads_and_sends_what_it_wrote(project, head):
    machine, order = project.clone("a"), head.give("seed@0")
    sent = project.files()
    assert sent == {f"files/md5/{md5('1')[:2]}/{md5('1')[2:]}"}  # prepare.txt, and no result of prepare
    assert order.inputs == {"prepare": [{"path": "prepare.txt", "hash": "md5", "md5": md5("1"), "size": 1}]}
    machine.transport.take_inputs(order)
    assert machine.cache() == {md5("1")}
    assert machine.file("prepare.txt") == "1"
    result, others = machine.work(order)
    assert others == []
    listed = result.outs["seeds/0"]
    assert listed.endswith(".dir")
    new = {str(project.object(digest).relative_to(project.remote)) for digest in (md5(SEED), md5(HISTORY), listed)}
    run = str((project.runs(order) / result.value).relative_to(project.remote))
    assert project.files() - sent == {*new, run}
    assert project.ran() == [("prepare", "head"), ("seed-0", "a")]


def test_an_output_that_a_stage_does_not_read_stays_where_it_is(project, head):
    head.run("seed@1")
    machine = project.clone("a")
    machine.work(head.give("seed@0"))
    assert md5("seed-1 of 1") not in machine.cache() | hashes(project.remote)
    assert not (machine.folder / "seeds/1").exists()


def test_a_folder_as_dependency_brings_all_outputs_below_it_and_no_other(project, head):
    head.run("seed@0", "seed@1")
    machine, order = project.clone("a"), head.give("compare")
    assert {producer: [out["path"] for out in outs] for producer, outs in order.inputs.items()} == {
        "seed@0": ["seeds/0"], "seed@1": ["seeds/1"],
    }  # fmt: skip
    machine.transport.take_inputs(order)
    assert tree(machine.folder / "seeds") == tree(head.folder / "seeds")
    assert not (machine.folder / "prepare.txt").exists()
    machine.work(order)
    assert machine.file("out.txt") == "seed-0 of 1seed-1 of 1"


@pytest.fixture
def parts(tmp_path):
    project = Project(tmp_path, **{"dvc.yaml": PARTS, "make.py": MAKE, ".gitignore": "/models\n/copy\n/list\n"})
    head = project.clone("head")
    head.run("models", "others")
    return project, head


def test_a_file_inside_of_a_folder_that_is_an_output_is_brought_alone(parts):
    project, head = parts
    machine, order = project.clone("a"), head.give("read")
    machine.transport.take_inputs(order)
    assert tree(machine.folder / "models") == {"clip/clip.safetensors": b"clip.safetensors of models/clip"}
    listed = head.lock("models")["outs"][0]["md5"]
    assert machine.cache() == {md5("clip.safetensors of models/clip"), listed}
    machine.work(order)
    assert machine.file("copy") == "clip.safetensors of models/clip"


def test_what_is_on_a_machine_already_is_replaced_by_what_the_stage_reads(parts):
    project, head = parts
    machine, order = project.clone("a"), head.give("read")
    stale = machine.folder / "models/clip/clip.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_text("older")
    machine.transport.take_inputs(order)
    assert stale.read_text() == "clip.safetensors of models/clip"


def test_a_folder_on_a_machine_that_holds_more_than_the_head_s_is_brought_to_the_head_s(project, head):
    head.run("seed@0", "seed@1")
    machine, order = project.clone("a"), head.give("compare")
    extra = machine.folder / "seeds/0/weights-of-another-run"
    extra.parent.mkdir(parents=True)
    extra.write_text("older")
    machine.transport.take_inputs(order)
    assert tree(machine.folder / "seeds") == tree(head.folder / "seeds")


def test_inputs_that_the_remote_has_are_not_sent_again_by_the_next_order(project, head):
    head.give("seed@0")
    file = project.object(md5("1"))
    before = file.stat().st_mtime_ns
    head.give("seed@1")
    assert file.stat().st_mtime_ns == before


def test_inputs_that_are_in_no_cache_are_refused_at_the_head(project, head):
    head.run("seed@0", "seed@1")
    shutil.rmtree(head.folder / ".dvc/cache")
    # DVC trusts what it noted of the files of the workspace.
    with pytest.raises(FlowError) as refused:
        head.give("compare")
    listed = head.lock("seed@0")["outs"][0]["md5"]
    assert str(refused.value) == (
        f"seeds/0: got files that could not be sent: {listed[:2]}/{listed[2:]}; "
        "expected all of them in DVC's cache, and a remote with room; "
        "`dvc push` says more"
    )


# ---------------------------------------------------------------- the same as `dvc repro`


def test_a_result_is_restored_at_the_head_as_if_dvc_repro_had_run_there(project, head):
    machine, alone = project.clone("a"), project.clone("alone")
    alone.run()
    for name in ("seed@0", "seed@1"):
        order = head.give(name)
        result, _ = machine.work(order)
        assert head.transport.results(order) == [result]
        assert head.transport.fetch(order, result)
        head.transport.restore(order, result)
    head.run("compare")
    assert (head.folder / "dvc.lock").read_bytes() == (alone.folder / "dvc.lock").read_bytes()
    assert tree(head.folder / "seeds") == tree(alone.folder / "seeds")
    assert head.file("out.txt") == alone.file("out.txt") == "seed-0 of 1seed-1 of 1"
    by_pool = [run for run in project.ran() if run[1] != "alone"]
    assert by_pool == [("prepare", "head"), ("seed-0", "a"), ("seed-1", "a"), ("compare", "head")]
    with contextlib.chdir(head.folder), Repo() as repo:
        assert repo.status() == {}
    # DVC's own run-cache at the head knows the result too.
    shutil.rmtree(head.folder / "seeds")
    (head.folder / "dvc.lock").unlink()
    head.run("prepare")
    head.run("seed@0")
    assert len([run for run in project.ran() if run[1] != "alone"]) == len(by_pool)
    assert head.file("seeds/0/weights") == SEED


def test_a_result_replaces_what_lies_in_the_workspace(project, head):
    machine, order = project.clone("a"), head.give("seed@0")
    result, _ = machine.work(order)
    other = head.folder / "seeds/0/left-over"
    other.parent.mkdir(parents=True)
    other.write_text("by hand")
    assert head.transport.fetch(order, result)
    head.transport.restore(order, result)
    assert tree(head.folder / "seeds") == {"0/weights": SEED.encode(), "0/history": HISTORY.encode()}


def test_a_result_is_not_restored_once_an_input_has_changed(project, head):
    machine, order = project.clone("a"), head.give("seed@0")
    result, _ = machine.work(order)
    was = md5(head.file("work.py"))[:12]
    (head.folder / "work.py").write_text("print(1)\n")
    head.transport.fetch(order, result)
    with pytest.raises(FlowError) as refused:
        head.transport.restore(order, result)
    assert str(refused.value) == (
        f"stage seed@0: got work.py {md5('print(1)' + chr(10))[:12]}, there {was}; "
        "expected inputs that stay as they were when it was begun; run the flow again"
    )
    assert not (head.folder / "seeds").exists()


# ---------------------------------------------------------------- a machine that is not the head's like


def refusal(got: str) -> str:
    return (
        f"stage seed@0: got {got}; expected what the head has; "
        "bring this machine to the head's commit and params.yaml, with nothing changed in them"
    )


def test_what_differs_from_the_head_is_refused_by_name_before_anything_runs(project, head):
    machine, order = project.clone("a"), head.give("seed@0")
    machine.transport.take_inputs(order)
    machine.transport.compare(order)  # nothing differs

    def refused(file: str, old: str, new: str) -> str:
        path = machine.folder / file
        was = path.read_text()
        assert old in was
        path.write_text(was.replace(old, new))
        with pytest.raises(FlowError) as error:
            machine.transport.compare(order)
        now = path.read_text()
        path.write_text(was)
        machine.transport.compare(order)
        return str(error.value).replace(md5(now)[:12], "NOW").replace(md5(was)[:12], "WAS")

    assert refused("work.py", "1 2 3", "1 2 4") == refusal("work.py NOW, there WAS")
    assert refused("settings.yaml", "0.2", "0.3") == refusal("settings.yaml: seconds 0.3, there 0.2")
    assert refused("dvc.yaml", "seed-${item} ", "seed-${item}  ") == refusal(
        "command 'python work.py seed-0  seeds/0', there 'python work.py seed-0 seeds/0'"
    )
    assert refused("dvc.yaml", '["seeds/${item}"]', '["seeds/${item}", log]') == refusal("other outputs: seeds/0, log")
    assert refused("dvc.yaml", "deps: [work.py, prepare.txt]", "deps: [work.py]") == refusal(
        f"prepare.txt not read, there {md5('1')[:12]}"
    )
    assert refused("prepare.txt", "1", "2") == refusal("prepare.txt NOW, there WAS")
    assert project.ran() == [("prepare", "head")]


def test_differences_name_each_thing_that_differs():
    ours = {"cmd": "a", "deps": [{"path": "x", "hash": "md5", "md5": "1" * 32}], "params": {"p": {"k": 1, "l": 2}}}
    assert differences(ours, ours) == []
    assert differences(ours, {"cmd": "b"}) == [
        "command 'a', there 'b'",
        "x 111111111111, there not read",
        "p: k 1, there None",
        "p: l 2, there None",
    ]


def test_a_stage_that_is_not_in_dvc_yaml_is_one_line(project, head):
    with pytest.raises(FlowError, match="seed@7"):
        head.transport.order("seed@7", {})


# ---------------------------------------------------------------- while a stage runs


def test_an_input_that_changes_while_the_stage_runs_is_refused_and_nothing_is_sent(project, head):
    machine, order = project.clone("a"), head.give("seed@0")
    before = project.files()
    machine.transport.take_inputs(order)
    machine.transport.compare(order)
    was = md5(machine.file("work.py"))[:12]
    with open(machine.folder / "work.py", "a") as file:
        file.write("# edited meanwhile\n")
    machine.run("seed@0")
    with pytest.raises(FlowError) as refused:
        machine.transport.written(order)
    assert str(refused.value) == (
        f"stage seed@0: got work.py {md5(machine.file('work.py'))[:12]}, there {was}; "
        "expected inputs that stay as they are while it runs; change nothing in this clone while it works for a pool"
    )
    assert project.files() == before


# ---------------------------------------------------------------- machines that make different bytes


def test_a_machine_with_other_bytes_sends_nothing_and_learns_of_the_first(project, head):
    first, second, order = project.clone("a"), project.clone("b"), head.give("seed@0")
    result, _ = first.work(order)
    sent = project.files()
    other, others = second.work(order, BYTES="!")
    assert others == [result]
    assert other.outs != result.outs
    assert project.files() == sent
    # What another run would restore is the machine's own no longer.
    second.transport.forget(order, other)
    second.transport.forget(order, other)
    (second.folder / "dvc.lock").unlink()
    second.run("seed@0", BYTES="?")
    assert second.file("seeds/0/weights") == "seed-0 of 1?"


def test_a_machine_with_the_same_bytes_has_nothing_to_send(project, head):
    first, second, order = project.clone("a"), project.clone("b"), head.give("seed@0")
    result, _ = first.work(order)
    sent = project.files()
    assert second.work(order) == (result, [])
    assert project.files() == sent


def test_of_several_results_the_first_by_name_comes_first_and_the_lock_has_its_own(project, head):
    order = head.give("seed@0")
    made = []
    for name in ("a", "b", "c"):
        machine = project.clone(name)
        kept = project.runs(order)
        aside = project.folder / f"aside-{name}"
        if kept.exists():  # as if all had begun before any had sent
            kept.rename(aside)
        made.append(machine.work(order, BYTES=name)[0])
        if aside.exists():
            shutil.copytree(aside, kept, dirs_exist_ok=True)
    known = head.transport.results(order)
    assert known == sorted(made, key=lambda result: result.value)
    assert project.clone("d").transport.results(order) == known
    assert head.transport.current(order) is None
    last = known[-1]
    assert head.transport.fetch(order, last)
    head.transport.restore(order, last)
    assert head.transport.current(order) == last
    # The lock is about exactly this stage.
    (head.folder / "settings.yaml").write_text("seconds: 9\n")
    assert head.transport.current(head.order("seed@0")) is None


# ---------------------------------------------------------------- damage


def test_a_torn_or_untrue_file_of_the_run_cache_is_not_taken(project, head):
    machine, order = project.clone("a"), head.give("seed@0")
    result, _ = machine.work(order)
    file = project.runs(order) / result.value
    whole = file.read_text()
    file.write_text(whole[: len(whole) // 2])
    assert head.transport.results(order) == []
    file.write_text(whole.replace(result.outs["seeds/0"], md5("other") + ".dir"))  # its name is of other content
    assert head.transport.results(order) == []
    file.write_text("")
    assert head.transport.results(order) == []
    file.write_bytes(b"\xff\xfe\x00")
    assert head.transport.results(order) == []
    file.write_text(whole)
    (file.parent / "tmpabc").write_text(whole)  # as DVC names what it has not finished
    assert head.transport.results(order) == [result]


def test_a_torn_result_is_replaced_by_the_machine_that_makes_it_again(project, head):
    machine, again, order = project.clone("a"), project.clone("b"), head.give("seed@0")
    result, _ = machine.work(order)
    file = project.runs(order) / result.value
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    assert again.work(order) == (result, [])
    assert file.read_bytes() == whole


@pytest.mark.parametrize("what", ["weights", "list"])
@pytest.mark.parametrize("how", ["missing", "damaged"])
@pytest.mark.parametrize("mode", [0o644, 0o444])
def test_a_result_whose_objects_are_missing_or_damaged_is_not_fetched(project, head, what, how, mode):
    machine, order = project.clone("a"), head.give("seed@0")
    result, _ = machine.work(order)
    file = project.object(md5(SEED) if what == "weights" else result.outs["seeds/0"])
    file.chmod(0o644)
    whole = file.read_bytes()
    file.unlink()
    if how == "damaged":
        file.write_bytes(whole[:-1] + b"#")
        file.chmod(mode)
    digest = md5(SEED) if what == "weights" else result.outs["seeds/0"]
    assert head.transport.absent(order, result) == [f"{digest[:2]}/{digest[2:]}"]
    assert not head.transport.fetch(order, result)
    assert not (head.folder / "seeds").exists()
    assert not {md5(SEED) if what == "weights" else result.outs["seeds/0"]} & head.cache()
    assert "seed@0" not in head.file("dvc.lock")
    # Once it is whole again, it is fetched by the same transport.
    file.unlink(missing_ok=True)
    file.write_bytes(whole)
    assert head.transport.fetch(order, result)
    head.transport.restore(order, result)
    assert head.file("seeds/0/weights") == SEED


@pytest.mark.parametrize("what", ["weights", "list"])
def test_a_result_whose_objects_are_missing_is_sent_again_by_the_machine_that_makes_it_again(project, head, what):
    order = head.give("seed@0")
    result, _ = project.clone("a").work(order)
    project.object(md5(SEED) if what == "weights" else result.outs["seeds/0"]).unlink()
    assert not head.transport.fetch(order, result)
    assert project.clone("b").work(order) == (result, [])
    assert head.transport.fetch(order, result)


def test_a_result_whose_objects_are_missing_does_not_stand_in_the_way_of_other_bytes(project, head):
    order = head.give("seed@0")
    lost, _ = project.clone("a").work(order)
    project.object(md5(SEED)).unlink()
    result, others = project.clone("b").work(order, BYTES="!")
    assert others == []
    assert {known.value for known in head.transport.results(order)} == {lost.value, result.value}
    assert not head.transport.fetch(order, lost)
    assert head.transport.fetch(order, result)


@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_inputs_that_are_missing_or_damaged_in_the_remote_are_refused(project, head, how):
    machine, order = project.clone("a"), head.give("seed@0")
    file = project.object(md5("1"))
    file.chmod(0o644)
    file.unlink()
    if how == "damaged":
        file.write_text("2")
    with pytest.raises(FlowError) as refused:
        machine.transport.take_inputs(order)
    assert str(refused.value) == (
        f"prepare.txt: got missing or damaged in the DVC remote: {md5('1')[:2]}/{md5('1')[2:]}; "
        "expected what the head has sent; run the flow again; if it says so again, delete that there, and run it again"
    )
    assert not (machine.folder / "prepare.txt").exists()
    assert md5("1") not in machine.cache()


def test_a_committed_lock_whose_bytes_are_nowhere_has_nothing_to_fetch(project, head):
    machine = project.clone("a")
    order = head.give("seed@0")
    machine.work(order)
    shutil.copy(machine.folder / "dvc.lock", head.folder / "dvc.lock")
    shutil.rmtree(project.remote)
    project.remote.mkdir()
    current = head.transport.current(order)
    assert current is not None
    assert not head.transport.fetch(order, current)


# ---------------------------------------------------------------- the remote


def configured(clone: Clone, text: str) -> Transport:
    os.chdir(clone.folder)
    (clone.folder / ".dvc/config").write_text(text)
    return Transport(clone.folder)


def test_a_remote_that_answers_is_named(project):
    clone = project.clone("a")
    assert clone.transport.check_remote() == str(project.remote)
    project.remote.rmdir()
    assert clone.transport.check_remote() == str(project.remote)  # made by what is first sent


def test_no_remote_one_that_does_not_answer_and_one_without_run_cache_are_one_line_each(project, tmp_path):
    clone = project.clone("a")

    def refused(url: str | None) -> str:
        remote = f"remote = shared\n['remote \"shared\"']\nurl = {url}\n" if url else ""
        started = time.monotonic()
        with pytest.raises(FlowError) as error:
            configured(clone, f"[core]\nanalytics = false\n{remote}").check_remote()
        assert time.monotonic() - started < 10
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refused(None) == (
        f"DVC remote: got config file error: no remote specified in {clone.folder}. Create a default remote with "
        "dvc remote add -d <remote name> <remote url>; expected a remote that every machine reaches; "
        "dvc remote add --default NAME ADDRESS"
    )
    port = free_port()
    answer = refused(f"ssh://someone:secret@127.0.0.1:{port}/store")
    assert re.fullmatch(
        rf"DVC remote: got ssh://127\.0\.0\.1:{port}/store: .*[Cc]onnect.*; expected a remote that answers; "
        r"`dvc push` must work on this machine",
        answer,
    ), answer
    assert "secret" not in answer
    assert refused(f"http://127.0.0.1:{port}/store") == (
        f"DVC remote: got http://127.0.0.1:{port}/store; expected one with a run-cache; take another kind of remote"
    )
    assert refused("s3://store") == (
        "DVC remote: got s3 is supported, but requires 'dvc-s3' to be installed; "
        "expected a remote that every machine reaches; dvc remote add --default NAME ADDRESS"
    )
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "not-mounted"):
        assert refused(f"{folder}/store") == (
            f"DVC remote: got {folder}/store: NotADirectoryError: {folder} is no folder that can be written to; "
            "expected a remote that answers; `dvc push` must work on this machine"
        )
    assert not (tmp_path / "not-mounted").exists()


def test_stages_whose_results_no_run_cache_keeps_are_refused_before_anything_runs(tmp_path):
    stages = """
stages:
  good: {cmd: cp in.txt a, deps: [in.txt], outs: [a]}
  persists: {cmd: cp in.txt b, deps: [in.txt], outs: [{b: {persist: true}}]}
  uncached: {cmd: cp in.txt c, deps: [in.txt], metrics: [{c: {cache: false}}]}
  reads_nothing: {cmd: touch d, outs: [d]}
  always: {cmd: touch e, deps: [in.txt], outs: [e], always_changed: true}
  writes_nothing: {cmd: "true", deps: [in.txt]}
"""
    transport = Project(tmp_path, **{"dvc.yaml": stages}).clone("a").transport
    transport.check_transportable(["good"])

    def refused(*names: str) -> str:
        with pytest.raises(FlowError) as error:
            transport.check_transportable(names)
        return str(error.value)

    line = (
        "work pool: got {}: no deps, or an output that is not cached or persists; expected stages whose results the "
        "run-cache keeps; correct it in dvc.yaml, or take its meta.device away"
    )
    for name in ("persists", "uncached", "reads_nothing", "always", "writes_nothing"):
        assert refused("good", name) == line.format(name)
    assert refused("persists", "uncached") == line.format("persists, uncached")


# ---------------------------------------------------------------- at once


def test_threads_and_another_dvc_at_work_in_the_same_workspace_lose_nothing(tmp_path):
    many = 5
    project = Project(tmp_path, **{"dvc.yaml": toy("")["dvc.yaml"].replace("[0, 1]", str(list(range(many))))})
    head, machine = project.clone("head"), project.clone("a")
    head.run("prepare")
    names = [f"seed@{item}" for item in range(many - 1)]
    results = {}
    for name in names:
        order = head.give(name)
        results[name] = (order, machine.work(order)[0])
    env = {**os.environ, "MACHINE": "head", "MACHINE_LOG": str(project.events), "SECONDS_HERE": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", f"seed@{many - 1}"]
    errors = []

    def accept(mine: list[str]) -> None:
        try:
            for name in mine:
                order, result = results[name]
                assert head.transport.fetch(order, result)
                head.transport.restore(order, result)
        except Exception as error:
            errors.append(error)

    with subprocess.Popen(command, cwd=head.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as other:
        threads = [threading.Thread(target=accept, args=(names[half::2],)) for half in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert other.stdout is not None
        said = other.stdout.read().decode()
    assert errors == []
    assert other.returncode == 0, said
    head.run("compare")
    alone = project.clone("alone")
    alone.run()
    locks = [yaml.safe_load((clone.folder / "dvc.lock").read_text()) for clone in (head, alone)]
    assert locks[0] == locks[1]
    assert tree(head.folder / "seeds") == tree(alone.folder / "seeds")
    with contextlib.chdir(head.folder), Repo() as repo:
        assert repo.status() == {}
