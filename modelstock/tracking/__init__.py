"""Trackers: where runs, their metrics and their weights are shown. Files are the record, a tracker is their mirror.

tracker.py  the protocol, the tracker that tracks nothing, and the table of trackers by name
mlflow.py   MLflow; the only file that imports mlflow
mirror.py   sends a growing history while a run trains
replay.py   sends a whole comparison, as often as one likes
history.py  a run's history on disk
"""

from modelstock.tracking.mirror import Mirror
from modelstock.tracking.replay import Record, replay
from modelstock.tracking.tracker import TRACKERS, Measurements, NullTracker, Tracker, open_tracker

__all__ = ["TRACKERS", "Measurements", "Mirror", "NullTracker", "Record", "Tracker", "open_tracker", "replay"]
