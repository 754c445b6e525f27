"""A work pool as a flow at the head sees it: it orders stages, follows them, and brings their results here."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.runtime import flow_run as this_run
from prefect.states import Cancelled, Cancelling, Crashed
from prefect.utilities.callables import parameter_schema
from prefect.workers.process import ProcessWorker

from flows.graph import FlowError, Plan
from flows.life import (
    FLOW,
    MACHINE,
    PAGE,
    Life,
    NoAnswerError,
    Signs,
    asked_once,
    asking,
    facts,
    lease_s,
    machine_of,
    runs_of,
    signs_of,
)
from flows.machine import changed_files, identity
from flows.progress import Progress
from flows.remote import CANCELLED, GIVEN_UP, OTHER_BYTES, OUT_OF_TIME, UNFIT, signature, stage
from flows.transport import Order, RemoteError, Result, Transport, patiently, reads
from modelstock.errors import few

HEADS_OWN = "modelstock"  # the pool in which the head runs its own flows
POLL_S = 1.0
LIVES = 3  # how often in a row a stage is begun that is lost soon each time: it may be what its machines die of
SOON_S = 900.0


@dataclass
class _Away:
    """A stage that is with the pool."""

    order: Order
    run: UUID
    begun: int = 1  # how often it was ordered
    lost: int = 0  # how often in a row it was lost soon after its start
    started: float | None = None  # when it gave its first sign of life


class Gone(BaseException):
    """The flow run was cancelled in Prefect."""


class Pool:
    """A work pool as a flow at the head sees it. Enter it inside the flow run; its end ends what is still away.

    Raises:
        FlowError: no such server, no DVC remote, or a stage whose result no run-cache would keep.
    """

    def __init__(self, name: str, planned: Plan, *, root: Path, progress: Progress, log: Any) -> None:
        self.name, self.planned, self.progress, self.log = name, planned, progress, log
        self.transport, self.lease = Transport(root), lease_s()
        self.remote = self.transport.check_remote()
        self.transport.check_transportable(planned.device & planned.dirty)
        self._reads, self._head = reads(root), identity(root)
        self._run, self._begun_as = UUID(str(this_run.id)), uuid4().hex  # a run that is retried is begun anew
        self.away: dict[str, _Away] = {}
        self._orders: dict[str, Order] = {}
        self._failures: dict[str, str] = {}
        self._waiting: set[str] = set()  # not ordered yet, for the server does not answer
        self._ended: list[str] = []
        self._signs, self._silent, self._polled = Signs(), False, 0.0
        self._life = Life(self._run, FLOW, self.lease)

    def __enter__(self) -> Self:
        self._check_pool()
        deploy(self.name, head=self._head)
        self._life.__enter__()
        online = _online(self.name)
        self.log.info(
            "work pool %s: %s, DVC remote %s",
            self.name,
            f"{len(online)} workers online: {few(online)}" if online else "no worker is online, stages wait for one",
            self.remote,
        )
        changed = changed_files(Path.cwd())
        if changed:
            self.log.warning("uncommitted changes: %s; a machine refuses stages for which they count", few(changed))
        return self

    def _check_pool(self) -> None:
        """Refuse a pool that is none: nobody would ever join it."""
        with asking() as client:
            pools = [pool.name for pool in client.read_work_pools() if pool.name != HEADS_OWN]
        if self.name not in pools:
            raise FlowError(
                "--pool",
                got=repr(self.name),
                expected=" or ".join(pools) or "one that the head has made",
                cure=f"python -m flows.services up --profile head --pool {self.name}",
            )

    def __exit__(self, *_: object) -> None:
        self.end()
        self._life.__exit__()

    def begin(self, name: str) -> bool:
        """Order a stage whose inputs are here; False if its result is known and only needs to be accepted.

        A server that does not answer is asked again by the next call; what else goes wrong is said by `accept`.
        """
        self._waiting.discard(name)
        try:
            order = self.transport.order(name, self._reads[name], force=name in self.planned.forced)
            self._orders[name] = order
            counts = patiently(lambda: self._known(order)[0], self.log.warning)
            if counts and not order.force:
                return False
            if counts:  # the other machine's bytes are compared with it
                patiently(lambda: self.transport.send(order, counts), self.log.warning)
            patiently(lambda: self.transport.send_inputs(order), self.log.warning)
            self.away[name] = _Away(order, self._submit(order, 0))
        except NoAnswerError as error:
            self._no_answer(error)
            self._waiting.add(name)
        except (FlowError, ObjectNotFound) as error:  # of this stage alone: the others go on
            self._failures[name] = str(error)
            return False
        return True

    @property
    def busy(self) -> bool:
        """Whether any stage is with the pool, or is to be."""
        return bool(self.away or self._waiting)

    def _submit(self, order: Order, attempt: int) -> UUID:
        # As other machines reach it, which is not as this one does.
        tracking = os.environ.get("MODELSTOCK_MLFLOW_URL") or os.environ.get("MLFLOW_TRACKING_URI", "")
        parameters = {
            "order": asdict(order),
            "head": self._head,
            "parent": str(self._run),
            "lease": self.lease,
            # Without a password: each machine has its own way to log in.
            "tracking": tracking if tracking.startswith("http") and "@" not in tracking else "",
        }
        with asked_once():
            run: Any = run_deployment(
                f"stage/{self.name}",
                parameters=parameters,
                flow_run_name=order.name,
                timeout=0,
                # A request that is sent again, because its answer was lost, makes no second run.
                idempotency_key=f"{self._begun_as}-{order.key}-{attempt}",
            )
        return UUID(str(run.id))

    @property
    def due(self) -> bool:
        """Whether it is time to look at what happens in the pool."""
        return time.monotonic() - self._polled >= POLL_S

    def poll(self) -> list[str]:
        """The stages that have ended since, however they did; `accept` then says how. Asks the server now and then.

        Raises:
            Gone: the flow run was cancelled in Prefect.
        """
        if not self.due:
            return []
        self._polled = time.monotonic()
        try:
            with asking() as client:
                ids = [away.run for away in self.away.values()]
                runs = runs_of(client, [self._run, *ids])
                own = runs.get(self._run)
                if own is None or own.state_type in (StateType.CANCELLING, StateType.CANCELLED):
                    raise Gone
                signs = signs_of(client, ids, MACHINE)
                for name in list(self.away):
                    if self._follow(name, runs, signs, client):
                        del self.away[name]
                        self._ended.append(name)
        except NoAnswerError as error:
            self._no_answer(error)
            return self._take_ended()
        if self._silent:
            self.log.info("Prefect answers again")
        self._silent = False
        self._life.facts = self._overview(runs, signs)
        return self._take_ended()

    def _take_ended(self) -> list[str]:
        ended, self._ended = self._ended, []
        return ended

    def _no_answer(self, error: Exception) -> None:
        if not self._silent:
            self.log.warning("Prefect does not answer: stages go on, and so does this flow once it does (%s)", error)
        self._silent = True
        self._signs.excuse()

    def _follow(
        self, name: str, runs: Mapping[UUID, FlowRun], signs: Mapping[UUID, Any], client: SyncPrefectClient
    ) -> bool:
        """Whether a stage has ended; one whose machine is lost, or out of time, is ordered again."""
        away = self.away[name]
        run = runs.get(away.run)
        kind = run.state_type if run and run.state else StateType.CRASHED
        message = (run.state.message if run and run.state else None) or ""
        if kind == StateType.SCHEDULED:
            return False
        if kind in (StateType.PENDING, StateType.RUNNING, StateType.CANCELLING):
            sign = signs.get(away.run)
            if sign and away.started is None:
                away.started = time.monotonic()
                self.log.info(self.progress.started(name))
            # Between taking a run and its first sign of life lies the start of a process.
            patience = self.lease if sign else 2 * self.lease
            age = self._signs.age(str(away.run), (kind, sign and sign.updated))
            if age <= patience:
                return False
            message = f"no sign of life for {patience:.0f} s"
            lost: State[None] = (Cancelled if kind == StateType.CANCELLING else Crashed)(message=message)
            client.update_flow_run(away.run, tags=[GIVEN_UP])  # should it begin after all
            client.set_flow_run_state(away.run, lost, force=True)
            kind = lost.type
        if kind == StateType.COMPLETED or self._has_sent(away.order):
            self._stopped(name, whole=kind == StateType.COMPLETED)
            if run and run.state and run.state.name == OTHER_BYTES:
                self.log.warning("%s: %s", name, message)
            else:
                self.log.info("%s: %s", name, message)
            return True
        if kind == StateType.CRASHED:
            orderly = bool(run and run.state and run.state.name in (OUT_OF_TIME, UNFIT))
            late = away.started is not None and time.monotonic() - away.started > SOON_S
            losses = 0 if late else away.lost + (not orderly)
            if losses < LIVES:
                again = self._submit(away.order, away.begun)
                self.log.warning("%s: %s; it is queued again", name, message.strip() or "its machine is lost")
                self._stopped(name, whole=False)
                self.away[name] = _Away(away.order, again, lost=losses, begun=away.begun + 1)
                return False
            message = f"lost {losses} times in a row soon after its start, the last time: {message}"
        self._stopped(name, whole=False)
        self._failures[name] = CANCELLED if kind == StateType.CANCELLED else message
        return True

    def _stopped(self, name: str, *, whole: bool) -> None:
        if self.away[name].started is not None:
            self.progress.ended(name, whole=whole)

    def _has_sent(self, order: Order) -> bool:
        """Whether a stage whose run is lost had sent its result before."""
        try:
            return not order.force and self._known(order)[0] is not None
        except RemoteError:
            return False  # then it runs again, and finds it

    def _known(self, order: Order) -> tuple[Result | None, list[Result]]:
        """The result of a stage that counts, and all in the remote: what dvc.lock has, else the first by name."""
        current, results = self.transport.current(order), self.transport.results(order)
        candidates = [*filter(None, [current]), *results]
        return next((one for one in candidates if self.transport.fetch(order, one)), None), results

    def accept(self, name: str) -> None:
        """Bring the result of a stage that has ended into the workspace and dvc.lock.

        Where machines have made different bytes, those of dvc.lock count, else the remote's first by name.

        Raises:
            FlowError: the stage failed, or its result is not whole.
        """
        if name in self._failures:
            raise FlowError(
                f"stage {name}", got=self._failures[name], expected="an end", cure="see its run's log in Prefect"
            )
        order = self._orders[name]
        chosen, results = patiently(lambda: self._known(order), self.log.warning)
        if chosen is None:
            missing = [file for result in results for file in self.transport.absent(order, result)]
            raise FlowError(
                f"stage {name}",
                got=f"missing or damaged in the DVC remote: {few(missing)}"
                if results
                else "no result in the DVC remote",
                expected="what the machine that ran it has sent",
                cure="delete there what is damaged, and run it again"
                if results
                else "give all machines the same remote",
            )
        self._compare(order, chosen, results)
        self.transport.restore(order, chosen)

    def _compare(self, order: Order, chosen: Result, results: list[Result]) -> None:
        """Report who has made other bytes than those that count."""
        made = _made(order)
        outs = {result.value: result.outs for result in results}
        current = self.transport.current(order)
        if current:
            outs[current.value] = current.outs
        outs |= {value: signed for value, (_, signed) in made.items() if value not in outs}
        others = [value for value, written in outs.items() if written != chosen.outs]
        if not others:
            return
        for value in others:
            differing = [path for path, digest in chosen.outs.items() if outs[value].get(path) != digest]
            shown = few([f"{path} {outs[value].get(path, 'none')[:12]}" for path in differing])
            kept = few([f"{path} {chosen.outs[path][:12]}" for path in differing])
            self.log.warning(
                "%s: other bytes: %s by %s; kept: %s by %s, as %s has",
                order.name,
                shown,
                _maker(made, value),
                kept,
                _maker(made, chosen.value),
                "dvc.lock" if current and current.outs == chosen.outs else "the remote",
            )

    def _overview(self, runs: Mapping[UUID, FlowRun], signs: Mapping[UUID, Any]) -> dict[str, str]:
        """Where each stage is that is away."""
        shown = {}
        for name, away in self.away.items():
            run, machine = runs.get(away.run), machine_of(signs.get(away.run))
            shown[name] = ", ".join(filter(None, [run.state.name if run and run.state else "", machine]))
        return shown

    def end(self) -> None:
        """End all stages that are away, and wait a little until they have."""
        if not self.away:
            return
        with suppress(NoAnswerError, FlowError), asking() as client:
            left = [away.run for away in self.away.values()]
            for run in runs_of(client, left).values():
                if run.state_type == StateType.SCHEDULED:
                    client.set_flow_run_state(run.id, Cancelled(message="ended with its flow"), force=True)
                elif run.state_type in (StateType.PENDING, StateType.RUNNING):
                    client.set_flow_run_state(run.id, Cancelling(message="ended with its flow"), force=True)
            deadline = time.monotonic() + 15
            while left and time.monotonic() < deadline:
                left = [run.id for run in runs_of(client, left).values() if run.state and not run.state.is_final()]
                time.sleep(0.5)
        self.away.clear()


def _made(order: Order) -> dict[str, tuple[str, dict[str, str]]]:
    """Who made which bytes of a stage, as far as Prefect knows: the run-cache's name -> machine, and path -> hash."""
    made = {}
    with suppress(NoAnswerError, FlowError), asking() as client:
        of_key = ArtifactFilter(key=ArtifactFilterKey(any_=[signature(order)]))
        for artifact in client.read_artifacts(artifact_filter=of_key, limit=PAGE):
            about = facts(artifact)
            gpus = "" if about.get("gpus", "none") == "none" else f", {about['gpus']}"
            outs = {path: about[f"output {path}"] for path in order.outs if f"output {path}" in about}
            made[about.get("run-cache", "")] = f"{about.get('machine')} ({about.get('processor')}{gpus})", outs
    return made


def _maker(made: Mapping[str, tuple[str, dict[str, str]]], value: str) -> str:
    return made[value][0] if value in made else "an unknown machine"


def _online(pool: str) -> list[str]:
    with get_client(sync_client=True) as client:
        workers = client.read_workers_for_work_pool(pool)
    return sorted(worker.name for worker in workers if worker.status == "ONLINE")


def _state(run: FlowRun) -> str:
    return str(run.state.name if run.state else "?").lower()


def deploy(pool: str, *, head: Mapping[str, str] | None = None) -> None:
    """Create the work pool and its deployment of the flow `stage`, or bring them up to date.

    `head`: its commit and versions, this machine's by default, which `join` compares.
    """
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template=_template()))
        client.create_deployment(
            flow_id=client.create_flow_from_name("stage"),
            name=pool,
            work_pool_name=pool,
            entrypoint="flows.remote.stage",
            # Each machine's own clone, wherever it is.
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": "{{ $MODELSTOCK_ROOT }}"}}],
            # Prefect's own way to start a run has a process more, which takes the pull steps; `python` is the clone's.
            job_variables={"command": "python -m prefect.engine"},
            parameters={"head": dict(head or identity(Path.cwd()))},
            parameter_openapi_schema=parameter_schema(stage).model_dump_for_openapi(),
            description="One stage on a machine of this pool. The flow `reproduce` starts it.",
        )


def _template() -> dict[str, Any]:
    return ProcessWorker.get_default_base_job_template()


def at_work(pool: str) -> list[str]:
    """A line per machine of a pool, per stage that runs, and for those that wait."""

    def of(*kinds: StateType) -> FlowRunFilter:
        return FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(kinds))))

    pools = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    with asking() as client:
        workers = client.read_workers_for_work_pool(pool)
        at_work = of(StateType.PENDING, StateType.RUNNING)
        runs = client.read_flow_runs(flow_run_filter=at_work, work_pool_filter=pools, limit=PAGE)
        signs = signs_of(client, [run.id for run in runs], MACHINE)
        waiting, page = 0, PAGE
        while page == PAGE:
            scheduled = of(StateType.SCHEDULED)
            page = len(
                client.read_flow_runs(flow_run_filter=scheduled, work_pool_filter=pools, limit=PAGE, offset=waiting)
            )
            waiting += page
    lines = [f"machine {worker.name}: {worker.status.lower()}" for worker in sorted(workers, key=lambda w: w.name)]
    lines += [f"stage {run.name}: {_state(run)}, {machine_of(signs.get(run.id)) or 'starting'}" for run in runs]
    return [*(lines or ["no machine has joined"]), *([f"stages that wait: {waiting}"] if waiting else [])]
