"""When trainings began and ended, kept in scratch: files whose bytes repeat carry no times, and trackers show them."""

import json
import time
from contextlib import suppress
from pathlib import Path

from modelstock.tracking.tracker import Times

FOLDER = Path("scratch/times")  # also of a stage whose resume points are kept elsewhere


def times_of(key: str) -> Times:
    """The times of a training on this machine; none where it was trained elsewhere, or they were cleaned away."""
    try:
        kept = json.loads(_file(key).read_bytes())
        return Times(began=int(kept["began"]), ended=kept["ended"] and int(kept["ended"]))
    except (OSError, ValueError, LookupError, TypeError):
        return Times()


def note_began(key: str) -> Times:
    """A training begins, or goes on after it was stopped."""
    known = times_of(key)
    times = known if known.began and not known.ended else Times(began=now_ms())
    return _keep(key, times)


def note_ended(key: str) -> Times:
    """A training has ended."""
    return _keep(key, Times(began=times_of(key).began or now_ms(), ended=now_ms()))


def _keep(key: str, times: Times) -> Times:
    # Of no use to the training: half a file counts as none, and a disk that is full stops it elsewhere.
    with suppress(OSError):
        FOLDER.mkdir(parents=True, exist_ok=True)
        _file(key).write_text(json.dumps({"began": times.began, "ended": times.ended}))
    return times


def _file(key: str) -> Path:
    return FOLDER / f"{key}.json"


def now_ms() -> int:
    """Milliseconds since 1970."""
    return int(time.time() * 1000)
