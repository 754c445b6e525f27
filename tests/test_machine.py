"""What is checked of a machine before it works for a pool, and the slots that its stages take."""

import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from flows.graph import FlowError
from flows.machine import CHECKED, changed_files, description, devices, identity, refuse_other, slot
from tests.support.cluster import git

ROOT = Path(__file__).parent.parent
# Takes one of two slots, says which, and holds it until it is killed, or its stdin ends.
HOLDER = """
import sys
from pathlib import Path
from flows.machine import slot
with slot(Path.cwd(), 2) as (number, device):
    print(number, device, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def checkout(tmp_path):
    for name in ("modelstock/a.py", "flows/b.py", "dvc.yaml", "params.yaml", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "all")
    return tmp_path


# ---------------------------------------------------------------- what must be alike


def test_the_identity_is_the_commit_python_and_the_versions_that_are_installed(checkout):
    ours = identity(checkout)
    assert list(ours) == ["commit", "python", *CHECKED]
    assert ours["commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert ours["python"] == "{}.{}".format(*sys.version_info)
    for library in ("torch", "numpy", "dvc", "prefect"):
        assert ours[library] == version(library)


def test_a_folder_that_is_no_checkout_has_no_commit(tmp_path):
    assert identity(tmp_path)["commit"] == "none"


def test_what_differs_from_the_head_is_refused_by_name():
    head = {"commit": "a" * 40, "python": "3.11", "torch": "2.15.0", "numpy": "2.4.6"}

    def refused(**ours: str) -> str:
        with pytest.raises(FlowError) as error:
            refuse_other({**head, **ours}, head, "a")
        return str(error.value)

    refuse_other(head, head, "a")
    refuse_other({**head, "extra": "1"}, head, "a")
    assert refused(commit="b" * 40) == (
        "machine a: got commit bbbbbbbbbbbb; expected as at the head: commit aaaaaaaaaaaa; "
        "check out the head's commit here and run `make setup`"
    )
    assert refused(torch="2.14.0", numpy="2.4.5") == (
        "machine a: got torch 2.14.0, numpy 2.4.5; expected as at the head: torch 2.15.0, numpy 2.4.6; run `make setup`"
    )
    with pytest.raises(FlowError) as error:
        refuse_other({}, head, "a")
    assert str(error.value) == (
        "machine a: got commit none, python none, torch none and 1 more; "
        "expected as at the head: commit aaaaaaaaaaaa, python 3.11, torch 2.15.0 and 1 more; "
        "check out the head's commit here and run `make setup`"
    )


def test_files_of_the_code_and_the_settings_that_are_not_as_committed_are_named(checkout):
    assert changed_files(checkout) == []
    (checkout / "notes.txt").write_text("2")
    assert changed_files(checkout) == []
    (checkout / "params.yaml").write_text("2")  # first and only: with a blank before it in what git says
    assert changed_files(checkout) == ["params.yaml"]
    (checkout / "flows/b.py").unlink()
    (checkout / "modelstock/new file.py").write_text("")
    (checkout / "modelstock/größe.py").write_text("")
    git(checkout, "add", "modelstock/größe.py")
    assert sorted(changed_files(checkout)) == [
        "flows/b.py", "modelstock/größe.py", "modelstock/new file.py", "params.yaml",
    ]  # fmt: skip


def test_without_git_nothing_is_known_to_have_changed(tmp_path):
    (tmp_path / "dvc.yaml").write_text("")
    assert changed_files(tmp_path) == []


def test_a_machine_is_called_what_it_was_named_or_its_host_name(monkeypatch):
    monkeypatch.delenv("MODELSTOCK_MACHINE", raising=False)
    about = description()
    assert list(about) == ["machine", "processor", "gpus", "system"]
    assert about["machine"] == platform.node()
    assert about["processor"]
    monkeypatch.setenv("MODELSTOCK_MACHINE", "gpu-7")
    assert description()["machine"] == "gpu-7"


# ---------------------------------------------------------------- slots


def test_devices_are_gpus_or_cpu_slots(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices(0) == [{}]
    assert devices(3) == [{}, {}, {}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert devices(0) == [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert devices(3) == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in ("2", "5", "2")]


def test_gpus_are_those_that_the_driver_lists(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA A (UUID: GPU-1)'\necho '  MIG 1g (UUID: MIG-1)'\n"
        "echo 'GPU 1: NVIDIA B (UUID: GPU-2)'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices(0) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert description()["gpus"] == "NVIDIA A, NVIDIA B"


def hold(folder: Path) -> tuple[subprocess.Popen, str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "4,6"}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=folder, env=env, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_slots_are_held_by_one_each_and_free_as_soon_as_their_holder_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    (first, said), (second, said_second) = hold(tmp_path), hold(tmp_path)
    try:
        assert said == "0 {'CUDA_VISIBLE_DEVICES': '4'}"
        assert said_second == "1 {'CUDA_VISIBLE_DEVICES': '6'}"
        with pytest.raises(FlowError) as refused, slot(tmp_path, 2):
            pass
        assert str(refused.value) == (
            f"slots of {platform.node()}: got all are held; expected a free one; end what else works here"
        )
        with slot(tmp_path, 3) as (number, device):
            assert (number, device) == (2, {"CUDA_VISIBLE_DEVICES": "4"})
        first.send_signal(signal.SIGKILL)
        first.wait(10)
        before = time.monotonic()
        with slot(tmp_path, 2) as (number, _):
            assert number == 0
            # One that this process holds is taken for it too.
            with pytest.raises(FlowError, match="all are held"), slot(tmp_path, 2):
                pass
        assert time.monotonic() - before < 1
        second.stdin.close()
        assert second.wait(10) == 0
        with slot(tmp_path, 2), slot(tmp_path, 2) as (number, _):
            assert number == 1
    finally:
        for process in (first, second):
            process.kill()
            process.wait(10)
            process.stdout.close()


def test_a_slot_is_free_after_an_error_in_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ZeroDivisionError), slot(tmp_path, 1):
        raise ZeroDivisionError
    with slot(tmp_path, 1) as (number, device):
        assert (number, device) == (0, {})
