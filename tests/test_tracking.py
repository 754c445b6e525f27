"""MLflow as a mirror of files: everything read back through its own client, and nothing sent twice."""

import contextlib
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest

from modelstock.errors import TrackingError
from modelstock.files import project
from modelstock.notices import collected
from modelstock.tracking import mirror
from modelstock.tracking.mirror import Mirror
from modelstock.tracking.mlflow import IDENTITY, MlflowTracker
from modelstock.tracking.tracker import Measurements
from modelstock.weights.weight_set import WeightSet

ROOT = Path(__file__).parent.parent
MEASURED = Measurements(
    metrics={"held-out": {"top1": 0.5}, "shapes": {"top1": 0.25, "nll": 1.5}},
    datasets={"held-out": "a" * 64, "shapes": "b" * 64},
)


@pytest.fixture
def weights(tmp_path):
    made = {"stage": "finetune", "seed": 3, "options": {"lr": 0.1}, "version": "1", "key": "k3"}
    path = tmp_path / "seed" / "weights.safetensors"
    WeightSet({"a": np.arange(4.0)}, {"parents": ["f" * 64], "made_by": made}).save(path)
    path.with_name("history.jsonl").write_text(
        "".join(
            json.dumps({"step": s, "loss": 1 / s} | ({"validation/top1": 0.1 * s} if s % 2 == 0 else {})) + "\n"
            for s in range(1, 7)
        )
    )
    return path


def record(tracker, path):
    run = tracker.record(
        path,
        name="seed-3",
        key="k3",
        history=path.with_name("history.jsonl"),
        tags={"git.commit": "c0ffee"},
        measurements=MEASURED,
    )
    identity = tracker.client.get_run(run).data.tags[IDENTITY]
    return run, tracker.register(identity, model_name="small", alias="champion")


def content(tracker):
    """Everything there is, as counts and values."""
    client = tracker.client
    runs = client.search_runs([tracker.experiment])
    rows = {
        (r.info.run_name, key): [(m.step, m.value) for m in client.get_metric_history(r.info.run_id, key)]
        for r in runs
        for key in r.data.metrics
    }
    inputs = [(d.dataset.name, d.dataset.digest) for r in runs for d in r.inputs.dataset_inputs]
    models = [(m.name, str(m.status), m.tags[IDENTITY]) for m in client.search_logged_models([tracker.experiment])]
    versions = [(v.version, v.source) for v in client.search_model_versions("name = 'small'")]
    return rows, sorted(inputs), models, versions


def check(tracker, path):
    run, version = record(tracker, path)
    first = content(tracker)
    assert record(tracker, path) == (run, version)
    assert content(tracker) == first
    rows, inputs, models, versions = first
    assert rows["seed-3", "loss"] == [(s, 1 / s) for s in range(1, 7)]
    assert [s for s, _ in rows["seed-3", "validation/top1"]] == [2, 4, 6]
    assert rows["seed-3", "shapes/nll"] == [(0, 1.5)]
    assert inputs == [("held-out", "a" * 36), ("shapes", "b" * 36)]
    assert len(models) == len(versions) == 1
    assert str(tracker.client.get_model_version_by_alias("small", "champion").version) == version
    data = tracker.client.get_run(run).data
    assert data.params["seed"] == "3"
    assert data.params["options.lr"] == "0.1"
    assert data.params["parents"] == "f" * 12
    assert data.tags["git.commit"] == "c0ffee"
    linked = tracker.client.get_logged_model(tracker.client.search_logged_models([tracker.experiment])[0].model_id)
    assert {(m.key, m.dataset_name) for m in linked.metrics} >= {
        ("shapes/top1", "shapes"),
        ("held-out/top1", "held-out"),
    }
    return linked


def test_a_weight_set_is_one_run_one_model_one_version_and_a_second_call_adds_nothing(tmp_path, weights):
    model = check(MlflowTracker(tmp_path, "e"), weights)
    stored = Path(model.artifact_location.removeprefix("file://")) / "weights.safetensors"
    assert os.path.samefile(stored, weights)


def test_live_rows_and_the_finished_record_meet_in_one_run(tmp_path, weights):
    tracker, history = MlflowTracker(tmp_path, "e"), weights.with_name("history.jsonl")
    lines = history.read_text().splitlines(keepends=True)
    growing = tmp_path / "growing.jsonl"
    for count in (0, 2, 5):
        growing.write_text("".join(lines[:count]))
        run = tracker.live(key="k3", name="seed-3", params={"seed": 3}, history=growing)
    assert [m.step for m in tracker.client.get_metric_history(run, "loss")] == [1, 2, 3, 4, 5]
    assert tracker.client.get_run(run).info.status == "RUNNING"
    assert record(tracker, weights)[0] == run
    assert [m.step for m in tracker.client.get_metric_history(run, "loss")] == [1, 2, 3, 4, 5, 6]
    assert tracker.client.get_run(run).info.status == "FINISHED"


def test_a_param_that_differs_the_second_time_stops_nothing(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    run = tracker.live(key="k3", name="seed-3", params={"seed": 3, "options.lr": 0.2}, history=tmp_path / "none")
    assert record(tracker, weights)[0] == run
    assert tracker.client.get_run(run).data.params["options.lr"] == "0.2"


def test_an_ensemble_has_a_run_and_no_model(tmp_path):
    tracker = MlflowTracker(tmp_path, "e")
    for _ in range(2):
        run = tracker.record_scores("e" * 64, name="ensemble", measurements=MEASURED, tags={}, params={"n": 2})
    assert len(tracker.client.search_runs([tracker.experiment])) == 1
    assert tracker.client.get_run(run).data.metrics["shapes/top1"] == 0.25
    assert tracker.client.search_logged_models([tracker.experiment]) == []


def test_data_of_the_held_out_benchmark_are_for_validation_whatever_its_name(tmp_path):
    tracker = MlflowTracker(tmp_path, "e")
    measured = Measurements(
        metrics={"val": {"ece": 0.1}, "shapes": {"ece": 0.2}},
        datasets={"val": "a" * 64, "shapes": "b" * 64},
        held_out="val",
    )
    run = tracker.record_scores("e" * 64, name="r", measurements=measured, tags={}, params={})
    inputs = tracker.client.get_run(run).inputs.dataset_inputs
    contexts = {d.dataset.name: [t.value for t in d.tags if t.key == "mlflow.data.context"] for d in inputs}
    assert contexts == {"val": ["validation"], "shapes": ["test"]}


def test_the_alias_moves_to_the_new_champion(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    record(tracker, weights)
    other = tmp_path / "other.safetensors"
    WeightSet(
        {"a": np.ones(4)}, {"made_by": {"stage": "merge", "method": "uniform", "members": [0, 1], "options": {}}}
    ).save(other)
    run = tracker.record(other, name="uniform/0-1", measurements=MEASURED, tags={})
    version = tracker.register(tracker.client.get_run(run).data.tags[IDENTITY], model_name="small", alias="champion")
    assert str(tracker.client.get_model_version_by_alias("small", "champion").version) == version == "2"
    assert tracker.client.get_run(run).data.params["members"] == "0-1"


@contextlib.contextmanager
def server(folder, port):
    """MLflow's own server, its store and artifacts in `folder`; killed at the end."""
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    process = subprocess.Popen(
        [sys.executable, *command, "--artifacts-destination", str(folder / "artifacts")],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=folder,
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_real_server_that_is_killed_midway_is_sent_what_it_lacks_exactly_once(tmp_path, weights, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with server(tmp_path, port) as process:
        tracker = MlflowTracker(tmp_path, "e")
        half = tmp_path / "half.jsonl"
        half.write_text("".join(weights.with_name("history.jsonl").read_text().splitlines(keepends=True)[:3]))
        tracker.live(key="k3", name="seed-3", params={"seed": 3}, history=half)
        create = tracker.client.create_logged_model

        def create_and_die(*arguments, **options):
            create(*arguments, **options)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

        monkeypatch.setattr(tracker.client, "create_logged_model", create_and_die)
        with pytest.raises(TrackingError):
            record(tracker, weights)
        begun = time.monotonic()
        with pytest.raises(TrackingError):
            record(tracker, weights)
        assert time.monotonic() - begun < 5
    with server(tmp_path, port):
        check(MlflowTracker(tmp_path, "e"), weights)
        assert len(MlflowTracker(tmp_path, "e").client.search_runs(["1"])) == 1
    assert [p.name for p in (tmp_path / "artifacts").rglob("*.safetensors")] == ["weights.safetensors"]


def test_a_dead_server_costs_seconds_and_never_the_training(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(mirror, "AFTER_S", 0.01)
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r"MLflow at http://127\.0\.0\.1:9: got .*; expected a tracking server"):
        MlflowTracker(tmp_path, "e", "http://127.0.0.1:9")
    trained = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Mirror(
            lambda: MlflowTracker(tmp_path, "e", "http://127.0.0.1:9"),
            weights.with_name("history.jsonl"),
            key="k",
            name="n",
            params={},
        ):
            time.sleep(0.1)
            trained.append(True)
    assert trained
    assert [str(w.message) for w in caught if "training goes on" in str(w.message)]
    assert time.monotonic() - begun < 30


def test_the_mirror_sends_the_last_rows_when_the_block_ends(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(mirror, "AFTER_S", 0.01)
    history = weights.with_name("history.jsonl")
    with Mirror(lambda: MlflowTracker(tmp_path, "e"), history, key="k3", name="seed-3", params={}, every_s=60):
        time.sleep(0.1)
    tracker = MlflowTracker(tmp_path, "e")
    run = tracker.client.search_runs([tracker.experiment])[0]
    assert len(tracker.client.get_metric_history(run.info.run_id, "loss")) == 6


def test_a_run_that_ends_soon_never_opens_the_tracker(tmp_path, weights):
    opened = []
    with Mirror(lambda: opened.append(1), weights.with_name("history.jsonl"), key="k", name="n", params={}):
        pass
    assert opened == []


def test_processes_that_start_at_once_on_a_new_store_all_succeed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from modelstock.tracking.mlflow import MlflowTracker;"
        "MlflowTracker(Path(sys.argv[1]), 'e')"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [process.wait() for process in started] == [0, 0, 0], [p.stderr.read() for p in started]
    for process in started:
        process.stderr.close()
    assert len(MlflowTracker(tmp_path, "e").client.search_experiments(filter_string="name = 'e'")) == 1


# ---------------------------------------------------------------- the project's folder


def copies(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("weights.safetensors") if "artifacts" in p.parts)


@pytest.mark.parametrize("name", ["C# work", "what?", "100% ours", "p%20z", "plain"])
def test_whatever_the_projects_path_is_called_its_store_and_its_copies_lie_in_it(tmp_path, weights, name):
    root = tmp_path / name / "modelstock"
    root.mkdir(parents=True)
    check(MlflowTracker(root, "e"), weights)
    assert {p.name for p in root.iterdir()} >= {"mlflow.db", "mlruns"}
    assert len(copies(root)) == len(copies(tmp_path)) == 1


def test_a_project_that_was_moved_finds_its_runs_and_keeps_its_copies_in_the_new_place(tmp_path, weights):
    old, new = tmp_path / "C# old", tmp_path / "new"
    old.mkdir()
    run, version = record(MlflowTracker(old, "e"), weights)
    old.rename(new)
    tracker = MlflowTracker(new, "e")
    assert record(tracker, weights) == (run, version)
    other = weights.with_name("other.safetensors")
    WeightSet({"a": np.ones(4)}, {"made_by": {"stage": "merge", "method": "uniform", "options": {}}}).save(other)
    tracker.record(other, name="uniform/0-1", measurements=MEASURED, tags={})
    assert not old.exists()
    for model in tracker.client.search_logged_models([tracker.experiment]):
        assert model.artifact_location.startswith(new.as_uri())
    assert tracker.client.get_model_version("small", version).source.startswith(new.as_uri())
    assert tracker.client.get_run(run).info.artifact_uri.startswith(new.as_uri())
    assert len(list((new / "mlruns").rglob("*.safetensors"))) == 2


def test_a_copy_that_is_missing_or_was_not_written_to_its_end_is_written_again(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    record(tracker, weights)
    stored = tmp_path / next(c for c in copies(tmp_path))
    stored.unlink()
    record(tracker, weights)
    assert os.path.samefile(stored, weights)
    stored.unlink()
    stored.write_bytes(weights.read_bytes()[:-1])
    record(tracker, weights)
    assert os.path.samefile(stored, weights)


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    tracker.client.delete_experiment(tracker.experiment)
    with pytest.raises(
        TrackingError, match=r"got a deleted experiment 'e'.*mlflow experiments restore --experiment-id 1"
    ):
        MlflowTracker(tmp_path, "e")


# ---------------------------------------------------------------- kills


def test_a_kill_while_the_store_is_made_leaves_one_that_opens_the_next_time(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import mlflow.store.db.utils as utils;"
        "from modelstock.tracking.mlflow import MlflowTracker;"
        "utils._upgrade_db = lambda engine: os.kill(os.getpid(), 9);"
        "MlflowTracker(Path(sys.argv[1]), 'e')"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9
    assert MlflowTracker(tmp_path, "e").experiment == "1"
    assert [p.name for p in tmp_path.glob(".mlflow.db*")] == []


def test_a_store_that_an_older_version_left_half_made_is_one_line_with_its_cure(tmp_path):
    store = sqlite3.connect(tmp_path / "mlflow.db")
    store.execute("CREATE TABLE metrics (key TEXT)")
    store.close()
    with pytest.raises(TrackingError, match=r"move mlflow\.db away") as caught:
        MlflowTracker(tmp_path, "e")
    assert "\n" not in str(caught.value)


def test_the_store_and_its_artifacts_are_their_owners_alone(tmp_path):
    MlflowTracker(tmp_path, "e")
    assert {name: oct((tmp_path / name).stat().st_mode)[-3:] for name in ("mlflow.db", "mlruns")} == {
        "mlflow.db": "600",
        "mlruns": "700",
    }


@pytest.mark.parametrize("call", ["_place", "client.finalize_logged_model"])
def test_a_model_left_unfinished_is_finished_by_the_next_replay(tmp_path, weights, monkeypatch, call):
    tracker = MlflowTracker(tmp_path, "e")
    owner, _, name = call.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(tracker, owner) if owner else tracker, name, refuse)
        with pytest.raises(TrackingError, match="refused"):
            record(tracker, weights)
    check(tracker, weights)
    models = tracker.client.search_logged_models([tracker.experiment])
    assert [str(m.status) for m in models] == ["READY"]


def refuse(*arguments, **options):
    raise OSError("refused")


def test_of_several_models_of_one_weight_set_only_the_one_that_is_ready_remains(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    run, _ = record(tracker, weights)
    tags = {IDENTITY: tracker.client.get_run(run).data.tags[IDENTITY]}
    tracker.client.create_logged_model(tracker.experiment, name="again", source_run_id=run, tags=tags)
    check(tracker, weights)


def test_a_server_that_accepts_and_never_answers_costs_seconds_and_is_one_line(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(mirror, "PATIENCE_S", 2)
    monkeypatch.setattr(mirror, "AFTER_S", 0.01)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    with socket.socket() as silent, warnings.catch_warnings(record=True) as caught, collected() as kept:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://user:sesame@127.0.0.1:{silent.getsockname()[1]}"
        warnings.simplefilter("always")
        begun = time.monotonic()
        history = weights.with_name("history.jsonl")
        with Mirror(lambda: MlflowTracker(tmp_path, "e", uri), history, key="k", name="seed-3", params={}):
            time.sleep(0.1)
        assert time.monotonic() - begun < 10
    lines = [str(w.message) for w in caught if "seed-3" in str(w.message)]
    assert lines == ["seed-3: the tracker has not answered for 2 s; `dvc repro -f compare` sends what it lacks"]
    assert kept == []  # what is made is the same with and without a tracker


def test_an_experiment_in_a_copy_of_the_project_uses_the_projects_store(tmp_path, monkeypatch):
    copy = tmp_path / ".dvc/tmp/exps/standalone/tmp1"
    copy.mkdir(parents=True)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert project() == tmp_path
    monkeypatch.chdir(copy)
    assert project() == tmp_path
    monkeypatch.chdir(tmp_path.parent)
    assert project() == tmp_path.parent
    monkeypatch.delenv("DVC_ROOT")
    monkeypatch.chdir(copy)
    assert project() == copy
