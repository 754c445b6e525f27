"""Weights as logged models, stored once however many rows have them, and as versions of a registered model.

A model that somebody may ship is a version, and MLflow loads it: `mlflow.pyfunc.load_model("models:/NAME@champion")`.
"""

import base64
import io
import json
import shutil
import tempfile
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

import modelstock
from modelstock.files import atomic_path, link_or_copy
from modelstock.tracking.mlflow.store import IDENTITY, Connection, local_path
from modelstock.tracking.tracker import TrackedComparison, TrackedRow
from modelstock.weights.checkpoints import open_safetensors

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

# What a loaded model needs besides modelstock's own code, which it carries.
REQUIREMENTS = ("mlflow", "numpy", "open_clip_torch", "pandas", "pillow", "safetensors", "timm", "torch", "torchvision")
OF_TEXTS = ("tokenizers", "transformers")  # and what besides, where it takes texts
ABOUT = """\
Weight sets of one experiment: the best per method on the held-out split, each under an alias with the method's name,
and the one to ship, `champion`. Load one with `mlflow.pyfunc.load_model("models:/{name}@champion")`; its `predict`
takes a list of {examples}, and returns labels with probabilities.
"""
EXAMPLES = {
    "image": "images (paths, data URLs, bytes, Pillow's) or a table with a column of them or of arrays",
    "text": "texts or a table with a column of them",
}


class Models:
    """The models of a comparison in a connection's experiment."""

    def __init__(self, connection: Connection, comparison: TrackedComparison) -> None:
        self._client, self._experiment = connection.client, connection.experiment
        self._is_server = connection.uri.startswith("http")
        self._comparison = comparison
        self._placed: dict[str, str] = {}  # identity -> id of its model
        self._versions: list[ModelVersion] | None = None

    def of(self, row: TrackedRow, weights: Path, *, source_run: str) -> str:
        """The id of a row's model, which holds its weights; made where there is none."""
        if row.identity not in self._placed:
            model = self._find(row.identity) or self._new(row, weights, source_run)
            self._place(model, weights)
            if str(model.status) != "READY":
                self._client.finalize_logged_model(model.model_id, "READY")
            self._placed[row.identity] = str(model.model_id)
        if row.aliases:
            self._make_loadable(self._client.get_logged_model(self._placed[row.identity]), weights)
        return self._placed[row.identity]

    def _find(self, identity: str) -> "LoggedModel | None":
        """The model of a weight set: the one that is ready, else one that a killed call has left unfinished."""
        # A search by status finds nothing on SQLite: it is filtered here.
        models = self._client.search_logged_models([self._experiment], f"tags.`{IDENTITY}` = '{identity}'")
        first = sorted(models, key=lambda m: (str(m.status) != "READY", m.creation_timestamp))
        for model in first[1:]:
            if str(model.status) != "READY":
                self._client.delete_logged_model(model.model_id)
        return first[0] if first else None

    def _new(self, row: TrackedRow, weights: Path, source_run: str) -> "LoggedModel":
        return self._client.create_logged_model(
            self._experiment,
            name=row.name.replace("/", "-").replace("@", "-").replace(".", "_"),
            source_run_id=source_run,
            tags={IDENTITY: row.identity},
            model_type=f"{_modality(weights)} classifier",
        )

    def _place(self, model: "LoggedModel", weights: Path) -> None:
        """Put the file into its model, where it is not there yet: a hard link where that is possible."""
        folder, source = local_path(model.artifact_location), weights.resolve()
        if folder is None:
            if str(model.status) != "READY":
                self._client.log_model_artifact(model.model_id, str(weights))
            return
        target = folder / weights.name
        if target.exists() and target.stat().st_size == source.stat().st_size and str(model.status) == "READY":
            return
        target.unlink(missing_ok=True)
        with atomic_path(target) as temporary:
            link_or_copy(source, temporary)

    # ------------------------------------------------------------ what MLflow loads

    def _make_loadable(self, model: "LoggedModel", weights: Path) -> None:
        """Put what MLflow loads a model by beside its weights, where it is not there yet."""
        files = {file.path for file in self._client.list_logged_model_artifacts(model.model_id)}
        if "MLmodel" in files:
            return
        stored = next((name for name in sorted(files) if name.endswith(".safetensors")), weights.name)
        with tempfile.TemporaryDirectory() as temporary:
            made = Path(temporary) / "model"
            self._write_loadable(made, stored, str(model.model_id), modality=_modality(weights))
            folder = local_path(model.artifact_location)
            if folder is None:
                self._client.log_model_artifacts(model.model_id, str(made))
                return
            marker = made / "MLmodel"
            shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(marker.name))
            with atomic_path(folder / marker.name) as last:  # with it, the model counts as complete
                shutil.copyfile(marker, last)

    def _write_loadable(self, folder: Path, weights: str, model_id: str, *, modality: str) -> None:
        import mlflow.pyfunc
        import pandas
        from mlflow.models import Model, ModelSignature
        from mlflow.types.schema import AnyType, ColSpec, Map, Schema

        comparison = self._comparison
        with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
            data = Path(temporary) / "classifier"
            data.mkdir()
            description = {"weights": weights, "precision": comparison.precision}
            (data / "classifier.json").write_text(json.dumps(description, indent=1, sort_keys=True), encoding="utf-8")
            package = Path(temporary) / "modelstock"
            shutil.copytree(Path(modelstock.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
            warnings.simplefilter("ignore")  # MLflow's own, about pandas
            is_text = modality == "text"
            example: Any = "string" if is_text else AnyType()  # type: ignore[no-untyped-call]
            outputs: list[Any] = [
                ColSpec("string", "label"),
                ColSpec("double", "probability"),
                ColSpec(Map("double"), "probabilities"),
            ]
            mlflow.pyfunc.save_model(
                folder,
                mlflow_model=Model(model_id=model_id),
                loader_module="modelstock.models.served",
                data_path=str(data),
                code_paths=[str(package)],
                pip_requirements=[f"{name}=={version(name)}" for name in _requirements(modality)],
                signature=ModelSignature(Schema([ColSpec(example)]), Schema(outputs)),
                input_example=pandas.DataFrame({modality: ["a text" if is_text else _picture_url()]}),
            )

    # ------------------------------------------------------------ versions

    def register(self, row: TrackedRow, model_id: str, run_id: str) -> None:
        """A row's model as a version of the registered model, made once, with its description.

        Its aliases move to it; those that this comparison has no row for stay where they are, for users make some too.
        """
        name = self._comparison.model_name
        if self._versions is None:
            self._versions = self._known_versions(name, row)
        # On SQLite a version's model_id is empty; its tag says which weight set it is.
        found = next((v for v in self._versions if v.tags.get(IDENTITY) == row.identity), None)
        tags = {IDENTITY: row.identity, **{key: str(value) for key, value in row.params.items()}}
        if found is None:
            # A local registry would look for "models:/<id>" in the process-wide store, which need not be this one.
            model = self._client.get_logged_model(model_id)
            source = f"models:/{model_id}" if self._is_server else model.artifact_location
            found = self._client.create_model_version(
                name,
                source,
                run_id=run_id,
                tags=tags,
                description=row.description,
                model_id=model_id if self._is_server else None,
            )
            self._versions.append(found)
        elif found.description != row.description:
            self._client.update_model_version(name, found.version, row.description)
            for key, value in tags.items():
                self._client.set_model_version_tag(name, found.version, key, value)
        for alias in row.aliases:
            self._client.set_registered_model_alias(name, alias, found.version)

    def _known_versions(self, name: str, row: TrackedRow) -> "list[ModelVersion]":
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(name)
        except MlflowException:
            modality = "image" if row.weights is None else _modality(row.weights)
            about = ABOUT.format(name=name, examples=EXAMPLES[modality])
            self._client.create_registered_model(name, description=about)
        return list(self._client.search_model_versions(f"name = '{name}'"))


def _modality(weights: Path) -> str:
    """What a weight set's tower takes: image or text."""
    preprocess = open_safetensors(weights, keep_open=False).meta.get("preprocess") or {}
    return str(preprocess.get("modality", "image"))


def _requirements(modality: str) -> list[str]:
    """The packages that a loaded model needs; of open_clip's own text towers, those that are here."""
    return sorted([*REQUIREMENTS, *(name for name in OF_TEXTS if modality == "text" and find_spec(name))])


def _picture_url() -> str:
    """A small grey picture as the URL that `predict` and a server take."""
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
