"""The whole experiment as a Prefect flow over DVC's graph.

DVC keeps the graph and decides what must run; this flow knows stages by name only. It starts each stage as soon as
what it needs is done, with at most one stage per device, and shows what happens in Prefect.
"""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, wait
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict, Field

from flows.graph import FlowError, plan
from flows.progress import SKIPS, Progress
from flows.services import HOST, answers
from flows.workspace import ready
from modelstock.errors import ModelstockError, redacted

GUARD = [sys.executable, str(Path(__file__).with_name("guard.py"))]


class ReproduceParams(BaseModel):
    """What a run of the flow can be asked."""

    model_config = ConfigDict(extra="forbid")
    targets: list[str] = Field(default=[], description="Stages to bring up to date with all they need; empty: all.")
    slots: int = Field(default=0, ge=0, description="Stages on devices at once; 0: one per GPU, or one without GPUs.")
    force: bool = Field(default=False, description="Run stages again that are up to date.")


def devices(slots: int) -> list[dict[str, str]]:
    """The environment of each device slot: one per GPU, or one on the CPU, or as many as asked for in turn."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            listed = ""
        visible = ",".join(re.findall(r"^GPU (\d+)", listed, re.MULTILINE))
    gpus = [gpu for gpu in visible.split(",") if gpu.strip()]
    if not gpus:
        return [{} for _ in range(slots or 1)]
    return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(slots or len(gpus))]


@dataclass
class Children:
    """The processes of the stages, each with a guard in a session of its own: none outlives this process."""

    running: set["subprocess.Popen[str]"] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closed: bool = False

    @contextmanager
    def start(self, command: list[str], *, cwd: Path, env: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
        """Start a command, its output in one pipe; refused once `end` has been called."""
        with self.lock:  # the same lock as in `end`: nothing starts after the last one was ended
            if self.closed:
                raise FlowError("stage", got="a flow that is ending", expected="a running flow", cure="run it again")
            process = subprocess.Popen(
                [*GUARD, *command],
                cwd=cwd,
                env=dict(env),
                stdin=subprocess.PIPE,  # the guard reads its end, which comes when this process is gone
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
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


Slots = queue.Queue[dict[str, str]]  # the environments of the device slots that are free


def _run(name: str, *, root: Path, children: Children, slots: Slots | None, progress: Progress, force: bool) -> None:
    """Run one stage through DVC, its output line by line in the task's log; `slots`: of one on a device."""
    log = get_run_logger()
    slot = slots.get() if slots else {}
    try:
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
        env = {**os.environ, **slot}
        last: deque[str] = deque(maxlen=8)
        skipped = False
        log.info(progress.started(name))
        with children.start(command + ["--force"] * force, cwd=root, env=env) as process:
            assert process.stdout is not None
            for line in process.stdout:
                # Progress bars rewrite their line; the last state of it is kept.
                text = redacted(line.rstrip("\n").rsplit("\r", 1)[-1].rstrip())
                skipped |= SKIPS.fullmatch(text) is not None
                if text:
                    last.append(text)
                    log.info(text)
            code = process.wait()
        progress.ended(name, whole=code == 0 and not skipped)
    finally:
        if slots:
            slots.put(slot)
    if code:
        raise FlowError(
            f"stage {name}",
            got=f"exit code {code}: " + " | ".join(last),
            expected="0",
            cure=f"fix what it says, and see it alone with: dvc repro --single-item {name}",
        )


@contextmanager
def _ended(children: Children) -> Iterator[None]:
    """End all stages if anything goes wrong inside, an interrupt or a cancellation too."""
    try:
        yield
    except BaseException as error:
        children.end()
        if not isinstance(error, Exception):  # interrupted or cancelled
            # The stages are ended; whatever Prefect still waits for shall not keep the process for long.
            watchdog = threading.Timer(20, os._exit, [1])
            watchdog.daemon = True
            watchdog.start()
        raise


def _show(report: Path) -> str:
    """Show the comparison as an artifact, without its figure, which Prefect cannot reach."""
    text = report.read_text(encoding="utf-8") if report.exists() else "All stages are up to date."
    shown = text.replace("![", "<!-- ![").replace("(figure.png)", "(figure.png) -->")
    create_markdown_artifact(shown, key="comparison")
    return text


# A task that waits for others holds a thread: there must be more threads than stages.
@flow(name="reproduce", task_runner=ThreadPoolTaskRunner(max_workers=1000))  # type: ignore[arg-type]
def reproduce(params: ReproduceParams = ReproduceParams()) -> str:  # noqa: B008  (Prefect reads the form from it)
    """Bring every stage up to date and show the comparison; a failed stage stops only what depends on it."""
    with ready("flows.reproduce"):
        return _reproduce(params)


def _reproduce(params: ReproduceParams) -> str:
    root, log = Path.cwd(), get_run_logger()
    planned = plan(root, params.targets, force=params.force)
    log.info("%d stages, %d to run", len(planned.needs), len(planned.dirty))
    slots: Slots = queue.Queue()
    for env in devices(params.slots):
        slots.put(env)
    children, progress = Children(), Progress(planned, slots=slots.qsize())

    @task(name="stage")
    def stage(name: str) -> State[None] | None:
        if name not in planned.dirty:
            progress.skipped(name)
            return Completed(name="Cached", message="up to date")
        own = slots if name in planned.device else None
        _run(name, root=root, children=children, slots=own, progress=progress, force=params.force)
        return None

    futures: dict[str, PrefectFuture[Any]] = {}
    with _ended(children):
        for name, needs in planned.needs.items():
            after: list[Any] = [futures[n] for n in needs]
            futures[name] = stage.with_options(task_run_name=name).submit(name, return_state=False, wait_for=after)
        wait(list(futures.values()))
    failed = [name for name, future in futures.items() if not future.state.is_completed()]
    if failed:
        raise FlowError(
            "flow",
            got=f"not completed: {', '.join(failed)}",
            expected="all stages completed",
            cure="see the log of the first of them; what is done is not run again",
        )
    return _show(root / "reports" / "comparison.md")


def _reach(url: str) -> None:
    """Refuse a server that does not answer, before Prefect does so in many lines."""
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
    except Exception as error:  # of whichever library noticed
        problem = error
    if problem is not None:
        raise FlowError(
            f"Prefect at {url}",
            got=f"{type(problem).__name__}: {problem}",
            expected="a server that answers",
            cure="start it (`make up`), or unset PREFECT_API_URL",
        )


@contextmanager
def _server() -> Iterator[None]:
    """A Prefect server for this run, where none is named; it ends with this process, however that ends.

    Raises:
        FlowError: it does not start, or the one that is named does not answer.
    """
    if PREFECT_API_URL.value():
        _reach(PREFECT_API_URL.value())
        yield
        return
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [*GUARD, sys.executable, "-m", "uvicorn", "--host", HOST]
    command += ["--port", str(port), "--log-level", "error", "--factory", "prefect.server.api.server:create_app"]
    url, deadline = f"http://{HOST}:{port}/api", time.monotonic() + 90
    with subprocess.Popen(command, env={**os.environ, "PREFECT_UI_ENABLED": "0"}, stdin=subprocess.PIPE) as server:
        try:
            while not answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise FlowError("Prefect", got="no answer", expected=f"a server at {url}", cure="run it again")
                time.sleep(0.2)
            with temporary_settings({PREFECT_API_URL: url}):
                yield
        finally:
            server.terminate()


def main(
    target: Annotated[list[str] | None, typer.Argument(help="Stages; none: all.")] = None,
    slots: Annotated[int, typer.Option(min=0, help="Stages on devices at once; 0: one per GPU, or one.")] = 0,
    force: Annotated[bool, typer.Option(help="Run stages again that are up to date.")] = False,
) -> None:
    """Run the experiment's stages in parallel, as Prefect tasks."""
    try:
        with ready("flows.reproduce"):
            plan(Path.cwd(), target or [])  # refused in one line here; the flow does both again
        with _server():
            print(reproduce(ReproduceParams(targets=target or [], slots=slots, force=force)))
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if "targets" in error.place or error.place == str(Path.cwd()) else 1) from error


if __name__ == "__main__":
    typer.run(main)
