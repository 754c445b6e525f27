"""Files are the record and MLflow is their mirror, by one idempotent replay. The only file that imports mlflow.

A run is found again by its tags `modelstock.identity` (the weight set) or `modelstock.key` (the fingerprint of a
training that has no weights yet), and a metric row by its key and step; so what is there is never sent twice.
The files carry no times: a row's time is the moment it was sent.
"""

import contextlib
import logging
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from filelock import FileLock

from modelstock.errors import ModelstockError, TrackingError, redacted
from modelstock.files import atomic_path, link_or_copy
from modelstock.tracking.history import read_history
from modelstock.tracking.tracker import Measurements, params_of
from modelstock.weights.weight_set import load_weights

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run

IDENTITY, KEY = "modelstock.identity", "modelstock.key"


def quiet_and_quick() -> None:
    """Environment for MLflow where the user has set none: no telemetry, and a dead server costs a second, not four
    minutes a call.

    Nothing is asked twice: a server that dies after it has made a run, and before it says so, would make another one.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }.items():
        os.environ.setdefault(name, value)


def store_in(root: Path) -> str:
    """The URI of a project's own store, `<root>/mlflow.db`; to SQLAlchemy, `?` and `%` in a path mean something."""
    file = str(Path(root).absolute() / "mlflow.db")
    return "sqlite:///" + file.replace("%", "%25").replace("?", "%3F")


def store_uri(root: Path) -> str:
    """Where MLflow is: MLFLOW_TRACKING_URI, else the project's own store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or store_in(root)


def _sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other store, and for one with options."""
    name = uri.removeprefix("sqlite:///")
    return None if name in ("", uri) or "?" in name else Path(unquote(name)).absolute()


def _local_path(location: str) -> Path | None:
    """The folder of a local artifact location; None where a server keeps artifacts."""
    parts = urlparse(location)
    if parts.scheme == "":
        return Path(location)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _make_store(file: Path) -> None:
    """Make a SQLite store beside its place and then give it its name: killed half-way, it would never open again.

    It is readable by its owner alone.
    """
    from mlflow.tracking import MlflowClient
    from sqlalchemy.engine import make_url

    for left in file.parent.glob(f".{file.name}.*.tmp*"):
        left.unlink()
    with atomic_path(file) as temporary:
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        uri = store_in(temporary.parent).removesuffix("mlflow.db") + temporary.name
        assert make_url(uri).database == str(temporary)
        MlflowClient(uri).search_experiments(max_results=1)


# What a SQLite store says about where artifacts are: table -> columns.
LOCATIONS = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}


def _move_artifacts(store: Path, old: str, new: str) -> None:
    """Let a SQLite store of a project that was moved look for its artifacts in the new place.

    MLflow keeps absolute locations and has no call that changes one.
    """
    with contextlib.closing(sqlite3.connect(store)) as connection, connection:
        for table, columns in LOCATIONS.items():
            for column in columns:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
                )


class MlflowTracker:
    """A connection to one MLflow experiment.

    `uri`: else MLFLOW_TRACKING_URI, else `sqlite:///<root>/mlflow.db` with artifacts in `<root>/mlruns`.

    Raises:
        TrackingError: the server or store cannot be reached or refuses; also from every method.
    """

    def __init__(self, root: Path, experiment: str = "modelstock", uri: str | None = None) -> None:
        quiet_and_quick()
        self.root = Path(root).absolute()
        self.uri = uri or store_uri(self.root)
        self.file = _sqlite_file(self.uri)
        with self._one_line():
            from mlflow.tracking import MlflowClient

            for logger in ("alembic", "mlflow", "mlflow.store.db.utils"):  # importing MLflow sets their levels
                logging.getLogger(logger).setLevel(logging.ERROR)
            with self._first_use():
                self.client: MlflowClient = MlflowClient(self.uri)
                self.experiment = self._experiment(experiment)

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        """Turn whatever MLflow raises into one line."""
        try:
            yield
        except ModelstockError:
            raise  # what is wrong with a file of ours is not the server's
        except Exception as error:
            text = " ".join(redacted(error).split())
            text = text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"  # the cause is at its end
            cure = "start it or correct MLFLOW_TRACKING_URI; `dvc repro -f compare` then sends what is missing"
            if self.file is not None and self.file.exists():
                cure = f"move {self.file.name} away where it is damaged; `dvc repro -f compare` then sends everything"
            raise TrackingError(
                f"MLflow at {self.uri}",
                got=f"{type(error).__name__}: {text}",
                expected="a tracking server or store that answers",
                cure=cure,
            ) from error

    @contextlib.contextmanager
    def _first_use(self) -> Iterator[None]:
        """One process at a time: two that create a SQLite store at once crash."""
        if self.file is None:
            yield
            return
        with FileLock(self.root / ".mlflow.lock"):
            if not self.file.exists() or not self.file.stat().st_size:
                _make_store(self.file)
            yield

    def _experiment(self, name: str) -> str:
        """The id of the experiment, made where there is none.

        Raises:
            TrackingError: it was deleted.
        """
        # Without a location, MLflow would put artifacts under whatever directory a process happens to run in.
        artifacts = self.root / "mlruns"
        existing = self.client.get_experiment_by_name(name)
        if existing is None:
            local = self.uri.startswith("sqlite:")
            if local:
                artifacts.mkdir(mode=0o700, exist_ok=True)
            return str(self.client.create_experiment(name, artifact_location=artifacts.as_uri() if local else None))
        if existing.lifecycle_stage == "deleted":
            raise TrackingError(
                f"MLflow at {self.uri}",
                got=f"a deleted experiment {name!r}",
                expected="one that is active",
                cure=f"`MLFLOW_TRACKING_URI=... mlflow experiments restore --experiment-id {existing.experiment_id}`, "
                "or another name as tracking.experiment; `dvc repro -f compare` then sends what is missing",
            )
        old = existing.artifact_location
        if self.file == self.root / "mlflow.db" and old != artifacts.as_uri() and old.endswith("/mlruns"):
            _move_artifacts(self.file, old, artifacts.as_uri())
        return str(existing.experiment_id)

    def _find(self, *tags: tuple[str, str | None]) -> "Run | None":
        for tag, value in tags:
            if value is not None:
                runs = self.client.search_runs([self.experiment], f"tags.`{tag}` = '{value}'", max_results=1)
                if runs:
                    return runs[0]
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
            sent = {m.step for m in self.client.get_metric_history(run_id, key)} if key in run.data.metrics else set()
            missing += [
                Metric(key, row[key], now, row["step"]) for row in rows if key in row and row["step"] not in sent
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
        """While a run trains: send the rows of its growing `history.jsonl` that its run lacks. Returns the run id."""
        with self._one_line():
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
        measurements: Measurements,
        tags: Mapping[str, str],
        key: str | None = None,
        history: Path | None = None,
    ) -> str:
        """A finished weight set: its run, params, history, LoggedModel, and metrics by benchmark. Returns the run id.

        A second call with the same arguments changes nothing.
        """
        saved = load_weights(weights, lazy=True)
        identity = saved.identity
        params = params_of(saved.meta.get("made_by", {}))
        params["parents"] = ", ".join(parent[:12] for parent in saved.meta.get("parents", []))
        with self._one_line():
            run = self._open(name, identity, key)
            self._write(run, params, {IDENTITY: identity, **tags})
            if history is not None:
                self._send_history(run, history)
            model = self._model(identity) or self._new_model(run, name=name, identity=identity)
            self._place(model, weights)
            if str(model.status) != "READY":
                self.client.finalize_logged_model(model.model_id, "READY")
            self._send_measurements(run, measurements, model.model_id)
            return self._finish(run)

    def record_scores(
        self,
        identity: str,
        *,
        name: str,
        measurements: Measurements,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
    ) -> str:
        """What has scores but no weights of its own, such as a logit ensemble. Returns the run id."""
        with self._one_line():
            run = self._open(name, identity, None)
            self._write(run, params, tags)
            self._send_measurements(run, measurements, None)
            return self._finish(run)

    def _finish(self, run: "Run") -> str:
        if run.info.status != "FINISHED":
            self.client.set_terminated(run.info.run_id, "FINISHED")
        return str(run.info.run_id)

    def _model(self, identity: str) -> "LoggedModel | None":
        """The model of a weight set: the one that is ready, else one that a killed call has left unfinished."""
        # A search by status finds nothing on SQLite: it is filtered here.
        models = self.client.search_logged_models([self.experiment], f"tags.`{IDENTITY}` = '{identity}'")
        first = sorted(models, key=lambda m: (str(m.status) != "READY", m.creation_timestamp))
        for model in first[1:]:
            if str(model.status) != "READY":
                self.client.delete_logged_model(model.model_id)
        return first[0] if first else None

    def _new_model(self, run: "Run", *, name: str, identity: str) -> "LoggedModel":
        return self.client.create_logged_model(
            self.experiment,
            name=name.replace("/", "-").replace("@", "-").replace(".", "_"),
            source_run_id=run.info.run_id,
            tags={IDENTITY: identity},
            model_type="image classifier",
        )

    def _place(self, model: "LoggedModel", weights: Path) -> None:
        """Put the file into its model, where it is not there yet: a hard link where that is possible."""
        folder, source = _local_path(model.artifact_location), weights.resolve()
        if folder is None:
            if str(model.status) != "READY":
                self.client.log_model_artifact(model.model_id, str(weights))
            return
        target = folder / weights.name
        if target.exists() and target.stat().st_size == source.stat().st_size and str(model.status) == "READY":
            return
        target.unlink(missing_ok=True)
        with atomic_path(target) as temporary:
            link_or_copy(source, temporary)

    def _send_measurements(self, run: "Run", measurements: Measurements, model_id: str | None) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput, Metric

        digests = {benchmark: measurements.datasets[benchmark][:36] for benchmark in measurements.metrics}
        inputs = run.inputs.dataset_inputs if run.inputs else []
        present = {(entry.dataset.name, entry.dataset.digest) for entry in inputs}
        missing = [
            DatasetInput(
                Dataset(name, digest, "local", f"data/{name}"),
                [InputTag("mlflow.data.context", "validation" if name == measurements.held_out else "test")],
            )
            for name, digest in digests.items()
            if (name, digest) not in present
        ]
        if missing:
            models = [LoggedModelInput(model_id)] if model_id else None
            self.client.log_inputs(run.info.run_id, missing, models)
        now = int(time.time() * 1000)
        # MLflow takes a key once per batch and step, so the benchmark is part of the key.
        rows = [
            Metric(
                f"{benchmark}/{metric}",
                value,
                now,
                0,
                model_id=model_id,
                dataset_name=benchmark,
                dataset_digest=digests[benchmark],
                run_id=run.info.run_id,
            )
            for benchmark, values in measurements.metrics.items()
            for metric, value in values.items()
            if run.data.metrics.get(f"{benchmark}/{metric}") != value
        ]
        if rows:
            self.client.log_batch(run.info.run_id, metrics=rows)

    def register(self, identity: str, *, model_name: str, alias: str | None = None) -> str:
        """The registry version of a recorded weight set, made once; `alias` then points to it. Returns the version."""
        from mlflow.exceptions import MlflowException

        with self._one_line():
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
