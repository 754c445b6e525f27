"""Files are the record and MLflow is their mirror, by one idempotent replay. The only file that imports mlflow.

A run is found again by its tags `modelstock.identity` (the weight set) or `modelstock.key` (the fingerprint of a
training that has no weights yet), and a metric row by its key and step; so what is there is never sent twice.
The files carry no times: a row's time is the moment it was sent.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from modelstock.errors import TrackingError
from modelstock.tracking.history import read_history
from modelstock.weights.weight_set import load_weights

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run

IDENTITY, KEY = "modelstock.identity", "modelstock.key"


def quiet_and_quick() -> None:
    """Environment for MLflow where the user has set none: no telemetry, and a dead server costs a second, not four
    minutes a call."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }.items():
        os.environ.setdefault(name, value)


class Tracker:
    """A connection to one MLflow experiment.

    `uri`: else MLFLOW_TRACKING_URI, else `sqlite:///<root>/mlflow.db` with artifacts in `<root>/mlruns`.

    Raises:
        TrackingError: the server or store cannot be reached or refuses; also from every method.
    """

    def __init__(self, root: Path, experiment: str = "modelstock", uri: str | None = None) -> None:
        quiet_and_quick()
        self.root = Path(root).absolute()
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.root / 'mlflow.db'}"
        with self._told():
            from mlflow.tracking import MlflowClient

            for chatter in ("alembic", "mlflow", "mlflow.store.db.utils"):  # importing MLflow sets their levels
                logging.getLogger(chatter).setLevel(logging.ERROR)
            with self._first_use():
                self.client: MlflowClient = MlflowClient(self.uri)
                found = self.client.get_experiment_by_name(experiment)
                self.experiment = found.experiment_id if found else self._create(experiment)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turn whatever MLflow raises into one line."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise TrackingError(
                f"MLflow at {self.uri}",
                got=f"{type(error).__name__}: {text}",
                expected="a tracking server or store that answers",
                cure="start it or correct MLFLOW_TRACKING_URI; `dvc repro -f compare` then sends what is missing",
            ) from error

    @contextlib.contextmanager
    def _first_use(self) -> Iterator[None]:
        """One process at a time: two that create a SQLite store at once crash."""
        if not self.uri.startswith("sqlite:"):
            yield
            return
        with open(self.root / ".mlflow.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _create(self, experiment: str) -> str:
        # Without a location, MLflow would put artifacts under whatever directory a process happens to run in.
        local = f"file://{self.root / 'mlruns'}" if self.uri.startswith("sqlite:") else None
        return str(self.client.create_experiment(experiment, artifact_location=local))

    def _find(self, *tags: tuple[str, str | None]) -> "Run | None":
        for tag, value in tags:
            if value is not None:
                found = self.client.search_runs([self.experiment], f"tags.`{tag}` = '{value}'", max_results=1)
                if found:
                    return found[0]
        return None

    def _write(self, run: "Run", params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        # A param cannot change once it is there, nor need it: the run is that of the same tensors or fingerprint.
        new = {k: str(v) for k, v in params.items() if k not in run.data.params}
        changed = {k: v for k, v in tags.items() if run.data.tags.get(k) != v}
        if new or changed:
            self.client.log_batch(
                run.info.run_id,
                params=[Param(k, v) for k, v in sorted(new.items())],
                tags=[RunTag(k, v) for k, v in sorted(changed.items())],
            )

    def _send_history(self, run: "Run", history: Path) -> None:
        from mlflow.entities import Metric

        rows, now, run_id = read_history(history), int(time.time() * 1000), run.info.run_id
        missing: list[Metric] = []
        for key in sorted({key for row in rows for key in row} - {"step"}):
            known = {m.step for m in self.client.get_metric_history(run_id, key)} if key in run.data.metrics else set()
            missing += [
                Metric(key, row[key], now, row["step"]) for row in rows if key in row and row["step"] not in known
            ]
        for start in range(0, len(missing), 1000):
            self.client.log_batch(run_id, metrics=missing[start : start + 1000])

    def _open(self, name: str, identity: str | None, key: str | None) -> "Run":
        run = self._find((IDENTITY, identity), (KEY, key))
        if run is None:
            tags = {k: v for k, v in ((IDENTITY, identity), (KEY, key)) if v}
            run = self.client.create_run(self.experiment, run_name=name, tags=tags)
        return run

    def live(self, *, key: str, name: str, params: Mapping[str, Any], history: Path) -> str:
        """While a seed trains: send the rows of its growing `history.jsonl` that its run lacks. Returns the run id."""
        with self._told():
            run = self._open(name, None, key)
            self._write(run, params, {})
            if history.exists():
                self._send_history(run, history)
            return str(run.info.run_id)

    def record(
        self,
        weights: Path,
        *,
        name: str,
        key: str | None = None,
        history: Path | None = None,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, Mapping[str, float]] | None = None,
        datasets: Mapping[str, str] | None = None,
        held_out: str = "held-out",
    ) -> str:
        """A finished weight set: its run, params, history, LoggedModel, and metrics by benchmark. Returns the run id.

        `metrics`: benchmark -> {metric: value}; `datasets`: benchmark -> sha256 of its data; `held_out`: the benchmark
        of that role, whose data are for validation, all others for tests. A second call with the same arguments
        changes nothing.
        """
        found = load_weights(weights, lazy=True)
        made = found.meta.get("made_by", {})
        params = {k: v for k, v in made.items() if k not in ("options", "key", "members")}
        params |= {f"options.{k}": v for k, v in made.get("options", {}).items()}
        params["parents"] = ", ".join(p[:12] for p in found.meta.get("parents", []))
        if "members" in made:
            params["members"] = "-".join(map(str, made["members"]))
        with self._told():
            run = self._open(name, found.identity, key)
            self._write(run, params, {IDENTITY: found.identity, **(tags or {})})
            if history is not None:
                self._send_history(run, history)
            model = self._model(found.identity) or self._add_model(run, weights, name, found.identity)
            self._send_scores(run, metrics or {}, datasets or {}, model.model_id, held_out)
            return self._finish(run)

    def record_scores(
        self,
        identity: str,
        *,
        name: str,
        metrics: Mapping[str, Mapping[str, float]],
        datasets: Mapping[str, str],
        params: Mapping[str, Any],
        tags: Mapping[str, str] | None = None,
        held_out: str = "held-out",
    ) -> str:
        """What has scores but no weights of its own, such as a logit ensemble. Returns the run id."""
        with self._told():
            run = self._open(name, identity, None)
            self._write(run, params, tags or {})
            self._send_scores(run, metrics, datasets, None, held_out)
            return self._finish(run)

    def _finish(self, run: "Run") -> str:
        if run.info.status != "FINISHED":
            self.client.set_terminated(run.info.run_id, "FINISHED")
        return str(run.info.run_id)

    def _model(self, identity: str) -> "LoggedModel | None":
        # A search by status finds nothing on SQLite: it is filtered here.
        found = self.client.search_logged_models([self.experiment], f"tags.`{IDENTITY}` = '{identity}'")
        return next((m for m in found if str(m.status) == "READY"), None)

    def _add_model(self, run: "Run", weights: Path, name: str, identity: str) -> "LoggedModel":
        model = self.client.create_logged_model(
            self.experiment,
            name=name.replace("/", "-").replace("@", "-").replace(".", "_"),
            source_run_id=run.info.run_id,
            tags={IDENTITY: identity},
            model_type="image classifier",
        )
        place = urlparse(model.artifact_location)
        if place.scheme in ("", "file"):
            folder = Path(unquote(place.path))
            folder.mkdir(parents=True, exist_ok=True)
            try:
                os.link(weights.resolve(), folder / weights.name)
            except OSError:  # another file system
                shutil.copyfile(weights, folder / weights.name)
        else:
            self.client.log_model_artifact(model.model_id, str(weights))
        return self.client.finalize_logged_model(model.model_id, "READY")

    def _send_scores(
        self,
        run: "Run",
        metrics: Mapping[str, Mapping[str, float]],
        datasets: Mapping[str, str],
        model_id: str | None,
        held_out: str,
    ) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric

        known = {(d.dataset.name, d.dataset.digest) for d in run.inputs.dataset_inputs} if run.inputs else set()
        wanted = {name: datasets[name][:36] for name in metrics}
        inputs = [
            DatasetInput(
                Dataset(name, digest, "local", f"data/{name}"),
                [InputTag("mlflow.data.context", "validation" if name == held_out else "test")],
            )
            for name, digest in wanted.items()
            if (name, digest) not in known
        ]
        if inputs:
            models = [LoggedModelInput(model_id)] if model_id else None
            self.client.log_inputs(run.info.run_id, inputs, models)
        now = int(time.time() * 1000)
        # The same key may stand only once a batch and step, so the benchmark is part of the key.
        rows = [
            Metric(
                f"{benchmark}/{metric}",
                value,
                now,
                0,
                model_id=model_id,
                dataset_name=benchmark,
                dataset_digest=wanted[benchmark],
                run_id=run.info.run_id,
            )
            for benchmark, values in metrics.items()
            for metric, value in values.items()
            if run.data.metrics.get(f"{benchmark}/{metric}") != value
        ]
        if rows:
            self.client.log_batch(run.info.run_id, metrics=rows)

    def register(self, identity: str, *, model_name: str = "modelstock", alias: str | None = None) -> str:
        """The registry version of a recorded weight set, made once; `alias` then points to it. Returns the version."""
        from mlflow.exceptions import MlflowException

        with self._told():
            model = self._model(identity)
            if model is None:
                raise TrackingError(
                    f"MLflow at {self.uri}",
                    got=f"no model {identity[:12]}",
                    expected="a recorded weight set",
                    cure="record it first",
                )
            try:
                self.client.get_registered_model(model_name)
            except MlflowException:
                self.client.create_registered_model(model_name)
            versions = self.client.search_model_versions(f"name = '{model_name}'")
            # On SQLite a version's model_id is empty; its tag says which weight set it is.
            version = next((v for v in versions if v.tags.get(IDENTITY) == identity), None)
            if version is None:
                # A local registry would look for "models:/<id>" in the process-wide store, which need not be this one.
                local = not self.uri.startswith("http")
                source = model.artifact_location if local else f"models:/{model.model_id}"
                version = self.client.create_model_version(
                    model_name, source, tags={IDENTITY: identity}, model_id=None if local else model.model_id
                )
            if alias:
                self.client.set_registered_model_alias(model_name, alias, version.version)
            return str(version.version)


class Mirror:
    """Sends a growing history to MLflow every few seconds while the block trains; never lets an error reach it.

    The first failure is one warning, later ones are silent: what was missed is sent by the stage `compare`.
    """

    def __init__(
        self,
        tracker: Callable[[], Tracker],
        history: Path,
        *,
        key: str,
        name: str,
        params: Mapping[str, Any],
        every_s: float = 5.0,
    ) -> None:
        self._tracker, self._history, self._every_s = tracker, history, every_s
        self._key, self._name, self._params = key, name, dict(params)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="mlflow mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _follow(self) -> None:
        try:
            tracker, last = self._tracker(), False
            while not last:
                last = self._stop.wait(self._every_s)
                tracker.live(key=self._key, name=self._name, params=self._params, history=self._history)
        except Exception as error:
            warnings.warn(f"{error} (training goes on)", stacklevel=2)
