"""How far a run of stages is, and how long it will take by the times of the last run, in one line per stage.

The times are those of this machine: a file that git and DVC ignore, and that nothing depends on.
"""

import json
import math
import re
import threading
import time
from contextlib import suppress
from pathlib import Path

from flows.graph import Plan, kind_of
from modelstock.errors import ModelstockError
from modelstock.files import write_json
from modelstock.progress import duration

# What DVC says of a stage that it does not run.
SKIPS = re.compile(r"(?:Stage )?'(.+)' (?:didn't change, skipping|is cached - skipping run, checking out outputs)")
TIMES = Path(".dvc/tmp/stage-times.json")  # stage -> seconds of the last time that it ran to its end


def read_times(path: Path) -> dict[str, float]:
    """The stages' times in seconds; none where there is no such file, or a damaged one."""
    try:
        times = json.loads(path.read_bytes())
        return {str(name): float(s) for name, s in times.items() if math.isfinite(s) and s >= 0}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


class Progress:
    """Follows a run of the planned stages, of which `slots` run at once; its methods may be called by any thread."""

    def __init__(self, plan: Plan, path: Path = TIMES, *, slots: int = 1) -> None:
        self._plan, self._path, self._slots = plan, path, slots
        self._times = read_times(path)
        self._began = time.monotonic()
        self._seen: dict[str, None] = {}  # stages that were started, skipped or restored, in that order
        self._running: dict[str, float] = {}  # stage -> its start
        self._lock = threading.Lock()

    def skipped(self, name: str) -> None:
        """A stage is up to date, or its outputs come from the cache."""
        with self._lock:
            self._seen[name] = None

    def started(self, name: str) -> str:
        """A stage begins; gives the line that says so."""
        with self._lock:
            now = time.monotonic()
            self._seen[name] = None
            self._running[name] = now
            number, total = len(self._seen), max(len(self._plan.needs), len(self._seen))
            elapsed = duration(now - self._began)
            return f"stage {number} of {total}: {name}, {elapsed} elapsed, {self._left(now)}"

    def ended(self, name: str, *, whole: bool) -> None:
        """A stage has ended; `whole`: it ran to its end, and the next run's estimates rest on its time."""
        with self._lock:
            seconds = time.monotonic() - self._running.pop(name)
            if not whole:
                return
            self._times[name] = round(seconds, 1)
            with suppress(OSError, ModelstockError):  # a full disk stops no run here
                write_json(self._path, self._times)

    def _left(self, now: float) -> str:
        """What remains: all that must run and has not, spread evenly over the slots; at least the longest of it."""
        waiting = [name for name in self._plan.dirty if name not in self._seen]
        left = {name: self._estimate(name) for name in (*waiting, *self._running)}
        known = [
            max(0.0, seconds - (now - self._running.get(name, now)))
            for name, seconds in left.items()
            if seconds is not None
        ]
        if not known:
            return "no estimate yet"
        unknown = len(left) - len(known)
        text = duration(max(max(known), sum(known) / self._slots), rough=True)
        if not unknown:
            return f"about {text} left"
        return f"at least {text} left, {unknown} {'stage' if unknown == 1 else 'stages'} never timed"

    def _estimate(self, name: str) -> float | None:
        """The stage's last time, or the mean of its siblings', as finetune@1 is of finetune@0; None: not known."""
        if name in self._times:
            return self._times[name]
        siblings = [seconds for other, seconds in self._times.items() if kind_of(other) == kind_of(name)]
        return sum(siblings) / len(siblings) if siblings else None
