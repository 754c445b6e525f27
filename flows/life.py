"""Signs of life through Prefect: an artifact of a flow run that its process renews while it works.

Whoever has seen another's sign of life unchanged for a lease, while the server answered, takes it for dead.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Self
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from flows.graph import FlowError
from modelstock.errors import ModelstockError, redacted

_log = logging.getLogger(__name__)
LEASE = "MODELSTOCK_LEASE_S"
PAGE = 100
MACHINE, FLOW = "machine", "flow"  # keys of the artifacts that are signs of life


class NoAnswerError(ModelstockError):
    """The server is down, or just starting: it may answer later."""


@contextmanager
def asked_once() -> Iterator[None]:
    """Clients in the block ask once: Prefect's own asks a dead server for a minute, and nothing else happens meanwhile.

    Raises:
        NoAnswerError: the server does not answer, or says that it cannot now.
        FlowError: it refuses, in the block.
    """
    place = f"Prefect at {redacted(PREFECT_API_URL.value() or '')}"
    try:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
            yield
    except httpx.TransportError as error:
        raise NoAnswerError(
            place, got=f"{type(error).__name__}: {error}", expected="an answer", cure="start it again"
        ) from error
    except PrefectHTTPStatusError as error:
        code = error.response.status_code
        if code >= 500 or code in (408, 429):
            raise NoAnswerError(place, got=f"HTTP {code}", expected="an answer", cure="see its log") from error
        cure = "set PREFECT_API_AUTH_STRING to its user:password" if code == 401 else "see its log"
        raise FlowError(place, got=f"HTTP {code}", expected="an answer", cure=cure) from error


@contextmanager
def asking() -> Iterator[SyncPrefectClient]:
    """A client that asks once.

    Raises:
        NoAnswerError, FlowError: as `asked_once`.
    """
    with asked_once(), get_client(sync_client=True) as client:
        yield client


def lease_s() -> float:
    """After how many seconds without a sign of life a machine, or a flow, is taken for dead.

    Raises:
        FlowError: not a number of seconds, or too few to tell.
    """
    text = os.environ.get(LEASE) or "60"
    with suppress(ValueError):
        if float(text) >= 6:
            return float(text)
    raise FlowError(LEASE, got=repr(text), expected="seconds, at least 6", cure="correct it, or unset it")


class Signs:
    """Signs of life that others renew: how long each has been unchanged, by this machine's clock."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Any, float]] = {}

    def age(self, name: str, sign: object) -> float:
        """Seconds for which a sign has been the same."""
        before, since = self._seen.get(name, (None, 0.0))
        if name not in self._seen or sign != before:
            since = time.monotonic()
        self._seen[name] = (sign, since)
        return time.monotonic() - since

    def excuse(self) -> None:
        """Start counting again: nobody could renew anything, for the server did not answer."""
        self._seen = {name: (sign, time.monotonic()) for name, (sign, _) in self._seen.items()}


class Life:
    """A sign of life of a flow run, renewed by a thread until the block ends, which also calls `watch` now and then.

    `facts`: what the artifact shows.
    """

    def __init__(self, run: UUID, key: str, lease: float) -> None:
        self.run, self.key, self.lease = run, key, lease
        self.facts: dict[str, str] = {}
        self._artifact: UUID | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)

    def watch(self, client: SyncPrefectClient) -> None:
        """Look at what happens elsewhere; every second or two."""

    def missed(self) -> None:
        """The server did not answer."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=5)

    def _live(self) -> None:
        renewed, pause = 0.0, min(2.0, self.lease / 6)
        while not self._done.is_set():
            try:
                with asking() as client:
                    while not self._done.is_set():
                        if time.monotonic() - renewed > self.lease / 6 or not renewed:
                            self._renew(client)
                            renewed = time.monotonic()
                        self.watch(client)
                        self._done.wait(pause)
            except Exception as error:  # whatever it is: without this thread, this process would be taken for dead
                if not isinstance(error, NoAnswerError):
                    _log.warning("sign of life: %s: %s", type(error).__name__, error)
                self.missed()
                self._done.wait(pause)

    def _renew(self, client: SyncPrefectClient) -> None:
        data = data_of({**self.facts, "renewed": f"{time.time():.0f}"})
        if self._artifact is None:
            new = ArtifactCreate(key=self.key, type="table", data=data, flow_run_id=self.run)
            self._artifact = client.create_artifact(new).id
            return
        try:
            client.update_artifact(self._artifact, ArtifactUpdate(data=data))
        except ObjectNotFound:  # somebody has deleted it
            self._artifact = None


def _pages(ids: Sequence[UUID]) -> Iterator[FlowRunFilter]:
    for start in range(0, len(ids), PAGE):
        yield FlowRunFilter(id=FlowRunFilterId(any_=list(ids[start : start + PAGE])))


def runs_of(client: SyncPrefectClient, ids: Sequence[UUID]) -> dict[UUID, FlowRun]:
    """These flow runs, as far as the server has them."""
    return {run.id: run for page in _pages(ids) for run in client.read_flow_runs(flow_run_filter=page, limit=PAGE)}


def signs_of(client: SyncPrefectClient, ids: Sequence[UUID], key: str) -> dict[UUID, Any]:
    """The artifacts of one key of these flow runs, of several of a run the newest."""
    of_key = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    newest: dict[UUID, Any] = {}
    for page in _pages(ids):
        for artifact in client.read_artifacts(flow_run_filter=page, artifact_filter=of_key, limit=2 * PAGE):
            run, before = artifact.flow_run_id, newest.get(artifact.flow_run_id) if artifact.flow_run_id else None
            if run and (before is None or (artifact.updated and artifact.updated > before.updated)):
                newest[run] = artifact
    return newest


def data_of(about: Mapping[str, str]) -> str:
    """An artifact of the type table: a row per fact."""
    return json.dumps([{"fact": name, "value": value} for name, value in about.items()])


def facts(artifact: Any) -> dict[str, str]:
    """What `data_of` has written; nothing of no artifact."""
    data = artifact.data if artifact else []
    rows = json.loads(data) if isinstance(data, str) else data
    return {row["fact"]: row["value"] for row in rows or []}


def machine_of(sign: Any) -> str:
    """The machine that an artifact is a sign of life of."""
    about = facts(sign)
    return f"{about['machine']}, slot {about['slot']}" if {"machine", "slot"} <= about.keys() else ""
