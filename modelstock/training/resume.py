"""Resume points: what a killed run goes on from, written now and then, whole or not at all."""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from modelstock.errors import TrainingError
from modelstock.files import atomic_path
from modelstock.tracking.history import write_rows
from modelstock.training.loop import Callback, Run

SAVE_EVERY_S = 20.0  # a resume point of the tiny tower takes 0.03 s
SAVE_SHARE = 0.02  # at most this share of the time goes into resume points, however large the model


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a resume point, whole or not at all."""
    # What a killed process left half-written is of no use, and may be large.
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    with atomic_path(path) as temporary:
        torch.save(dict(state), temporary)


def read_state(path: Path) -> dict[str, Any]:
    """Read a resume point; nothing in it is executed.

    Raises:
        TrainingError: a damaged file.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise TrainingError(
            path,
            got=f"{path.stat().st_size} bytes that are no resume point ({re.split(r'[.:]', str(error))[0]})",
            expected="a whole file",
            cure="remove it: the run then starts at its first step and ends with the same bytes",
        ) from error
    return state


class Clock:
    """Knows when the next resume point is due: `SAVE_EVERY_S` after the last, and `SAVE_SHARE` of the time at most."""

    def __init__(self) -> None:
        self._done, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._done > max(SAVE_EVERY_S, self._cost / SAVE_SHARE if SAVE_EVERY_S > 0 else 0)

    def time(self, save: Callable[[], None]) -> None:
        """Save, and remember what it cost."""
        begun = time.monotonic()
        save()
        self._done = time.monotonic()
        self._cost = self._done - begun


class ResumePoint(Callback):
    """Writes `state.pt` and `history.jsonl` to a folder now and then and at the end. It must be the last callback."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._clock = folder, Clock()

    def resume(self, run: Run) -> None:
        """Go on from the folder's resume point, where there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        point = self.folder / "state.pt"
        if point.exists():
            run.load_state(read_state(point))
        # No process goes on, and so none can finish and remove the point, before all have read it.
        run.world.barrier()
        if run.world.rank == 0:
            write_rows(self.folder / "history.jsonl", run.history)

    def after_step(self, run: Run) -> None:
        """Save, where it is time; of several processes, the first saves what all of them hold."""
        if run.world.rank == 0 and (run.step == run.steps or self._clock.due()):
            self._clock.time(lambda: self.save(run))

    def save(self, run: Run) -> None:
        """Write the state first, then the history, which others follow while a run trains."""
        write_state(self.folder / "state.pt", run.state())
        write_rows(self.folder / "history.jsonl", run.history)
        run.saved_step = run.step
