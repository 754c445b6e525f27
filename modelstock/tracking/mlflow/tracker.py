"""Trainings, comparisons and their rows as runs.

A training is one run, found again by its key. A comparison is a run with a child per row, found again by a digest of
everything that it says; the trainings of its weight sets are children too, of the latest comparison with them. What is
there is never sent twice: a metric's row is known by its key and step. The files carry no times, so a row's time is
the moment it was sent; a training's are those that its machine kept.
"""

import getpass
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelstock.errors import redacted
from modelstock.progress import progress_bar
from modelstock.tracking.history import read_history
from modelstock.tracking.lineage import git_commit
from modelstock.tracking.mlflow import views
from modelstock.tracking.mlflow.models import Models
from modelstock.tracking.mlflow.store import IDENTITY, Connection
from modelstock.tracking.times import now_ms
from modelstock.tracking.tracker import UNKNOWN, Times, TrackedComparison, TrackedRow, TrackedTraining

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

KEY, COMPARISON, KIND = "modelstock.key", "modelstock.comparison", "modelstock.kind"
SAME, SHOWN = "same tensors as", "modelstock.shown"
PARENT, NOTE = "mlflow.parentRunId", "mlflow.note.content"
BATCH = 1000  # metrics that MLflow takes at a time
SHOWN_AT_MOST = 99  # rows of a page; above, MLflow splits it
TITLES = {views.MERGES: "all methods", views.ALL: "every row"}


class MlflowTracker(Connection):
    """Trainings and comparisons in one MLflow experiment.

    Raises:
        TrackingError: from every method: the server or store does not answer, or refuses.
    """

    def live(self, *, key: str, name: str, params: Mapping[str, Any], history: Path, times: Times = UNKNOWN) -> None:
        """The rows so far of a training's growing `history.jsonl`; with `times.ended`, its run ends."""
        with self.one_line():
            self._training(key=key, name=name, params=params, history=history, times=times)

    def record(self, comparison: TrackedComparison) -> Sequence[str]:
        """A comparison's run with a child per row, its models, and the views that show it. Returns the views' links.

        A second call with the same comparison changes nothing.
        """
        with self.one_line():
            digest = digest_of(comparison)
            existing = {run.info.run_name: run for run in self._search(f"tags.`{COMPARISON}` = '{digest}'")}
            parent = self._parent(comparison, digest)
            trainings = {t.key: self._finished_training(t, parent).info.run_id for t in comparison.trainings}
            models = Models(self, comparison)
            same: dict[str, str] = {}  # identity -> the first row with it
            with progress_bar(total=len(comparison.rows), desc="MLflow", unit="row") as bar:
                for row, shown in zip(comparison.rows, _shown(comparison.rows), strict=True):
                    first = same.setdefault(row.identity, row.name)
                    tags = {
                        COMPARISON: digest,
                        KIND: "row",
                        PARENT: parent.info.run_id,
                        IDENTITY: row.identity,
                        SHOWN: "yes" if shown else "no",
                        NOTE: row.description,
                        **({SAME: first} if first != row.name else {}),
                        **({"dvc.md5": row.dvc_md5} if row.dvc_md5 else {}),
                    }
                    run = existing.get(row.name) or self._create(row.name, "stages/compare.py", tags)
                    self._row(run, row, comparison, models, tags=tags, training=trainings.get(row.training or ""))
                    bar.update(1)
            self._show(digest, comparison)
            self._end(parent)
        return self.links()

    def links(self, local: str | None = None) -> list[str]:
        """Lines that say where the latest comparison is seen; none where there is no comparison yet.

        The server is that which runs are sent to; for a local store `local`, else the one that `make up` starts.
        """
        if views.tag(views.MERGES) not in self.client.get_experiment(self.experiment).tags:
            return []
        local = local or os.environ.get("MODELSTOCK_MLFLOW_URL", views.NEW_SERVER)
        server = redacted(self.uri) if self.uri.startswith("http") else local
        return views.links(server, self.experiment, TITLES)

    @cached_property
    def _about(self) -> dict[str, str]:
        """MLflow's own tags for where a run comes from."""
        commit = git_commit(Path.cwd())
        about = {"mlflow.source.type": "PROJECT", **({"mlflow.source.git.commit": commit} if commit else {})}
        with suppress(OSError, KeyError):  # a user without a name, as in containers
            about["mlflow.user"] = getpass.getuser()
        return about

    def _search(self, condition: str) -> "list[Run]":
        runs: list[Run] = []
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment], condition, max_results=BATCH, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _create(self, name: str, source: str, tags: Mapping[str, str], began: int | None = None) -> "Run":
        all_tags = {**self._about, "mlflow.source.name": source, **tags}
        return self.client.create_run(self.experiment, run_name=name, tags=all_tags, start_time=began)

    def _end(self, run: "Run", ended: int | None = None) -> None:
        if run.info.status != "FINISHED":
            self.client.set_terminated(run.info.run_id, "FINISHED", ended)

    def _write(
        self, run: "Run", *, params: Mapping[str, Any], tags: Mapping[str, str], metrics: "Sequence[Metric]" = ()
    ) -> None:
        from mlflow.entities import Param, RunTag

        # A param cannot change once it is there, nor need it: the run is that of the same comparison or training.
        new = [Param(k, str(v)) for k, v in sorted(params.items()) if k not in run.data.params]
        changed = [RunTag(k, v) for k, v in sorted(tags.items()) if run.data.tags.get(k) != v]
        for start in range(0, max(len(new), 1), 100):  # MLflow takes as many params at a time
            part = new[start : start + 100]
            if part or changed:
                self.client.log_batch(run.info.run_id, params=part, tags=changed)
                changed = []
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(run.info.run_id, metrics=metrics[start : start + BATCH])

    # ------------------------------------------------------------ trainings

    def _training(
        self,
        *,
        key: str,
        name: str,
        params: Mapping[str, Any],
        history: Path,
        times: Times,
        parent: "Run | None" = None,
    ) -> "Run":
        runs = self._search(f"tags.`{KEY}` = '{key}'")
        source = f"stages/{params['stage']}.py" if "stage" in params else "stages"
        tags = {KEY: key, KIND: "training", **({PARENT: parent.info.run_id} if parent else {})}
        run = runs[0] if runs else self._create(f"training of {name}", source, tags, times.began)
        self._write(run, params=params, tags=tags)
        if history.exists():
            self._send_history(run, history)
        if times.ended is not None:
            self._end(run, times.ended)
        return run

    def _finished_training(self, training: TrackedTraining, parent: "Run") -> "Run":
        times, now = training.times, now_ms()
        if times.ended is None:  # its machine kept none: a run that ends as it begins says so
            times = Times(began=now, ended=now)
        return self._training(
            key=training.key,
            name=training.name,
            params=training.params,
            history=training.history,
            times=times,
            parent=parent,
        )

    def _send_history(self, run: "Run", history: Path) -> None:
        from mlflow.entities import Metric

        rows, now, run_id = read_history(history), now_ms(), run.info.run_id
        missing: list[Metric] = []
        for key in sorted({key for row in rows for key in row} - {"step"}):
            sent = {m.step for m in self.client.get_metric_history(run_id, key)} if key in run.data.metrics else set()
            missing += [
                Metric(key, row[key], now, row["step"]) for row in rows if key in row and row["step"] not in sent
            ]
        self._write(run, params={}, tags={}, metrics=missing)

    # ------------------------------------------------------------ comparisons

    def _parent(self, comparison: TrackedComparison, digest: str) -> "Run":
        tags = {f"{COMPARISON}.of": digest, KIND: "comparison", NOTE: comparison.note}
        runs = self._search(f"tags.`{COMPARISON}.of` = '{digest}'")
        run = runs[0] if runs else self._create("comparison", "stages/compare.py", tags)
        self._write(run, params=comparison.params, tags=tags)
        if run.info.status != "FINISHED":
            for file in comparison.files:
                self.client.log_artifact(run.info.run_id, str(file))
        return run

    def _row(
        self,
        run: "Run",
        row: TrackedRow,
        comparison: TrackedComparison,
        models: Models,
        *,
        tags: Mapping[str, str],
        training: str | None,
    ) -> None:
        from mlflow.entities import Metric

        model = None
        if row.weights is not None:
            model = models.of(row, row.weights, source_run=training or run.info.run_id)
        self._send_datasets(run, comparison, model)
        now = now_ms()
        digests = {benchmark: comparison.datasets[benchmark][:36] for benchmark in row.metrics}
        metrics = [Metric(name, value, now, 0) for name, value in row.summary.items()]
        # MLflow takes a key once per batch and step, so the benchmark is part of the key.
        metrics += [
            Metric(
                f"{benchmark}/{metric}",
                value,
                now,
                0,
                model_id=model,
                dataset_name=benchmark,
                dataset_digest=digests[benchmark],
                run_id=run.info.run_id,
            )
            for benchmark, values in row.metrics.items()
            for metric, value in values.items()
        ]
        missing = [metric for metric in metrics if run.data.metrics.get(metric.key) != metric.value]
        links = {"training run": training} if training else {}
        self._write(run, params=row.params, tags={**tags, **links}, metrics=missing)
        self._end(run)
        if model is not None and row.aliases:
            models.register(row, model, run.info.run_id)

    def _send_datasets(self, run: "Run", comparison: TrackedComparison, model: str | None) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        inputs = run.inputs.dataset_inputs if run.inputs else []
        present = {(entry.dataset.name, entry.dataset.digest) for entry in inputs}
        validation = {comparison.held_out, *comparison.held_out_shifts}
        missing = [
            DatasetInput(
                Dataset(name, digest[:36], "local", f"data/{name}"),
                [InputTag("mlflow.data.context", "validation" if name in validation else "test")],
            )
            for name, digest in comparison.datasets.items()
            if (name, digest[:36]) not in present
        ]
        if missing:
            self.client.log_inputs(run.info.run_id, missing, [LoggedModelInput(model)] if model else None)

    def _show(self, digest: str, comparison: TrackedComparison) -> None:
        """Let the experiment's two views show this comparison, in the order of the first of the summary's metrics."""
        first, *others = comparison.rows[0].summary
        metrics = [first, *(name for name in others if name.startswith(first) or not name.endswith(("_low", "_high")))]
        search = f"tags.`{COMPARISON}` = '{digest}'"
        shown = views.columns(metrics, ["method", "seeds", "members"])
        tags = {
            views.tag(key): views.view(search=f"{search}{condition}", order=first, shown=shown)
            for key, condition in ((views.MERGES, f" AND tags.`{SHOWN}` = 'yes'"), (views.ALL, ""))
        }
        present = self.client.get_experiment(self.experiment).tags
        for name, value in tags.items():
            if present.get(name) != value:
                self.client.set_experiment_tag(self.experiment, name, value)


def digest_of(comparison: TrackedComparison) -> str:
    """What names a comparison: everything that its rows say."""
    rows = [[r.name, r.identity, r.params, r.metrics, r.summary, list(r.aliases), r.shown] for r in comparison.rows]
    said = json.dumps([rows, comparison.datasets, comparison.held_out, comparison.precision], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def _shown(rows: Sequence[TrackedRow]) -> list[bool]:
    """Which rows the view of all methods has: those that are to be shown, and of too many the first."""
    wanted = [number for number, row in enumerate(rows) if row.shown][:SHOWN_AT_MOST]
    return [number in wanted for number in range(len(rows))]
