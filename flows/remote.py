"""The flow `stage`: one stage of the experiment on a machine of a work pool.

What it reads and wrote goes through the DVC remote (flows/transport.py); through Prefect go only the order, its state,
the log, and a sign of life.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows.children import Children, Ended, run_stage
from flows.graph import FlowError
from flows.life import FLOW, MACHINE, Life, NoAnswerError, Signs, asking, data_of, runs_of, signs_of
from flows.machine import (
    DRAIN_VARIABLE,
    SLOTS_VARIABLE,
    UNFIT_VARIABLE,
    UnfitError,
    description,
    identity,
    locked,
    refuse_changed,
    refuse_other,
    slot,
)
from flows.transport import Order, RemoteError, Result, Transport, patiently
from modelstock.files import SCRATCH
from modelstock.stopping import asked_to_end

# Names of states: the machine's time was over, it is not as the head, and its bytes are not the remote's.
OUT_OF_TIME, UNFIT, OTHER_BYTES = "OutOfTime", "Unfit", "OtherBytes"
GIVEN_UP = "given up"  # a tag of runs that the head has taken for lost, and ordered again
CANCELLED = "cancelled in Prefect"


class _AtWork(Life):
    """The life of a stage's run: it ends the stage when its run or its flow is over, or the time of the machine."""

    def __init__(self, run: UUID, parent: UUID | None, lease: float, children: Children) -> None:
        super().__init__(run, MACHINE, lease)
        self.parent, self.children = parent, children
        self.ending = ""  # why the stage is being ended
        self._signs, self._asked, self._began = Signs(), 0.0, False
        self._drain_s = float(os.environ.get(DRAIN_VARIABLE) or 60)

    def missed(self) -> None:
        self._signs.excuse()

    def watch(self, client: SyncPrefectClient) -> None:
        if self.ending:
            return
        runs = runs_of(client, [self.run, *([self.parent] if self.parent else [])])
        own = runs.get(self.run)
        if own is None or own.state_type not in (StateType.PENDING, StateType.RUNNING) or GIVEN_UP in own.tags:
            self._end(CANCELLED if own and own.state_type == StateType.CANCELLING else "given up by its flow")
        elif self.parent:
            self._watch_flow(runs.get(self.parent), client)
        if asked_to_end():
            self._asked = self._asked or time.monotonic()
            if time.monotonic() - self._asked > self._drain_s:
                self._end(f"not ended {self._drain_s:.0f} s after it was asked to")

    def _watch_flow(self, flow_run: FlowRun | None, client: SyncPrefectClient) -> None:
        """End the stage where nobody waits for it: its flow is over, or gone without saying so."""
        assert self.parent
        sign = signs_of(client, [self.parent], FLOW).get(self.parent)
        age = self._signs.age("flow", sign and sign.updated)
        if not self._began:
            # A run may have waited while its flow died: both times are the server's.
            own = signs_of(client, [self.run], MACHINE).get(self.run)
            if own and sign and own.updated and sign.updated:
                age = (own.updated - sign.updated).total_seconds()
            self._began = True
        if flow_run is None or flow_run.state_type not in (StateType.PENDING, StateType.RUNNING):
            self._end("its flow is over")
        elif age > self.lease:
            self._end(f"its flow gave no sign of life for {age:.0f} s")

    def _end(self, why: str) -> None:
        self.ending = why
        # Prefect may be sending or fetching data, which nothing interrupts.
        watchdog = threading.Timer(30, os._exit, [1])
        watchdog.daemon = True
        watchdog.start()
        self.children.end()


@flow(name="stage", persist_result=False)
def stage(
    order: dict[str, Any], head: dict[str, str], parent: UUID | None = None, lease: float = 60, tracking: str = ""
) -> State[None]:
    """Run one stage on this machine, if it is the head's: take its inputs from the DVC remote, and send its outputs.

    `head`: the head's commit and versions. `parent`: the flow run that waits for it. `tracking`: the head's MLflow.
    """
    root, log, wanted, children = Path.cwd(), get_run_logger(), Order(**order), Children()
    if tracking:
        os.environ.setdefault("MLFLOW_TRACKING_URI", tracking)
    about = description()
    run = UUID(str(this_run.id))
    try:
        with _AtWork(run, parent, lease, children) as life:
            life.facts = {**about, "stage": wanted.name}
            return _stage(wanted, root, life=life, head=head, about=about, log=log)
    except UnfitError as error:
        log.error(str(error))
        if UNFIT_VARIABLE in os.environ:
            Path(os.environ[UNFIT_VARIABLE]).write_text(str(error))
        return Crashed(name=UNFIT, message=str(error))
    except RemoteError as error:  # another machine, or this one later, may reach it
        log.error(str(error))
        return Crashed(message=str(error))
    except FlowError as error:
        log.error(str(error))
        return Failed(message=str(error))
    finally:
        children.end()


def _stage(
    order: Order, root: Path, *, life: _AtWork, head: Mapping[str, str], about: Mapping[str, str], log: Any
) -> State[None]:
    """The work of `stage`, in a slot of this machine.

    Raises:
        FlowError: this machine is not as the head, or the stage failed.
    """
    refuse_other(identity(root), head, about["machine"])
    refuse_changed(root, about["machine"])
    if asked_to_end():
        return Crashed(name=OUT_OF_TIME, message="this machine's time is over")
    with slot(root, int(os.environ.get(SLOTS_VARIABLE) or 0)) as (number, device), _alone(order, life, log) as waited:
        about = {**about, "slot": str(number), "stage": order.name}
        life.facts = about

        def line(text: str) -> None:
            log.info(text)
            life.facts = {**about, "last line": text}

        transport = Transport(root)
        if waited and not order.force and patiently(lambda: transport.results(order), log.warning):
            return Completed(message=f"{about['machine']}: the run that it waited for has sent its result")
        times = [time.monotonic()]
        patiently(lambda: transport.take_inputs(order), log.warning)
        times.append(time.monotonic())
        transport.compare(order)
        resume = _resume_points(order, life.parent)
        try:
            run_stage(
                order.name,
                root=root,
                children=life.children,
                env=device,
                force=order.force,
                line=line,
                resume=resume,
            )
        except (Ended, FlowError) as error:
            if life.ending:
                # A flow that lives after all orders again what has crashed.
                return (Cancelled if life.ending == CANCELLED else Crashed)(message=life.ending)
            if asked_to_end():
                log.info("%s: ended, for this machine's time is over", order.name)
                return Crashed(name=OUT_OF_TIME, message=str(error))
            raise
        times.append(time.monotonic())
        result = transport.written(order)
        others = patiently(lambda: transport.send(order, result), log.warning)
        times.append(time.monotonic())
        _sign_result(order, result, about)
        if resume:
            shutil.rmtree(resume, ignore_errors=True)
        pulled, ran, sent = (b - a for a, b in pairwise(times))
        message = f"{about['machine']}: pulled in {pulled:.1f} s, ran in {ran:.1f} s, sent in {sent:.1f} s"
        if others:
            transport.forget(order, result)
            return Completed(name=OTHER_BYTES, message=f"{message}; other bytes than in the remote, not sent")
        return Completed(message=message)


@contextmanager
def _alone(order: Order, life: _AtWork, log: Any) -> Iterator[bool]:
    """Hold this stage's lock beside the resume points: a run that was given up may not have noticed yet, and two would
    write the same ones. Its machine's end frees it, also where the folder is shared by NFS. Gives whether it waited."""
    file = SCRATCH.absolute() / "runs" / f"{order.key}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    lock, waits = None, False
    while not life.ending:
        try:
            lock = locked(file)
        except OSError as error:  # a file system without locks
            log.warning("%s: %s: runs of it at the same time would not notice each other", file, error.strerror)
            break
        if lock:
            break
        if not waits:
            log.info("%s: waits for a run of it that was given up and has not ended yet", order.name)
        waits = True
        time.sleep(1)
    with lock or nullcontext():
        yield waits


def _resume_points(order: Order, parent: UUID | None) -> Path | None:
    """Where a forced stage finds no resume point but those of its own flow; None for others, which have the usual."""
    return SCRATCH.absolute() / "forced" / f"{order.key}-{parent}" if order.force else None


def _sign_result(order: Order, result: Result, about: Mapping[str, str]) -> None:
    """Leave in Prefect which machine made these bytes."""
    made = {**about, **{f"output {path}": value for path, value in result.outs.items()}, "run-cache": result.value}
    with suppress(NoAnswerError, FlowError), asking() as client:
        new = ArtifactCreate(
            key=signature(order),
            type="table",
            data=data_of(made),
            flow_run_id=UUID(str(this_run.id)),
            description=f"{order.name}: who made which bytes",
        )
        client.create_artifact(new)


def signature(order: Order) -> str:
    """The key of the artifacts that say who made which bytes of a stage."""
    return f"made-{order.key[:20]}"
