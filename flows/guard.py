"""Runs a command that ends when its starter ends, however that ends: `python -m flows.guard COMMAND...`.

The guard's stdin is a pipe that only the starter holds open. At its end, and on SIGTERM, the guard ends the command and
every process below it, those in sessions of their own too: orphans below a "child subreaper" become its children.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from typing import NoReturn

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
GRACE_S = 5


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _end(number: int, frame: object) -> NoReturn:
    for other in (signal.SIGTERM, signal.SIGINT):
        signal.signal(other, signal.SIG_IGN)  # once is enough: what ends is not interrupted
    sys.exit(128 + number)


def _end_with_starter() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _below() -> list[psutil.Process]:
    """All processes below this one that run; those that have ended are reaped."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return psutil.Process().children(recursive=True)


def end_all_below() -> None:
    """End all processes below this one: SIGTERM, and SIGKILL for those that remain after `GRACE_S`."""
    for process in _below():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    deadline = time.monotonic() + GRACE_S
    while left := _below():
        for process in left if time.monotonic() > deadline else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)


def main(command: list[str]) -> int:
    """Run the command, and return its exit code once nothing of it runs any more."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        # Should the guard itself be killed, the command is too.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        )
        threading.Thread(target=_end_with_starter, daemon=True).start()
        while True:
            pid, status = os.waitpid(-1, 0)
            if pid == process.pid:
                return os.waitstatus_to_exitcode(status)
    finally:
        end_all_below()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
