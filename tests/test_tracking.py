"""MLflow as a mirror of files: everything read back through its own client, and nothing sent twice."""

import ast
import base64
import contextlib
import getpass
import io
import json
import os
import shutil
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
import torch
from PIL import Image

from modelstock.data.images import Framing
from modelstock.errors import DataError, TrackingError
from modelstock.files import project
from modelstock.notices import collected
from modelstock.provenance import files_of
from modelstock.scoring.decoding import Prepared
from modelstock.scoring.one_pass import Tower
from modelstock.tracking import mirror
from modelstock.tracking.mirror import Mirror
from modelstock.tracking.mlflow import COMPARISON, IDENTITY, KEY, MlflowTracker, store
from modelstock.tracking.mlflow.models import Models
from modelstock.tracking.mlflow.tracker import SHOWN_AT_MOST
from modelstock.tracking.tracker import Times, TrackedComparison, TrackedRow, TrackedTraining, params_of
from modelstock.weights.weight_set import WeightSet, load_weights
from tests.support.ports import free_port
from tests.support.texts import encoder_folder, text_anchor

ROOT = Path(__file__).parent.parent
METRICS = {"held-out": {"top1": 0.5}, "shapes": {"top1": 0.25, "nll": 1.5}}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store as MLflow makes it, which takes a second."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.quiet_and_quick()
    store._make_store(file)
    return file


@pytest.fixture
def real_store():
    """For tests of how a store is made."""


@pytest.fixture(autouse=True)
def made_once(request, monkeypatch, empty_store):
    """A new store is a copy of one that was made once, but where the making is what a test is about."""
    if "real_store" not in request.fixturenames:
        monkeypatch.setattr(store, "_make_store", lambda file: shutil.copy(empty_store, file))


def row(name="seed-3", **changes):
    facts = {
        "identity": "e" * 64,
        "metrics": METRICS,
        "summary": {"shifts": 0.25, "shifts_low": 0.2, "shifts_high": 0.3, "held_out": 0.5},
        "params": {"method": "seed", "seeds": "1", "members": "3", "options": "none"},
        "description": "fine-tuned seed of seed 3.",
    }
    return TrackedRow(name=name, **{**facts, **changes})


def weighted(path, name="seed-3", **changes):
    """The row of a weight set's file."""
    return row(name, identity=load_weights(path).identity, weights=path, **changes)


def comparison(*rows, **changes):
    facts = {
        "trainings": [],
        "datasets": {"held-out": "a" * 64, "shapes": "b" * 64},
        "held_out": "held-out",
        "params": {"finetune.lr": 0.1},
        "files": [],
        "note": "a table",
        "model_name": "small",
    }
    return TrackedComparison(rows=rows, **{**facts, **changes})


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


TIMES = Times(began=1000, ended=27000)


def record(tracker, path, times=TIMES):
    """The comparison of one seed, with its training. Returns the runs' ids by their names, and the version."""
    history = path.with_name("history.jsonl")
    made_by = load_weights(path).meta["made_by"]
    training = TrackedTraining(key="k3", name="seed-3", params=params_of(made_by), history=history, times=times)
    tracker.record(comparison(weighted(path, training="k3", aliases=["champion", "seed"]), trainings=[training]))
    runs = {run.info.run_name: run.info.run_id for run in tracker.client.search_runs([tracker.experiment])}
    return runs, str(tracker.client.get_model_version_by_alias("small", "champion").version)


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
    tags = {r.info.run_name: r.data.tags for r in runs}
    return rows, sorted(inputs), models, versions, tags, client.get_experiment(tracker.experiment).tags


def check(tracker, path):
    runs, version = record(tracker, path)
    first = content(tracker)
    assert record(tracker, path) == (runs, version)
    assert content(tracker) == first
    rows, inputs, models, versions, tags, _ = first
    assert set(runs) == {"comparison", "seed-3", "training of seed-3"}
    assert rows["training of seed-3", "loss"] == [(s, 1 / s) for s in range(1, 7)]
    assert [s for s, _ in rows["training of seed-3", "validation/top1"]] == [2, 4, 6]
    assert rows["seed-3", "shapes/nll"] == [(0, 1.5)]
    assert rows["seed-3", "shifts_low"] == [(0, 0.2)]
    assert inputs == [("held-out", "a" * 36), ("shapes", "b" * 36)]
    assert len(models) == len(versions) == 1
    client = tracker.client
    champion, best_seed = (client.get_model_version_by_alias("small", alias) for alias in ("champion", "seed"))
    assert str(champion.version) == str(best_seed.version) == version
    assert champion.run_id == runs["seed-3"]
    assert champion.description == "fine-tuned seed of seed 3."
    assert champion.tags == {IDENTITY: tags["seed-3"][IDENTITY], **row().params}
    training, parent = (client.get_run(runs[name]) for name in ("training of seed-3", "comparison"))
    assert training.data.params["seed"] == "3"
    assert training.data.params["options.lr"] == "0.1"
    assert parent.data.params == {"finetune.lr": "0.1"}
    assert client.get_run(runs["seed-3"]).data.params == row().params
    for name in ("seed-3", "training of seed-3"):
        assert tags[name]["mlflow.parentRunId"] == runs["comparison"]
    assert tags["seed-3"]["training run"] == runs["training of seed-3"]
    for name, source in (("seed-3", "stages/compare.py"), ("training of seed-3", "stages/finetune.py")):
        assert tags[name]["mlflow.source.name"] == source
        assert tags[name]["mlflow.user"] == getpass.getuser()
        assert len(tags[name]["mlflow.source.git.commit"]) == 40
    linked = client.get_logged_model(client.search_logged_models([tracker.experiment])[0].model_id)
    assert linked.source_run_id == runs["training of seed-3"]
    assert {(m.key, m.dataset_name) for m in linked.metrics} >= {
        ("shapes/top1", "shapes"),
        ("held-out/top1", "held-out"),
    }
    return linked


def test_a_seed_is_a_row_a_training_a_model_and_a_version_and_a_second_call_adds_nothing(tmp_path, weights):
    model = check(MlflowTracker(tmp_path, "e"), weights)
    stored = Path(model.artifact_location.removeprefix("file://")) / "weights.safetensors"
    assert os.path.samefile(stored, weights)


def test_live_rows_and_the_finished_training_meet_in_one_run_that_ends_when_it_has_trained(tmp_path, weights):
    tracker, history = MlflowTracker(tmp_path, "e"), weights.with_name("history.jsonl")
    lines = history.read_text().splitlines(keepends=True)
    growing = tmp_path / "growing.jsonl"

    def send(count, times):
        growing.write_text("".join(lines[:count]))
        tracker.live(key="k3", name="seed-3", params={"seed": 3}, history=growing, times=times)
        (run,) = tracker.client.search_runs([tracker.experiment], f"tags.`{KEY}` = 'k3'")
        return run

    for count in (0, 2, 5):
        run = send(count, Times(began=1000))
    assert [m.step for m in tracker.client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5]
    assert (run.info.status, run.info.start_time) == ("RUNNING", 1000)
    run = send(6, Times(began=1000, ended=27000))
    assert (run.info.status, run.info.end_time) == ("FINISHED", 27000)
    runs, _ = record(tracker, weights)
    assert runs["training of seed-3"] == run.info.run_id
    again = tracker.client.get_run(run.info.run_id)
    assert (again.info.start_time, again.info.end_time) == (1000, 27000)
    assert [m.step for m in tracker.client.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3, 4, 5, 6]


def test_a_param_that_differs_the_second_time_stops_nothing(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    tracker.live(key="k3", name="seed-3", params={"seed": 3, "options.lr": 0.2}, history=tmp_path / "none")
    runs, _ = record(tracker, weights)
    assert tracker.client.get_run(runs["training of seed-3"]).data.params["options.lr"] == "0.2"


def test_more_params_than_mlflow_takes_at_a_time_are_all_there(tmp_path):
    tracker, params = MlflowTracker(tmp_path, "e"), {f"p{i}": str(i) for i in range(250)}
    tracker.record(comparison(row(), params=params))
    (parent,) = tracker.client.search_runs([tracker.experiment], "tags.`modelstock.kind` = 'comparison'")
    assert parent.data.params == params


def test_what_has_scores_and_no_weights_has_a_run_and_no_model(tmp_path):
    tracker = MlflowTracker(tmp_path, "e")
    for _ in range(2):
        tracker.record(comparison(row("ensemble/0-1")))
    (run,) = tracker.client.search_runs([tracker.experiment], "tags.`modelstock.kind` = 'row'")
    assert run.data.metrics["shapes/top1"] == 0.25
    assert tracker.client.search_logged_models([tracker.experiment]) == []


def test_rows_with_the_same_tensors_are_runs_of_their_own_that_share_one_model(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    tracker.record(comparison(weighted(weights), weighted(weights, "greedy/3", aliases=["champion"])))
    runs = {run.info.run_name: run for run in tracker.client.search_runs([tracker.experiment])}
    assert runs["greedy/3"].data.tags["same tensors as"] == "seed-3"
    assert "same tensors as" not in runs["seed-3"].data.tags
    assert runs["greedy/3"].data.metrics == runs["seed-3"].data.metrics
    assert len(tracker.client.search_logged_models([tracker.experiment])) == 1
    assert len(list((tmp_path / "mlruns").rglob("*.safetensors"))) == 1
    assert tracker.client.get_model_version_by_alias("small", "champion").run_id == runs["greedy/3"].info.run_id


def test_another_comparison_is_another_parent_and_the_views_show_the_latest(tmp_path, weights):
    tracker, other = MlflowTracker(tmp_path, "e"), weights.with_name("other.safetensors")
    WeightSet({"a": np.ones(4)}, {"made_by": {"stage": "merge", "method": "uniform", "options": {}}}).save(other)
    _, version = record(tracker, weights)
    uniform = weighted(other, "uniform/0-1", aliases=["champion"], shown=False)
    lines = tracker.record(comparison(weighted(weights, aliases=["seed"]), uniform))
    parents = tracker.client.search_runs([tracker.experiment], "tags.`modelstock.kind` = 'comparison'")
    assert len(parents) == 2
    latest = parents[0].data.tags[f"{COMPARISON}.of"]
    children = f"tags.`mlflow.parentRunId` = '{parents[0].info.run_id}'"
    assert {r.info.run_name for r in tracker.client.search_runs([tracker.experiment], children)} == {
        "seed-3",
        "uniform/0-1",
    }
    client = tracker.client
    assert str(client.get_model_version_by_alias("small", "champion").version) != version
    assert str(client.get_model_version_by_alias("small", "seed").version) == version
    tags = client.get_experiment(tracker.experiment).tags
    for key, names in (("merges", {"seed-3"}), ("all", {"seed-3", "uniform/0-1"})):
        state = json.loads(tags[f"mlflow.sharedViewState.{key}"])
        assert latest in state["searchFilter"]
        found = client.search_runs(
            [tracker.experiment], state["searchFilter"], order_by=[f"{state['orderByKey']} DESC"]
        )
        assert {r.info.run_name for r in found} == names
        assert state["orderByKey"] == "metrics.`shifts`"
        assert state["selectedColumns"] == [
            *(f"params.`{name}`" for name in ("method", "seeds", "members")),
            *(f"metrics.`{name}`" for name in ("shifts", "shifts_low", "shifts_high", "held_out")),
        ]
        address = f"#/experiments/{tracker.experiment}/runs?workflowType=machine_learning&viewStateShareKey={key}"
        assert any(line.endswith(f"http://127.0.0.1:5000/{address}") for line in lines)


def test_the_view_of_all_methods_fits_one_page(tmp_path):
    tracker = MlflowTracker(tmp_path, "e")
    tracker.record(comparison(*(row(f"r-{i}", identity=f"{i:064}") for i in range(SHOWN_AT_MOST + 3))))
    state = json.loads(tracker.client.get_experiment(tracker.experiment).tags["mlflow.sharedViewState.merges"])
    found = tracker.client.search_runs([tracker.experiment], state["searchFilter"])
    assert {r.info.run_name for r in found} == {f"r-{i}" for i in range(SHOWN_AT_MOST)}


def test_the_reports_files_are_the_comparisons_artifacts(tmp_path):
    tracker, page = MlflowTracker(tmp_path, "e"), tmp_path / "comparison.html"
    page.write_text("<p>")
    tracker.record(comparison(row(), files=[page]))
    (parent,) = tracker.client.search_runs([tracker.experiment], "tags.`modelstock.kind` = 'comparison'")
    (file,) = tracker.client.list_artifacts(parent.info.run_id)
    assert Path(tracker.client.download_artifacts(parent.info.run_id, file.path)).read_text() == "<p>"


def test_data_of_the_held_out_benchmark_are_for_validation_whatever_its_name(tmp_path):
    tracker = MlflowTracker(tmp_path, "e")
    metrics = {"val": {"ece": 0.1}, "shapes": {"ece": 0.2}}
    tracker.record(comparison(row(metrics=metrics), datasets={"val": "a" * 64, "shapes": "b" * 64}, held_out="val"))
    (run,) = tracker.client.search_runs([tracker.experiment], "tags.`modelstock.kind` = 'row'")
    contexts = {
        d.dataset.name: [t.value for t in d.tags if t.key == "mlflow.data.context"] for d in run.inputs.dataset_inputs
    }
    assert contexts == {"val": ["validation"], "shapes": ["test"]}


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
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    with server(tmp_path, port) as process:
        tracker = MlflowTracker(tmp_path, "e")
        half = tmp_path / "half.jsonl"
        half.write_text("".join(weights.with_name("history.jsonl").read_text().splitlines(keepends=True)[:3]))
        tracker.live(key="k3", name="seed-3", params={"stage": "finetune", "seed": 3}, history=half)
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
        assert len(MlflowTracker(tmp_path, "e").client.search_runs(["1"])) == 3
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
    (run,) = tracker.client.search_runs([tracker.experiment])
    assert len(tracker.client.get_metric_history(run.info.run_id, "loss")) == 6
    assert run.info.status == "FINISHED"
    assert run.info.start_time < run.info.end_time


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


# ---------------------------------------------------------------- what MLflow loads


def served(tmp_path, anchor, pictures):
    """A registered champion, and the probabilities that scoring's own tower gives the pictures."""
    from modelstock.data.shapes.names import NAMES

    path = tmp_path / "0-1.safetensors"
    WeightSet(anchor.tensors, {**anchor.meta, "classes": list(NAMES)}, "champion").save(path)
    tracker = MlflowTracker(tmp_path, "e")
    tracker.record(comparison(weighted(path, "uniform/0-1", aliases=["champion"])))
    tower = Tower(load_weights(path), "cpu", torch.float32)
    with torch.inference_mode():
        images = {Framing.of(anchor.meta["preprocess"]): torch.from_numpy(np.stack(pictures))}
        logits = tower.logits(Prepared(images, "cpu", torch.float32).of(tower.preprocess))
    return tracker, logits.softmax(dim=1).numpy()


def check_predictions(answer, expected, labels):
    """A table's rows, or what a server makes of them."""
    for found, shares in zip(answer, expected, strict=True):
        assert list(found["probabilities"]) == list(labels)
        np.testing.assert_allclose(list(found["probabilities"].values()), shares, rtol=1e-5)
        assert found["label"] == labels[shares.argmax()]
        assert found["probability"] == pytest.approx(shares.max(), rel=1e-5)


def test_mlflow_loads_the_champion_and_it_predicts_what_scoring_does(tmp_path, anchor, monkeypatch):
    import mlflow
    import pandas

    from modelstock.data.shapes.names import NAMES

    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3)]
    tracker, expected = served(tmp_path, anchor, arrays)
    images = [Image.fromarray(array) for array in arrays]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    contents = [Path(path).read_bytes() for path in paths]
    urls = [f"data:image/png;base64,{base64.b64encode(content).decode()}" for content in contents]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    model = mlflow.pyfunc.load_model("models:/small@champion")
    # MLflow makes a table of what it is given, and none of a list of arrays.
    tables = [pandas.DataFrame({"image": pictures}) for pictures in (arrays, paths)]
    for pictures in (images, paths, contents, urls, *tables):
        check_predictions(model.predict(pictures).to_dict("records"), expected, NAMES)
    with pytest.raises(DataError, match="picture 1: got FileNotFoundError"):
        model.predict([paths[0], "nowhere.png"])
    example = model.input_example
    assert example is not None
    assert len(model.predict(example)) == 1


def test_a_logged_model_runs_no_pickle_and_names_what_it_needs(tmp_path, anchor):
    served(tmp_path, anchor, [np.zeros((32, 32, 3), np.uint8)])
    (folder,) = {path.parent for path in (tmp_path / "mlruns").rglob("MLmodel")}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 1
    needed = {line.split("==")[0] for line in (folder / "requirements.txt").read_text().split()}
    code = [path for path in files_of("modelstock.models.served") if path.suffix == ".py"]
    imported = {
        alias.split(".")[0]
        for path in code
        for node in ast.walk(ast.parse(path.read_text()))
        for alias in ([n.name for n in node.names] if isinstance(node, ast.Import) else [])
        + ([node.module] if isinstance(node, ast.ImportFrom) and node.module else [])
    }
    distributions = {"PIL": "pillow", "open_clip": "open_clip_torch"}
    others = {distributions.get(name, name) for name in imported} - set(sys.stdlib_module_names) - {"modelstock"}
    # open_clip brings two of them; a classifier of images reaches what is transformers' in no call.
    assert others - {"tqdm", "ftfy", "transformers", "tokenizers"} <= needed
    assert not {"transformers", "tokenizers"} & needed


def test_mlflow_loads_a_classifier_of_texts(tmp_path, monkeypatch):
    import mlflow
    import pandas

    from modelstock.models.classify import TextClassifier

    anchor, path = text_anchor(encoder_folder(tmp_path / "bert")), tmp_path / "0-1.safetensors"
    anchor.save(path)
    tracker = MlflowTracker(tmp_path, "e")
    tracker.record(comparison(weighted(path, "uniform/0-1", aliases=["champion"])))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
    model = mlflow.pyfunc.load_model("models:/small@champion")
    texts = ["a good film", "dull", "we like it: a very clever plot in this lovely book of the dark and the cold"]
    expected = TextClassifier(anchor).probabilities(texts)
    tables = [pandas.DataFrame({name: texts}) for name in ("text", "anything")]
    for given in (texts, np.array(texts), *tables):
        check_predictions(model.predict(given).to_dict("records"), expected, ("bad", "good"))
    assert len(model.predict(model.input_example)) == 1
    assert [str(column.type) for column in model.metadata.signature.inputs] == ["DataType.string"]
    with pytest.raises(mlflow.exceptions.MlflowException):
        model.predict([1, 2])
    assert "takes a list of texts" in tracker.client.get_registered_model("small").description
    (logged,) = tracker.client.search_logged_models([tracker.client.get_experiment_by_name("e").experiment_id])
    assert logged.model_type == "text classifier"
    (folder,) = {marker.parent for marker in (tmp_path / "mlruns").rglob("MLmodel")}
    needed = {line.split("==")[0] for line in (folder / "requirements.txt").read_text().split()}
    assert {"transformers", "tokenizers", "torch", "open_clip_torch"} <= needed
    packed = anchor.meta["preprocess"]["tokenizer"]["json"].encode()
    assert not [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and file.suffix != ".safetensors" and packed in file.read_bytes()
    ]


def test_mlflows_own_server_answers_with_what_scoring_predicts(tmp_path, anchor):
    from modelstock.data.shapes.names import NAMES

    picture = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    tracker, expected = served(tmp_path, anchor, [picture])
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    port = free_port()
    command = ["-m", "mlflow", "models", "serve", "--model-uri", "models:/small@champion", "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "MLFLOW_TRACKING_URI": tracker.uri, "MLFLOW_DISABLE_TELEMETRY": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=tmp_path,  # not the project's: the model brings its own code
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=1)
                break
            time.sleep(0.5)
        for body in ({"inputs": [url]}, {"dataframe_split": {"columns": ["image"], "data": [[url]]}}):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                check_predictions(json.load(answer)["predictions"], expected, NAMES)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---------------------------------------------------------------- the project's folder


def copies(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("weights.safetensors") if "artifacts" in p.parts)


@pytest.mark.parametrize("name", ["C# work", "what?", "100% ours", "p%20z", "plain"])
def test_whatever_the_projects_path_is_called_its_store_and_its_copies_lie_in_it(real_store, tmp_path, weights, name):
    root = tmp_path / name / "modelstock"
    root.mkdir(parents=True)
    check(MlflowTracker(root, "e"), weights)
    assert {p.name for p in root.iterdir()} >= {"mlflow.db", "mlruns"}
    assert len(copies(root)) == len(copies(tmp_path)) == 1


def test_a_project_that_was_moved_finds_its_runs_and_keeps_its_copies_in_the_new_place(tmp_path, weights):
    old, new = tmp_path / "C# old", tmp_path / "new"
    old.mkdir()
    runs, version = record(MlflowTracker(old, "e"), weights)
    old.rename(new)
    tracker = MlflowTracker(new, "e")
    assert record(tracker, weights) == (runs, version)
    other = weights.with_name("other.safetensors")
    WeightSet({"a": np.ones(4)}, {"made_by": {"stage": "merge", "method": "uniform", "options": {}}}).save(other)
    tracker.record(comparison(weighted(other, "uniform/0-1")))
    assert not old.exists()
    for model in tracker.client.search_logged_models([tracker.experiment]):
        assert model.artifact_location.startswith(new.as_uri())
    assert tracker.client.get_model_version("small", version).source.startswith(new.as_uri())
    assert tracker.client.get_run(runs["seed-3"]).info.artifact_uri.startswith(new.as_uri())
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


def test_a_kill_while_the_store_is_made_leaves_one_that_opens_the_next_time(real_store, tmp_path):
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


def test_the_store_and_its_artifacts_are_their_owners_alone(real_store, tmp_path):
    MlflowTracker(tmp_path, "e")
    assert {name: oct((tmp_path / name).stat().st_mode)[-3:] for name in ("mlflow.db", "mlruns")} == {
        "mlflow.db": "600",
        "mlruns": "700",
    }


@pytest.mark.parametrize(
    "call", ["_place", "_make_loadable", "finalize_logged_model", "log_inputs", "create_model_version"]
)
def test_what_is_left_unfinished_is_finished_by_the_next_replay(tmp_path, weights, monkeypatch, call):
    tracker = MlflowTracker(tmp_path, "e")
    with monkeypatch.context() as patch:
        patch.setattr(Models if call.startswith("_") else tracker.client, call, refuse)
        with pytest.raises(TrackingError, match="refused"):
            record(tracker, weights)
    check(tracker, weights)
    models = tracker.client.search_logged_models([tracker.experiment])
    assert [str(m.status) for m in models] == ["READY"]


def refuse(*arguments, **options):
    raise OSError("refused")


def test_of_several_models_of_one_weight_set_only_the_one_that_is_ready_remains(tmp_path, weights):
    tracker = MlflowTracker(tmp_path, "e")
    runs, _ = record(tracker, weights)
    tags = {IDENTITY: load_weights(weights).identity}
    tracker.client.create_logged_model(tracker.experiment, name="again", source_run_id=runs["seed-3"], tags=tags)
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
    assert lines == ["seed-3: the tracker has not answered for 2 s; `dvc repro -s -f compare` sends what it lacks"]
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
