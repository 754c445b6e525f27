"""A training job: resumable under scratch/ while it runs, mirrored by a tracker, and gone once its outputs are written.

A job's folder is named for everything that its bytes depend on. Killed at any moment, also between its outputs and
the removal of its folder, and run again, it ends with the same bytes.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from modelstock.devices import deterministic, device_model
from modelstock.files import SCRATCH, project
from modelstock.params import LoadingParams, TrackingParams
from modelstock.provenance import key_of
from modelstock.tracking.mirror import Mirror
from modelstock.tracking.tracker import NullTracker, Tracker, open_tracker, params_of
from modelstock.training.distributed import ALONE, World, processes
from modelstock.weights.origin import kept_notices, made_by, notices_of
from modelstock.weights.weight_set import WeightSet


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where jobs run. The bytes depend on `threads`, the device's kind and its model; `workers` make batches ahead."""

    world: World = ALONE
    threads: int = 1
    workers: int = 0
    tracker: Callable[[], Tracker] = NullTracker

    @property
    def device(self) -> str:
        """The device's kind, "cuda" or "cpu"."""
        return self.world.device.type


@contextmanager
def setting(
    stage: str, *, devices: int, device: str, threads: int, loading: LoadingParams, tracking: TrackingParams
) -> Iterator[Setting]:
    """This process's setting among `devices` that run the module `stages.<stage>` together; the first one is tracked.

    Raises:
        ParamsError: see modelstock.training.distributed.processes.
    """
    deterministic(threads)
    with processes(devices, device, f"stages.{stage}") as world:
        tracker: Callable[[], Tracker] = partial(open_tracker, tracking.tracker, project(), tracking.experiment)
        yield Setting(
            world=world, threads=threads, workers=loading.workers, tracker=NullTracker if world.rank else tracker
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training. `made_by`: stage, seed or members, and options, for the metadata of its weight sets.

    `code`: the module that trains. `facts`: what its bytes depend on besides its code, `made_by`, threads and device.
    `notices`: given while it trains, which its weight sets keep.
    """

    name: str
    made_by: Mapping[str, Any]
    code: str
    facts: Mapping[str, str] = field(default_factory=dict)
    setting: Setting = field(default_factory=Setting)
    notices: list[str] = field(default_factory=list)

    @cached_property
    def key(self) -> str:
        """The name of everything that the job's bytes depend on."""
        device = self.setting.device
        machine = {"threads": self.setting.threads, "device": device, "model": device_model(device)}
        return key_of(self.code, self.made_by, self.facts, machine)

    @property
    def folder(self) -> Path:
        """Where the job keeps what a killed run goes on from, and its growing `history.jsonl`."""
        return SCRATCH / str(self.made_by["stage"]) / self.key

    def mirror(self) -> Mirror:
        """The live mirror of the growing history; left before `finish`, it has sent the last rows."""
        history = self.folder / "history.jsonl"
        return Mirror(self.setting.tracker, history, key=self.key, name=self.name, params=params_of(self.made_by))

    def weight_set(
        self, anchor: WeightSet, tensors: Mapping[str, NDArray[Any]], changes: Mapping[str, Any] | None = None
    ) -> WeightSet:
        """Tensors that the job made from the anchor; `changes`: of `made_by`, for what is not its final result."""
        origin = made_by(**{**self.made_by, **({"key": self.key} if changes is None else changes)})
        meta = {**anchor.meta, "parents": [anchor.identity], "made_by": origin}
        return WeightSet(tensors, {**meta, **kept_notices(notices_of(anchor.meta), self.notices)}, self.name)

    def finish(self) -> None:
        """Remove the folder, its outputs being written: the same job run again trains again."""
        finished = self.folder.with_name(f"{self.folder.name}.finished")
        shutil.rmtree(finished, ignore_errors=True)
        os.replace(self.folder, finished)  # first at once: half a resume point would be worse than none
        shutil.rmtree(finished)
