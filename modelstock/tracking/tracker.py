"""What a tracker is. One more tracker is a class with these methods and a row in `TRACKERS`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from modelstock.errors import TrackingError, nearest

# Name -> "module:class"; a module is imported when its tracker is opened. The class is called with (root, experiment).
TRACKERS = {"mlflow": "modelstock.tracking.mlflow:MlflowTracker", "none": "modelstock.tracking.tracker:NullTracker"}


@dataclass(frozen=True, kw_only=True)
class Times:
    """When a training began and ended, in milliseconds since 1970; None where that is not known."""

    began: int | None = None
    ended: int | None = None


UNKNOWN = Times()


@dataclass(frozen=True, kw_only=True)
class TrackedRow:
    """One row of a comparison.

    `metrics`: benchmark -> metric -> value; `summary`: metric -> value, over benchmarks, each with its interval's ends
    as `<metric>_low` and `<metric>_high`. `params`: what tells rows apart. `weights`: the row's file; None for what
    has scores but no weights, such as an ensemble. `training`: the key of the training that made the weights, if one
    did. `shown`: among those that a table of all methods shows. `aliases`: of its version among the models that
    somebody may ship; without one, it is no version. `description`: one sentence.
    """

    name: str
    identity: str
    metrics: Mapping[str, Mapping[str, float]]
    summary: Mapping[str, float]
    params: Mapping[str, str]
    description: str
    weights: Path | None = None
    dvc_md5: str | None = None
    training: str | None = None
    shown: bool = True
    aliases: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class TrackedTraining:
    """A training that has ended. `key`: names it as in `live`; `history`: its `history.jsonl`."""

    key: str
    name: str
    params: Mapping[str, Any]
    history: Path
    times: Times = UNKNOWN


@dataclass(frozen=True, kw_only=True)
class TrackedComparison:
    """A comparison and everything that it is of.

    `datasets`: benchmark -> sha256 of its data; `held_out` and `held_out_shifts`: the benchmarks whose data are for
    validation, all others being for tests. `files`: the report's. `note`: Markdown. `precision`: of the towers when
    they were scored.
    """

    rows: Sequence[TrackedRow]
    trainings: Sequence[TrackedTraining]
    datasets: Mapping[str, str]
    held_out: str
    params: Mapping[str, Any]
    files: Sequence[Path]
    note: str
    model_name: str
    precision: str = "float32"
    held_out_shifts: Sequence[str] = ()


class Tracker(Protocol):
    """Where runs are shown. A call may be repeated: what is there already is not added again.

    Each raises TrackingError where the tracker does not answer; training and comparing go on without it.
    """

    def live(self, *, key: str, name: str, params: Mapping[str, Any], history: Path, times: Times = UNKNOWN) -> None:
        """The rows so far of a training's growing `history.jsonl`. `key` names the training; `times.ended`: it has."""

    def record(self, comparison: TrackedComparison) -> Sequence[str]:
        """A whole comparison, with its trainings. Returns lines that say where it is shown."""


class NullTracker:
    """A tracker that tracks nothing."""

    def __init__(self, root: Path | None = None, experiment: str = "") -> None:
        pass

    def live(self, *, key: str, name: str, params: Mapping[str, Any], history: Path, times: Times = UNKNOWN) -> None:
        """Nothing."""

    def record(self, comparison: TrackedComparison) -> Sequence[str]:
        """Nothing."""
        return []


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
    """A training's params from what made its weight set: one per option, and members as in its name."""
    params = {name: value for name, value in made_by.items() if name not in ("options", "key", "members")}
    params |= {f"options.{name}": value for name, value in made_by.get("options", {}).items()}
    if "members" in made_by:
        params["members"] = "-".join(map(str, made_by["members"]))
    return params
