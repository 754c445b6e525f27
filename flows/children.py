"""The processes that run stages: each below a guard, in a session of its own, so that none outlives its starter."""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from flows.graph import FlowError
from flows.progress import SKIPS
from flows.workspace import scratch
from modelstock.errors import redacted

GUARD = [sys.executable, str(Path(__file__).with_name("guard.py"))]


class Ended(Exception):
    """The flow is being ended, and its stages with it."""


@dataclass
class Children:
    """The processes of the stages, each with a guard in a session of its own: none outlives this process."""

    running: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    @contextmanager
    def start(self, command: list[str], *, cwd: Path, env: Mapping[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
        """Start a command, its output in one pipe; refused once `end` has been called."""
        with self.lock:  # the same lock as in `end`: nothing starts after the last one was ended
            if self.closed:
                raise Ended
            process = subprocess.Popen(
                [*GUARD, *command],
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.PIPE,  # the guard reads its end, which comes when this process is gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.running.add(process)
        try:
            with process:
                yield process
        finally:
            with self.lock:
                self.running.discard(process)

    def end(self) -> None:
        """End every process group and wait for it."""
        with self.lock:
            self.closed = True
            for number in (signal.SIGTERM, signal.SIGKILL):
                for process in self.running:
                    try:
                        os.killpg(process.pid, number)
                    except ProcessLookupError:
                        continue
                for process in self.running:
                    try:
                        process.wait(timeout=10)
                    except subprocess.TimeoutExpired:
                        continue


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What a stage finds: not that it runs in a flow run, for it is none of the processes of one."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PREFECT__")}, **extra}


def run_stage(
    name: str,
    *,
    root: Path,
    children: Children,
    env: Mapping[str, str],
    force: bool,
    line: Callable[[str], None],
    resume: Path | None = None,
) -> bool:
    """Run one stage through DVC, each line of its output to `line`; whether it ran, and was not skipped or restored.

    `env`: of its device, for one. With `force` it runs also if it is up to date, from its first step, or from what it
    has left in the folder `resume`, where one is given.

    Raises:
        FlowError: it failed.
        Ended: it was ended by `children.end`.
    """
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
    command += ["--force"] * force
    last: deque[str] = deque(maxlen=8)
    skipped = False
    try:
        with (
            nullcontext({"MODELSTOCK_SCRATCH": str(resume)}) if resume else scratch(name, forced=force) as own,
            children.start(command, cwd=root, env=environment({**env, **own})) as process,
        ):
            assert process.stdout is not None
            for written in process.stdout:
                # Progress bars rewrite their line; the last state of it is kept.
                text = redacted(written.rstrip().rsplit(b"\r", 1)[-1].decode(errors="replace"))
                skipped |= SKIPS.fullmatch(text) is not None
                if text:
                    last.append(text)
                    line(text)
            code = process.wait()
    except Ended:
        code = -signal.SIGTERM
    if code and children.closed:
        raise Ended
    if code:
        raise FlowError(
            f"stage {name}",
            got=f"exit code {code}: " + " | ".join(last),
            expected="0",
            cure=f"fix what it says, and see it alone with: dvc repro --single-item {name}",
        )
    return not skipped
