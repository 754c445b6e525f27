"""Where MLflow keeps what it is sent: a project's own store, or a server; and the experiment in it."""

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlparse

from filelock import FileLock

from modelstock.errors import ModelstockError, TrackingError, redacted
from modelstock.files import atomic_path

if TYPE_CHECKING:
    pass


IDENTITY = "modelstock.identity"  # the tag that says which weight set a run, a model or a version is of


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
    """The URI of a project's own store, `<root>/mlflow.db`."""
    return _uri_of(Path(root).absolute() / "mlflow.db")


def _uri_of(file: Path) -> str:
    """The URI of a SQLite file. What SQLAlchemy would take apart, or leave as it is, SQLite's own URIs can say."""
    path = str(file)
    return f"sqlite:///file:{quote(path)}?uri=true" if "?" in path or "%" in path else f"sqlite:///{path}"


def store_uri(root: Path) -> str:
    """Where MLflow is: MLFLOW_TRACKING_URI, else the project's own store."""
    return os.environ.get("MLFLOW_TRACKING_URI") or store_in(root)


def _sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store; None for any other store, and for one with options."""
    name = uri.removeprefix("sqlite:///")
    if name.startswith("file:") and name.endswith("?uri=true"):
        return Path(unquote(name.removeprefix("file:").removesuffix("?uri=true"))).absolute()
    return None if name in ("", uri) or "?" in name else Path(name).absolute()


def local_path(location: str) -> Path | None:
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

    for left in file.parent.glob(f".{file.name}.*.tmp*"):
        left.unlink()
    with atomic_path(file) as temporary:
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
        MlflowClient(_uri_of(temporary)).search_experiments(max_results=1)
        assert temporary.stat().st_size, "MLflow has made its store elsewhere"


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


class Connection:
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
        with self.one_line():
            from mlflow.tracking import MlflowClient

            for logger in ("alembic", "mlflow", "mlflow.store.db.utils"):  # importing MLflow sets their levels
                logging.getLogger(logger).setLevel(logging.ERROR)
            with self._first_use():
                self.client: MlflowClient = MlflowClient(self.uri)
                self.experiment = self._experiment(experiment)

    @contextlib.contextmanager
    def one_line(self) -> Iterator[None]:
        """Turn whatever MLflow raises into one line."""
        try:
            yield
        except ModelstockError:
            raise  # what is wrong with a file of ours is not the server's
        except Exception as error:
            text = " ".join(redacted(error).split())
            text = text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"  # the cause is at its end
            cure = "start it or correct MLFLOW_TRACKING_URI; `dvc repro -s -f compare` then sends what is missing"
            if self.file is not None and self.file.exists():
                cure = f"move {self.file.name} away if it is damaged; `dvc repro -s -f compare` then sends everything"
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
                "or another name as tracking.experiment; `dvc repro -s -f compare` then sends what is missing",
            )
        old = existing.artifact_location
        if self.file == self.root / "mlflow.db" and old != artifacts.as_uri() and old.endswith("/mlruns"):
            _move_artifacts(self.file, old, artifacts.as_uri())
        return str(existing.experiment_id)
