"""Trackers: where runs, their metrics and their weights are shown. Files are the record, a tracker is their mirror.

tracker.py  the protocol, what a tracker is sent, and the table of trackers by name
mlflow/     MLflow; the only package that imports mlflow
mirror.py   sends a growing history while a run trains
lineage.py  the git commit, and DVC's hashes
times.py    when trainings began and ended
history.py  a run's history on disk
"""

from modelstock.tracking.mirror import Mirror
from modelstock.tracking.tracker import (
    TRACKERS,
    NullTracker,
    Times,
    TrackedComparison,
    TrackedRow,
    TrackedTraining,
    Tracker,
    open_tracker,
)

__all__ = [
    "TRACKERS",
    "Mirror",
    "NullTracker",
    "Times",
    "TrackedComparison",
    "TrackedRow",
    "TrackedTraining",
    "Tracker",
    "open_tracker",
]
