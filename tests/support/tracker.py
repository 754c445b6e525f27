"""A tracker of one's own: a class with a tracker's methods, and no more."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from modelstock.tracking.history import read_history
from modelstock.tracking.tracker import Measurements


class Recorder:
    """Remembers what it is sent, for all of its instances."""

    live_rows: ClassVar[dict[str, list[dict[str, Any]]]] = {}  # by the name of the run
    metrics: ClassVar[dict[str, Mapping[str, Mapping[str, float]]]] = {}
    aliases: ClassVar[dict[str, str | None]] = {}

    def __init__(self, root: Path, experiment: str) -> None:
        self.root, self.experiment = root, experiment

    def live(self, *, key: str, name: str, params: Mapping[str, Any], history: Path) -> str:
        if history.exists():
            self.live_rows[name] = read_history(history)
        return name

    def record(self, weights: Path, *, name: str, measurements: Measurements, **facts: Any) -> str:
        self.metrics[name] = measurements.metrics
        return name

    def record_scores(self, identity: str, *, name: str, measurements: Measurements, **facts: Any) -> str:
        self.metrics[name] = measurements.metrics
        return name

    def register(self, identity: str, *, model_name: str, alias: str | None = None) -> str:
        self.aliases[identity] = alias
        return identity
