"""MLflow as the mirror of files, by one idempotent replay. The only package that imports mlflow.

store.py    where MLflow keeps what it is sent, and the experiment in it
tracker.py  runs: trainings, comparisons and their rows
models.py   weights as logged models, and as versions of a registered model
views.py    the columns and the order that a link opens the experiment with
"""

from modelstock.tracking.mlflow.store import IDENTITY, store_uri
from modelstock.tracking.mlflow.tracker import COMPARISON, KEY, MlflowTracker

__all__ = ["COMPARISON", "IDENTITY", "KEY", "MlflowTracker", "store_uri"]
