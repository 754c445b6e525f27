"""A real Slurm of one node with two slots, from Debian's packages slurm-wlm and munge, in a folder of its own."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.ports import free_port

SBIN = "/usr/sbin"  # Debian's place for daemons, which is not on every user's PATH
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
MISSING = "needs Debian's packages slurm-wlm and munge"
NODE = "node1"

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
# A job that is queued again starts when its credential has expired: 120 s, unless this names less.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
PlugStackConfig={folder}/plugstack.conf
# No cgroups: containers have none that they may write to.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
# Two slots, however many processors there are.
SlurmdParameters=config_overrides
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=short Nodes={node} Default=YES MaxTime=1:00:00 State=UP
"""


def missing() -> bool:
    """Whether a program of Slurm or munge is not installed."""
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{SBIN}"
    return any(shutil.which(program, path=path) is None for program in PROGRAMS)


class Slurm:
    """A running Slurm: its commands, in an environment that finds it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env: dict[str, str] = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))},
            "PATH": f"{os.environ.get('PATH', '')}{os.pathsep}{SBIN}",
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def __call__(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> Mapping[str, str]:
        """What Slurm knows of a job, by scontrol's names."""
        fields = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def cancel_all(self) -> None:
        """End every job, and wait until none is left."""
        self("scancel", "--me")
        _await(lambda: not self("squeue", "--noheader").strip(), self)

    def logs(self) -> str:
        """The daemons' last lines, for a failure's message."""
        files = [self.folder / f"{name}.log" for name in ("slurmctld", "slurmd", "munged")]
        return "\n".join(
            "\n".join([file.name, *file.read_text().splitlines()[-15:]]) for file in files if file.exists()
        )


@contextmanager
def _daemon(command: list[str], env: Mapping[str, str], log: Path) -> Iterator[None]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, env=env, cwd=log.parent, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """A Slurm whose files all lie in `folder`, which must have a short path: it holds munge's socket."""
    slurm = Slurm(folder)
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True, mode=0o700)
    (folder / "munge").chmod(0o755)  # munged refuses a socket that others could not reach
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    (folder / "plugstack.conf").touch()
    values = {
        "host": socket.gethostname().split(".")[0],
        "user": getpass.getuser(),
        "folder": folder,
        "node": NODE,
        "controller_port": free_port(),
        "node_port": free_port(),
    }
    (folder / "slurm.conf").write_text(CONF.format(**values))
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge/socket"]
    munged += [f"--{name}-file={folder}/munged.{name}" for name in ("log", "pid", "seed")]
    with ExitStack() as daemons:
        daemons.enter_context(_daemon(munged, slurm.env, folder / "munged.out"))
        _await(lambda: (folder / "munge/socket").exists(), slurm)
        daemons.enter_context(_daemon(["slurmctld", "-D"], slurm.env, folder / "slurmctld.out"))
        daemons.enter_context(_daemon(["slurmd", "-D", "-N", NODE], slurm.env, folder / "slurmd.out"))
        _await(lambda: _idle(slurm), slurm)
        try:
            yield slurm
        finally:
            slurm.cancel_all()  # a job's processes would outlive the daemons


def _idle(slurm: Slurm) -> bool:
    done = subprocess.run(["sinfo", "-h", "-o", "%T"], env=slurm.env, capture_output=True, text=True, timeout=30)
    return done.stdout.strip() == "idle"


def _await(condition, slurm: Slurm, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, slurm.logs()
        time.sleep(0.2)
