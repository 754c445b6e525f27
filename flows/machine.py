"""What a machine is: its code and libraries, which must be the head's; its processor and devices, which may differ."""

import fcntl
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

from flows.graph import FlowError
from modelstock.errors import few
from modelstock.provenance import LIBRARIES

# What computes, and what decides what is computed.
CHECKED = tuple(sorted({*LIBRARIES, "dvc", "mlflow", "prefect", "webdataset"}))
# Where the code and the settings are that every machine must have alike.
TRACKED = ("modelstock", "stages", "flows", "dvc.yaml", "params.yaml")
# What `join` tells the flows that its worker runs: how many slots the machine has, how many seconds a stage that is
# asked to save and to end is given, and the file in which a flow says why the machine must leave the pool.
SLOTS_VARIABLE, DRAIN_VARIABLE, UNFIT_VARIABLE = "MODELSTOCK_SLOTS", "MODELSTOCK_DRAIN_S", "MODELSTOCK_UNFIT"
MACHINE_NAME = "MODELSTOCK_MACHINE"  # what `join` has called it; else the host name
SLOT_FILES = Path(".dvc/tmp/slots")


def _git(root: Path, *arguments: str) -> str | None:
    """What git says; None without git, or in a folder that is no checkout."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def identity(root: Path) -> dict[str, str]:
    """What must be alike on all machines of a pool: the commit, Python's minor version, and libraries' versions."""
    commit = (_git(root, "rev-parse", "HEAD") or "none").strip()
    return {"commit": commit, "python": "{}.{}".format(*sys.version_info), **{name: _version(name) for name in CHECKED}}


def changed_files(root: Path) -> list[str]:
    """The files of the code and the settings that are not as committed."""
    there = [name for name in TRACKED if (root / name).exists()]
    status = _git(root, "status", "--porcelain", "-z", "--no-renames", "--", *there) if there else None
    return [entry[3:] for entry in (status or "").split("\0") if entry]


class UnfitError(FlowError):
    """This machine is not as the head, and cannot work for it."""


def refuse_changed(root: Path, machine: str) -> None:
    """Refuse to work with code or settings that are not as committed.

    Raises:
        UnfitError: it names the files.
    """
    changed = changed_files(root)
    if changed:
        raise UnfitError(
            f"machine {machine}",
            got=f"uncommitted changes: {few(changed)}",
            expected=f"{', '.join(TRACKED)} as committed",
            cure="commit them at the head and check that out here, or `git stash`",
        )


def refuse_other(ours: Mapping[str, str], heads: Mapping[str, str], machine: str) -> None:
    """Refuse to work for a head with another commit, or with other versions.

    Raises:
        UnfitError: it names all that differs.
    """
    names = [name for name in heads if ours.get(name, "none") != heads[name]]
    if names:
        short = {name: 12 if name == "commit" else None for name in names}
        raise UnfitError(
            f"machine {machine}",
            got=few([f"{name} {ours.get(name, 'none')[: short[name]]}" for name in names]),
            expected="as at the head: " + few([f"{name} {heads[name][: short[name]]}" for name in names]),
            cure="check out the head's commit here and run `make setup`" if "commit" in names else "run `make setup`",
        )


def processor() -> str:
    """The processor's name."""
    try:
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _nvidia_smi() -> dict[str, str]:
    """The GPUs of this machine: number -> name; none where there is no driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(re.findall(r"^GPU (\d+): (.+?) \(UUID", listed, re.MULTILINE))


def description() -> dict[str, str]:
    """What may make the bytes of two machines differ: processor, GPUs, and the system."""
    gpus = _nvidia_smi()
    return {
        "machine": os.environ.get(MACHINE_NAME) or platform.node(),
        "processor": processor(),
        "gpus": few(list(gpus.values())) if gpus else "none",
        "system": platform.platform(),
    }


def devices(slots: int) -> list[dict[str, str]]:
    """The environment of each device slot: one per GPU, or one on the CPU, or as many as asked for in turn."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        visible = ",".join(_nvidia_smi())
    gpus = [gpu for gpu in visible.split(",") if gpu.strip()]
    if not gpus:
        return [{} for _ in range(slots or 1)]
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(slots or len(gpus))]


@contextmanager
def slot(root: Path, slots: int) -> Iterator[tuple[int, dict[str, str]]]:
    """A slot of this machine that nobody holds, and the environment of its device.

    The system frees it when the process that holds it ends, however that ends.

    Raises:
        FlowError: all are held.
    """
    folder = root / SLOT_FILES
    folder.mkdir(parents=True, exist_ok=True)
    for number, device in enumerate(devices(slots)):
        file = locked(folder / str(number))
        if file is not None:
            with file:
                yield number, device
                return
    raise FlowError(
        f"slots of {platform.node()}", got="all are held", expected="a free one", cure="end what else works here"
    )


def locked(path: Path) -> IO[str] | None:
    """A file that this process alone holds; None if another does."""
    file = open(path, "a")  # noqa: SIM115  (held until the slot is free)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
