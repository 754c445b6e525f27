"""A machine of a work pool: `python -m flows.worker join --server URL --pool gpu`, and `status`.

`join` works in the foreground until it is ended: one stage per slot at a time, a slot per GPU. SIGUSR1 lets it finish:
stages save a resume point and end, their runs are queued again, and it ends with exit code 75.
"""

import asyncio
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from flows.children import GUARD
from flows.command import run_command
from flows.graph import FlowError
from flows.machine import (
    DRAIN_VARIABLE,
    MACHINE_NAME,
    SLOTS_VARIABLE,
    UNFIT_VARIABLE,
    devices,
    identity,
    refuse_changed,
    refuse_other,
)
from flows.workspace import ready
from modelstock.files import SCRATCH, atomic_path
from modelstock.stopping import VARIABLE

app = typer.Typer(add_completion=False, no_args_is_help=True)
ROOT_VARIABLE = "MODELSTOCK_ROOT"  # where the flow `stage` finds this machine's clone
STOP_FILE, UNFIT_FILE = Path(".dvc/tmp/stop"), Path(".dvc/tmp/unfit")
QUERY_S = 2  # how often the pool is asked for work
AGAIN_S = 5.0  # after a worker that ended because its server did not answer
OUT_OF_TIME = os.EX_TEMPFAIL  # the exit code of a machine whose time was over


def api_url(server: str) -> str:
    """The address of a Prefect server's API: with or without `/api`.

    Raises:
        FlowError: no address.
    """
    if not server.startswith(("http://", "https://")):
        raise FlowError("--server", got=repr(server), expected="http://HOST:PORT", cure="take what `make head` prints")
    return server.rstrip("/").removesuffix("/api") + "/api"


def _heads(pool: str) -> dict[str, str]:
    """The commit and the versions that the head has given the pool.

    Raises:
        FlowError: a server that does not answer or refuses, or one without this pool.
    """
    from prefect.exceptions import ObjectNotFound

    from flows.life import asking

    try:
        with asking() as client:
            deployment = client.read_deployment_by_name(f"stage/{pool}")
    except ObjectNotFound as error:
        raise FlowError(
            f"work pool {pool}",
            got="none on this server",
            expected="one that the head has made",
            cure="`make head` there",
        ) from error
    return {str(key): str(value) for key, value in (deployment.parameters or {}).get("head", {}).items()}


def check(pool: str, root: Path, name: str) -> list[str]:
    """Whether this machine can work for a pool; what it is, a line each.

    Raises:
        FlowError: another commit, other versions, changed files, no DVC remote, or no scratch to write to.
    """
    from flows.transport import Transport

    refuse_other(identity(root), _heads(pool), name)
    refuse_changed(root, name)
    remote = Transport(root).check_remote()
    try:
        SCRATCH.mkdir(parents=True, exist_ok=True)
        with atomic_path(SCRATCH / "writable") as file:
            file.write_text("")
        (SCRATCH / "writable").unlink(missing_ok=True)
    except OSError as error:
        raise FlowError(
            SCRATCH, got=error.strerror, expected="a folder to write to", cure="set MODELSTOCK_SCRATCH to another"
        ) from error
    shared = (
        " (of this machine alone: what was begun here goes on here)" if not os.environ.get("MODELSTOCK_SCRATCH") else ""
    )
    return [f"DVC remote: {remote}", f"resume points: {SCRATCH.absolute()}{shared}"]


Server = Annotated[
    str, typer.Option(envvar="MODELSTOCK_SERVER", help="The Prefect server of the head: http://HOST:PORT")
]
PoolName = Annotated[str, typer.Option(envvar="MODELSTOCK_POOL", help="The work pool.")]


@app.command()
def join(
    server: Server,
    pool: PoolName = "gpu",
    slots: Annotated[int, typer.Option(min=0, help="Stages at once; 0: one per GPU, or one without GPUs.")] = 0,
    name: Annotated[str, typer.Option(help="What the machine is called in Prefect; empty: its host name.")] = "",
    idle: Annotated[float, typer.Option(min=0, help="End after so many seconds without work; 0: never.")] = 0,
    drain: Annotated[float, typer.Option(min=1, help="Seconds for stages that SIGUSR1 asks to save and to end.")] = 60,
    only_check: Annotated[bool, typer.Option("--check", help="Check this machine, and end.")] = False,
) -> None:
    """Let this machine work for a pool, in the clone that is the working directory."""
    os.environ["PREFECT_API_URL"] = api_url(server)
    root = Path.cwd()
    with ready("flows.worker"):
        name = name or platform.node()
        lines = check(pool, root, name)
        count = len(devices(slots))
        print(f"pool {pool}: {count} slot{'s' * (count > 1)}", *lines, sep="\n", flush=True)
        if only_check:
            return
        for file in (STOP_FILE, UNFIT_FILE):
            file.unlink(missing_ok=True)
        lock = Path("dvc.lock").read_bytes() if Path("dvc.lock").exists() else None
        try:
            code = _keep_serving(pool, name=name, slots=count, idle=idle, drain=drain, root=root)
        finally:
            STOP_FILE.unlink(missing_ok=True)
            _put_back(lock)
            _sign_off(pool, name)
    raise typer.Exit(code)


def _put_back(lock: bytes | None) -> None:
    """The clone's dvc.lock as it was: what ran here is recorded at the head, and here in DVC's run-cache."""
    file = Path("dvc.lock")
    if lock is None:
        file.unlink(missing_ok=True)
    elif not file.exists() or file.read_bytes() != lock:
        with atomic_path(file) as temporary:
            temporary.write_bytes(lock)


def _sign_off(pool: str, name: str) -> None:
    """Take the machine off the server's list, where it would stay for some minutes."""
    from flows.life import NoAnswerError, asking

    with suppress(NoAnswerError, FlowError), asking() as client:
        client.request(
            "DELETE", "/work_pools/{work_pool_name}/workers/{name}", path_params={"work_pool_name": pool, "name": name}
        )


def _keep_serving(pool: str, *, name: str, slots: int, idle: float, drain: float, root: Path) -> int:
    """Run the worker below a guard, and again when it ends because the server did not answer; its exit code."""
    env = {
        **os.environ,
        ROOT_VARIABLE: str(root),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")])),
        VARIABLE: str(STOP_FILE.absolute()),
        SLOTS_VARIABLE: str(slots),
        DRAIN_VARIABLE: str(drain),
        UNFIT_VARIABLE: str(UNFIT_FILE.absolute()),
        MACHINE_NAME: name,
        "PREFECT_WORKER_QUERY_SECONDS": os.environ.get("PREFECT_WORKER_QUERY_SECONDS", str(QUERY_S)),
        "PREFECT_WORKER_PREFETCH_SECONDS": "0",
    }
    command = [*GUARD, sys.executable, "-m", "flows.worker", "serve", pool, name, str(slots), str(idle)]
    interrupted: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            STOP_FILE.touch()  # the worker sees it, and so does every stage
            return
        interrupted.append(number)
        if process is not None:
            process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    while not interrupted:
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, start_new_session=True)
        if interrupted:  # just before there was a process to pass it on to
            process.terminate()
        code = process.wait()
        if UNFIT_FILE.exists():
            print(f"error: {UNFIT_FILE.read_text()}; this machine leaves the pool", file=sys.stderr)
            UNFIT_FILE.unlink()
            return 1
        if code in (0, OUT_OF_TIME):
            return code
        if STOP_FILE.exists():
            return OUT_OF_TIME
        if not interrupted:
            print(f"the worker ended (exit code {code}): again in {AGAIN_S:.0f} s", file=sys.stderr, flush=True)
        deadline = time.monotonic() + AGAIN_S
        while not interrupted and time.monotonic() < deadline:
            time.sleep(0.2)
    return 0 if interrupted[0] == signal.SIGTERM else 130


@app.command(hidden=True)
def serve(pool: str, name: str, slots: int, idle: float) -> None:
    """What `join` runs below a guard: the worker itself."""
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.workers.process import ProcessWorker

    warnings.filterwarnings("ignore", message="Type 'Worker'")  # it takes the place of Prefect's own, on purpose

    class Worker(ProcessWorker):
        """Prefect's own, which ends when it has had no work for a while, or may not work any more.

        Prefect's ends also when its server has not answered for some minutes, and all stages with it.
        """

        last_busy = time.monotonic()
        silent = False

        async def get_and_submit_flow_runs(self) -> Any:
            busy = self.limiter.borrowed_tokens > 0
            if busy:
                self.last_busy = time.monotonic()
            over = STOP_FILE.exists() or UNFIT_FILE.exists()
            if over and not busy:
                _exit(OUT_OF_TIME)
            if idle and time.monotonic() - self.last_busy > idle:
                _exit(0)
            return [] if over else await self.patiently(super().get_and_submit_flow_runs())

        async def _sync_and_initialize(self) -> None:
            await self.patiently(super()._sync_and_initialize())

        async def patiently(self, asked: Any) -> Any:
            """What the server gives; nothing while it does not answer."""
            try:
                given = await asked
            except (httpx.HTTPError, PrefectHTTPStatusError) as error:
                if not self.silent:
                    print(f"Prefect does not answer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                self.silent = True
                return []
            self.silent = False
            return given

    asyncio.run(Worker(work_pool_name=pool, name=name, limit=slots, create_pool_if_not_found=False).start())


def _exit(code: int) -> None:
    """End the process at once: nothing runs, and Prefect's own way would report a failure."""
    sys.stdout.flush()
    os._exit(code)


@app.command()
def status(server: Server, pool: PoolName = "gpu") -> None:
    """The machines of a pool, what each of them runs, and how much waits."""
    os.environ["PREFECT_API_URL"] = api_url(server)
    _heads(pool)
    from flows.pool import at_work

    for line in at_work(pool):
        print(line)


if __name__ == "__main__":
    run_command(app)
