"""The whole experiment as a Prefect flow over DVC's graph.

DVC keeps the graph and decides what must run; this flow knows stages by name only. It starts each stage as soon as
what it needs is done, with at most one stage per device, and shows what happens in Prefect.
"""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")

import typer
from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.futures import PrefectFuture, wait
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict, Field

from modelstock.errors import ModelstockError


class FlowError(ModelstockError):
    """The flow cannot start, or a stage failed."""


class ReproduceParams(BaseModel):
    """What a run of the flow can be asked."""

    model_config = ConfigDict(extra="forbid")
    targets: list[str] = Field(default=[], description="Stages to bring up to date with all they need; empty: all.")
    slots: int = Field(default=0, ge=0, description="Stages on devices at once; 0: one per GPU, or one without GPUs.")
    force: bool = Field(default=False, description="Run stages again that are up to date.")


@dataclass(frozen=True)
class Plan:
    """Stages in an order that respects `needs`; those in `dirty` must run, those in `device` occupy a device."""

    needs: Mapping[str, frozenset[str]]
    dirty: frozenset[str]
    device: frozenset[str]


def plan(root: Path, targets: list[str], *, force: bool = False) -> Plan:
    """Read the graph, and what must run, from DVC itself.

    Raises:
        FlowError: not a DVC project, a broken dvc.yaml, or a target that is no stage.
    """
    import networkx
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    try:
        with Repo(str(root), _wait_for_lock=True) as repo, lock_repo(repo):
            graph = repo.index.graph  # an edge points from a stage to one that it needs
            changed = set(repo.status())
            dirty = {s for s in graph if s.addressing in changed or s.always_changed or force}
            for stage in list(dirty):
                dirty |= networkx.ancestors(graph, stage)
            by_name = {s.addressing: s for s in graph}
            for target in targets:
                if target not in by_name:
                    raise FlowError(
                        "targets",
                        got=repr(target),
                        expected=", ".join(sorted(by_name)),
                        cure="name one of these stages",
                    )
            wanted = set(by_name.values())
            if targets:
                wanted = {by_name[t] for t in targets}
                wanted |= {d for t in list(wanted) for d in networkx.descendants(graph, t)}
            order = [s for s in reversed(list(networkx.topological_sort(graph))) if s in wanted]
            return Plan(
                {s.addressing: frozenset(d.addressing for d in graph.successors(s)) for s in order},
                frozenset(s.addressing for s in dirty & wanted),
                frozenset(s.addressing for s in wanted if (s.meta or {}).get("device")),
            )
    except (DvcException, LockError) as error:
        raise FlowError(
            root,
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
            expected="a DVC project",
            cure="run in the repository's root, after `make setup`",
        ) from error


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
    """The processes of the stages, each in a session of its own, so that all of them can be ended."""

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
                command,
                cwd=cwd,
                env=dict(env),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self.running.add(process)
        try:
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


def _run(name: str, root: Path, children: Children, slots: "queue.Queue[dict[str, str]] | None", force: bool) -> None:
    """Run one stage through DVC, its output line by line in the task's log."""
    log = get_run_logger()
    held = slots.get() if slots else {}
    try:
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", name]
        env = {**os.environ, **held, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        last: deque[str] = deque(maxlen=8)
        with children.start(command + ["--force"] * force, cwd=root, env=env) as process:
            assert process.stdout is not None
            for line in process.stdout:
                # Progress bars rewrite their line; what they said last is kept.
                text = line.rstrip("\n").rsplit("\r", 1)[-1].rstrip()
                if text:
                    last.append(text)
                    log.info(text)
            code = process.wait()
    finally:
        if slots:
            slots.put(held)
    if code:
        raise FlowError(
            f"stage {name}",
            got=f"exit code {code}: " + " | ".join(last),
            expected="0",
            cure=f"fix what it says, and see it alone with: dvc repro --single-item {name}",
        )


# A task that waits for others holds a thread: there must be more threads than stages.
@flow(name="reproduce", task_runner=ThreadPoolTaskRunner(max_workers=1000))
def reproduce(params: ReproduceParams = ReproduceParams()) -> str:  # noqa: B008  (Prefect reads the form from it)
    """Bring every stage up to date and show the comparison; a failed stage stops only what depends on it."""
    root, log = Path.cwd(), get_run_logger()
    planned = plan(root, params.targets, force=params.force)
    log.info("%d stages, %d to run", len(planned.needs), len(planned.dirty))
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for env in devices(params.slots):
        slots.put(env)
    children = Children()

    @task(name="stage")
    def stage(name: str) -> State | None:
        if name not in planned.dirty:
            return Completed(name="Cached", message="up to date")
        _run(name, root, children, slots if name in planned.device else None, params.force)
        return None

    futures: dict[str, PrefectFuture[State | None]] = {}
    try:
        for name, needs in planned.needs.items():
            futures[name] = stage.with_options(task_run_name=name).submit(name, wait_for=[futures[n] for n in needs])
        wait(list(futures.values()))
    except BaseException as error:
        children.end()
        if not isinstance(error, Exception):  # interrupted or cancelled
            # The stages are ended; whatever Prefect still waits for shall not keep the process for long.
            watchdog = threading.Timer(20, os._exit, [1])
            watchdog.daemon = True
            watchdog.start()
        raise
    failed = [name for name, future in futures.items() if not future.state.is_completed()]
    if failed:
        raise FlowError(
            "flow",
            got=f"not completed: {', '.join(failed)}",
            expected="all stages completed",
            cure="see the log of the first of them; what is done is not run again",
        )
    report = root / "reports" / "comparison.md"
    text = report.read_text(encoding="utf-8") if report.exists() else "All stages are up to date."
    create_markdown_artifact(
        text.replace("![", "<!-- ![").replace("(figure.png)", "(figure.png) -->"), key="comparison"
    )
    return text


def main(
    target: Annotated[list[str] | None, typer.Argument(help="Stages; none: all.")] = None,
    slots: Annotated[int, typer.Option(min=0, help="Stages on devices at once; 0: one per GPU, or one.")] = 0,
    force: Annotated[bool, typer.Option(help="Run stages again that are up to date.")] = False,
) -> None:
    """Run the experiment's stages in parallel, as Prefect tasks."""
    try:
        print(reproduce(ReproduceParams(targets=target or [], slots=slots, force=force)))
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if "targets" in error.place or error.place == str(Path.cwd()) else 1) from error


if __name__ == "__main__":
    typer.run(main)
