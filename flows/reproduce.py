"""The whole experiment as a Prefect flow over DVC's graph.

DVC keeps the graph and decides what must run; this flow knows stages by name only. It starts each stage as soon as
what it needs is done and a device is free for it, and shows what happens in Prefect: a task begins when its stage does.
"""

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "true")

import typer
from prefect import flow, get_run_logger, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.events.worker import EventsWorker
from prefect.exceptions import CancelledRun
from prefect.futures import PrefectFuture, wait
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelled, Completed
from pydantic import BaseModel, ConfigDict, Field

from flows.children import GUARD, Children, Ended, run_stage
from flows.graph import FlowError, Plan, choices, lock_in_order, plan
from flows.machine import devices
from flows.pool import POLL_S, Gone, Pool
from flows.progress import Progress
from flows.services import HOST, answers
from flows.show import show
from flows.workspace import ready
from modelstock.errors import ModelstockError, few

TELL_S = 5  # for what Prefect has not been told when a flow ends
REPORT = Path("reports/comparison.json")


def _offer(schema: dict[str, Any]) -> None:
    """Let a form offer the stages that there are; a name is checked by the flow, which knows those of its time."""
    with suppress(ModelstockError):
        schema["items"]["enum"] = choices(Path.cwd())


class ReproduceParams(BaseModel):
    """What a run of the flow can be asked."""

    model_config = ConfigDict(extra="forbid")
    targets: list[str] = Field(
        default=[],
        description="Stages, or kinds of stages, to bring up to date with all that they need; none: all.",
        json_schema_extra=_offer,
    )
    slots: int = Field(default=0, ge=0, description="Stages on devices at once; 0: one per GPU, or one without GPUs.")
    force: bool = Field(default=False, description="Run the targets again, and nothing else, if they are up to date.")
    pool: str = Field(default="", description="The work pool for stages on devices; empty: this machine.")


def _run(
    name: str, *, root: Path, children: Children, slot: Mapping[str, str], progress: Progress, force: bool
) -> None:
    """Run one stage here, its output line by line in the task's log; `slot`: the environment of its device.

    Raises:
        FlowError: it failed.
        Ended: it was ended with the flow.
    """
    log = get_run_logger()
    log.info(progress.started(name))
    ran = False
    try:
        ran = run_stage(name, root=root, children=children, env=slot, force=force, line=log.info)
    finally:
        progress.ended(name, whole=ran)


Futures = dict[str, PrefectFuture[Any]]


@contextmanager
def _ended(children: Children, futures: Futures) -> Iterator[None]:
    """End all stages if anything goes wrong inside, an interrupt or a cancellation too, and let their tasks say so."""
    try:
        yield
    except BaseException as error:
        children.end()
        wait(list(futures.values()), timeout=10)
        if not isinstance(error, Exception):  # interrupted or cancelled
            # The stages are ended; whatever Prefect still waits for shall not keep the process for long.
            watchdog = threading.Timer(20, os._exit, [1])
            watchdog.daemon = True
            watchdog.start()
        raise


def up_to_date(planned: Plan) -> str:
    """What a run that has nothing to do says."""
    return f"stages up to date: {len(planned.needs)} of {len(planned.needs)}, nothing to run"


@flow(name="reproduce", persist_result=False)
def reproduce(params: ReproduceParams = ReproduceParams()) -> State[None]:  # noqa: B008  (Prefect reads the form from it)
    """Bring every stage up to date and show the comparison; a failed stage stops only what depends on it."""
    with ready("flows.reproduce"):
        root, log = Path.cwd(), get_run_logger()
        planned = plan(root, params.targets, force=params.force)
        if not planned.dirty:
            log.info(up_to_date(planned))
            return Completed(message=up_to_date(planned))
        log.info("stages to run: %d of %d", len(planned.dirty), len(planned.needs))
        before = _moment(root / REPORT)
        try:
            with lock_in_order(root, planned):
                _run_all(planned, root=root, slots=params.slots, pool=params.pool)
        except Gone:
            return Cancelled(message="cancelled in Prefect; no stage runs any more")
        if _moment(root / REPORT) not in (None, before):
            show(root / REPORT)
        return Completed(message=f"stages run: {len(planned.dirty)} of {len(planned.needs)}")


def _moment(file: Path) -> tuple[int, int] | None:
    """What tells a file from the one that was written there before."""
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def _run_all(planned: Plan, *, root: Path, slots: int, pool: str) -> None:
    """Run the planned stages, each as a task that begins once what it needs is done and a device is free for it.

    With a `pool`, stages on devices run there, and their task is to bring their results here.

    Raises:
        FlowError: a stage failed; what does not depend on it has run.
        Gone: the flow run was cancelled in Prefect, and works with a pool.
    """
    free = devices(slots)
    taken: dict[str, dict[str, str]] = {}
    children, progress = Children(), Progress(planned, slots=len(free))
    on_device = planned.device & planned.dirty

    @task(name="stage", persist_result=False)
    def stage(name: str, slot: dict[str, str]) -> State[None] | None:
        if name not in planned.dirty:
            progress.skipped(name)
            return Completed(name="Cached", message="up to date")
        if remote and name in on_device:
            remote.accept(name)
            return None
        try:
            _run(name, root=root, children=children, slot=slot, progress=progress, force=name in planned.forced)
        except Ended:
            return Cancelled(message="ended with the flow")
        return None

    futures: Futures = {}
    done: set[str] = set()
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()

    def begin(name: str, slot: dict[str, str]) -> None:
        taken[name] = slot
        submit = stage.with_options(task_run_name=name).submit
        needs = [futures[need] for need in planned.needs[name]]
        futures[name] = submit(name, slot, return_state=False, wait_for=needs)
        futures[name].add_done_callback(lambda _, name=name: ended.put(name))  # type: ignore[misc]

    with (
        _pool(pool, planned, root=root, progress=progress) as remote,
        _ended(children, futures),
    ):
        while True:
            for name, needs in planned.needs.items():
                if name in futures or not needs <= done or (remote and name in remote.away):
                    continue
                if name not in on_device:
                    begin(name, {})
                elif remote:
                    if not remote.begin(name):
                        begin(name, {})
                    if remote.due:
                        break  # what has ended meanwhile is not left waiting for the rest to be ordered
                elif free:
                    begin(name, free.pop(0))
            if not taken and not (remote and remote.busy):
                break
            for name in _next(ended, remote):
                if name not in taken:  # it has ended in the pool
                    begin(name, {})
                    continue
                futures[name].wait()
                slot = taken.pop(name)
                if name in on_device and not remote:
                    free.append(slot)
                if futures[name].state.is_completed():
                    done.add(name)
    failed = [name for name in futures if name not in done]
    not_run = [name for name in planned.needs if name not in futures]
    if failed:
        raise FlowError(
            "flow",
            got=f"failed: {', '.join(failed)}" + (f"; not run: {few(not_run)}" if not_run else ""),
            expected="all stages completed",
            cure="see the log of the first of them; what is done is not run again",
        )


@contextmanager
def _pool(name: str, planned: Plan, *, root: Path, progress: Progress) -> Iterator[Pool | None]:
    """The work pool of that name, in the block; None without a name."""
    if not name:
        yield None
        return
    with Pool(name, planned, root=root, progress=progress, log=get_run_logger()) as pool:
        yield pool


def _next(ended: "queue.SimpleQueue[str]", pool: Pool | None) -> list[str]:
    """The names of stages whose task has ended, or which have ended in the pool; waits for one, or a moment."""
    try:
        names = [ended.get(timeout=POLL_S if pool else None)]
    except queue.Empty:
        names = []
    return names + (pool.poll() if pool else [])


def _reach(url: str) -> None:
    """Refuse a server that does not answer, before Prefect does so in many lines."""
    try:
        with get_client(sync_client=True) as client:
            problem = client.api_healthcheck()
            client.read_work_pools(limit=1)  # its health is told to everyone, and no more without its password
    except Exception as error:  # of whichever library noticed
        problem = error
    if problem is not None:
        raise FlowError(
            f"Prefect at {url}",
            got=f"{type(problem).__name__}: {str(problem).partition(chr(10))[0]}",
            expected="a server that answers",
            cure="set PREFECT_API_AUTH_STRING to its user:password"
            if "401" in str(problem)
            else "start it (`make up`), or unset PREFECT_API_URL",
        )


def _tell_prefect() -> None:
    """Send Prefect what it has not been told yet: at the end of the process its server may be gone, and each would be
    tried for a minute."""
    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=TELL_S)


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
    env = {**os.environ, "PREFECT_UI_ENABLED": "0"}
    # In a session of its own: Ctrl-C is for the flow, which tells the server how it ended.
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True, umask=0o077) as server:
        try:
            while not answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    raise FlowError("Prefect", got="no answer", expected=f"a server at {url}", cure="run it again")
                time.sleep(0.2)
            with temporary_settings({PREFECT_API_URL: url}):
                yield
        finally:
            _tell_prefect()
            server.terminate()


def main(
    target: Annotated[list[str] | None, typer.Argument(help="Stages; none: all.")] = None,
    slots: Annotated[int, typer.Option(min=0, help="Stages on devices at once; 0: one per GPU, or one.")] = 0,
    force: Annotated[bool, typer.Option(help="Run these stages, and no others, also if they are up to date.")] = False,
    pool: Annotated[str, typer.Option(help="The work pool for stages on devices; none: this machine.")] = "",
) -> None:
    """Run the experiment's stages in parallel, as Prefect tasks."""
    try:
        with ready("flows.reproduce"):
            if pool and slots:
                raise FlowError(
                    "--slots", got=slots, expected="none with --pool", cure="give it to `join` on each machine"
                )
            if pool and not PREFECT_API_URL.value():
                raise FlowError(
                    "--pool",
                    got="no PREFECT_API_URL",
                    expected="the head's Prefect server",
                    cure="set it, as `make head` prints",
                )
            # Refused in one line here, or done without a flow; else the flow looks again.
            planned = plan(Path.cwd(), target or [], force=force)
        if planned.dirty:
            with _server():
                reproduce(ReproduceParams(targets=target or [], slots=slots, force=force, pool=pool))
        else:
            print(up_to_date(planned))
        if REPORT.exists():
            print(f"Comparison: {REPORT.with_suffix('.html')}")
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2 if "targets" in error.place or error.place == str(Path.cwd()) else 1) from error
    except CancelledRun:
        print("cancelled in Prefect: no stage runs any more, and what is done is not run again", file=sys.stderr)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        print("interrupted: no stage runs any more, and what is done is not run again", file=sys.stderr)
        raise typer.Exit(130) from None


if __name__ == "__main__":
    typer.run(main)
