"""What a tracker is. One more tracker is a class with these methods and a row in `TRACKERS`."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from modelstock.errors import TrackingError, nearest

# Name -> "module:class"; a module is imported when its tracker is opened. The class is called with (root, experiment).
TRACKERS = {"mlflow": "modelstock.tracking.mlflow:MlflowTracker", "none": "modelstock.tracking.tracker:NullTracker"}


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """What was measured of one row of a comparison.

    `metrics`: benchmark -> metric -> value; `datasets`: benchmark -> sha256 of its data; `held_out`: the benchmark
    whose data are for validation, all others being for tests.
    """

    metrics: Mapping[str, Mapping[str, float]]
    datasets: Mapping[str, str]
    held_out: str = "held-out"


class Tracker(Protocol):
    """Where runs are shown. A call may be repeated: what is there already is not added again.

    Methods return the run's name in the tracker, `register` that of the version. Each raises TrackingError where the
    tracker does not answer; training and comparing go on without it.
    """

    def live(self, *, key: str, name: str, params: Mapping[str, Any], history: Path) -> str:
        """While a run trains: the rows so far of its growing `history.jsonl`. `key` names the training."""

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
        """A finished weight set; its metadata say what made it. `key`: of the training that `live` has shown."""

    def record_scores(
        self,
        identity: str,
        *,
        name: str,
        measurements: Measurements,
        tags: Mapping[str, str],
        params: Mapping[str, Any],
    ) -> str:
        """What has scores but no weights of its own, such as a logit ensemble."""

    def register(self, identity: str, *, model_name: str, alias: str | None = None) -> str:
        """A recorded weight set as a version of the model `model_name`; `alias` then points to it."""


class NullTracker:
    """A tracker that tracks nothing."""

    def __init__(self, root: Path | None = None, experiment: str = "") -> None:
        pass

    def live(self, *, key: str, name: str, params: Mapping[str, Any], history: Path) -> str:
        """Nothing."""
        return ""

    def record(self, weights: Path, *, name: str, **facts: Any) -> str:
        """Nothing."""
        return ""

    def record_scores(self, identity: str, *, name: str, **facts: Any) -> str:
        """Nothing."""
        return ""

    def register(self, identity: str, *, model_name: str, alias: str | None = None) -> str:
        """Nothing."""
        return ""


def open_tracker(kind: str, root: Path, experiment: str) -> Tracker:
    """The tracker of this name: a row of `TRACKERS`. `root`: where local ones keep their files.

    Raises:
        TrackingError: no such tracker, its library is not installed, or it does not answer.
    """
    if kind not in TRACKERS:
        raise TrackingError(
            "tracking.tracker", got=kind, expected=" or ".join(TRACKERS), cure=nearest(kind, list(TRACKERS))
        )
    module, _, name = TRACKERS[kind].partition(":")
    tracker: Tracker = getattr(import_module(module), name)(root, experiment)
    return tracker


def params_of(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """A run's params from what made its weight set: one per option, and members as in its name."""
    params = {name: value for name, value in made_by.items() if name not in ("options", "key", "members")}
    params |= {f"options.{name}": value for name, value in made_by.get("options", {}).items()}
    if "members" in made_by:
        params["members"] = "-".join(map(str, made_by["members"]))
    return params
