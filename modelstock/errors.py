"""The errors a user can meet.

ModelstockError            every one of them: say place, got, expected, cure in one line
├── ParamsError            params.yaml or a command-line option
├── DataError              shards, manifests, images
├── WeightsError           a checkpoint file, or a tensor in it
├── MergeError             weight sets that cannot be merged, or a method that cannot do it
├── TrainingError          a run that cannot go on (non-finite loss, a resume point that does not fit)
├── RoomError              a disk that is full, a quota or a limit of file sizes that is reached
├── BusyError              another job is at work in the same place
├── DamagedError           a file of ours whose content is not what it was written with
└── TrackingError          the MLflow server or its store

AskedToEnd is none of them: nothing is wrong.
"""

import difflib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

# What stands before a host (`user:password@`), and what a query calls a secret.
IN_URL = re.compile(r"(?<=://)(?!/)[^\s'\"<>]*@")
IN_QUERY = re.compile(
    r"(?<=[?&])([\w.%-]*(?:password|passwd|pwd|secret|token|key|signature|credential|sig)[\w.%-]*=)[^\s&'\"<>]*",
    re.IGNORECASE,
)


def redacted(text: object) -> str:
    """A text without the user names, passwords and keys that the URLs in it carry."""
    return IN_QUERY.sub(r"\1***", IN_URL.sub("***@", str(text)))


class ModelstockError(Exception):
    """One line that names the place, what was found there, what belongs there, and the cure; no URL's password."""

    def __init__(self, place: object, *, got: object, expected: object, cure: str) -> None:
        place, got, expected, cure = (redacted(part) for part in (place, got, expected, cure))
        super().__init__(_one_line(f"{place}: got {got}; expected {expected}; {cure}"))
        self.place, self.got, self.expected, self.cure = place, got, expected, cure

    def __reduce__(self) -> Any:
        """Errors cross from one process to another."""
        return partial(type(self), got=self.got, expected=self.expected, cure=self.cure), (self.place,)


class ParamsError(ModelstockError):
    """A parameter is misspelt, missing or out of range."""


class DataError(ModelstockError):
    """A shard, a manifest or an image is missing or damaged."""


class WeightsError(ModelstockError):
    """A checkpoint is missing, damaged, or holds what cannot be weights."""


class MergeError(ModelstockError):
    """Weight sets do not fit together, or the method cannot merge them."""


class TrainingError(ModelstockError):
    """Training cannot go on."""


class RoomError(ModelstockError):
    """There is no room for a file; nothing half-written is left."""


class DamagedError(ModelstockError):
    """A file of ours does not have the checksum it was written with. `place` is its path."""


class BusyError(ModelstockError):
    """Another job is at work in the same place."""


class TrackingError(ModelstockError):
    """The tracking server or its store cannot be reached or refuses."""


class AskedToEnd(Exception):
    """Work that was asked to end has saved what it has, and ends; see modelstock.stopping. `saved`: how far it is."""

    def __init__(self, saved: str) -> None:
        super().__init__(saved)

    def __str__(self) -> str:
        return f"asked to end: saved {self.args[0]}; run it again to go on"


def _one_line(text: str) -> str:
    """Control characters, which a file's name may have, as their escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] if ord(c) < 0xA0 else c for c in text)


def few(names: Sequence[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def closest(name: str, known: Sequence[str]) -> str | None:
    """The known name that is most like `name`, in letters of either case, if one is like it at all."""
    lower = {other.lower(): other for other in reversed(known)}
    matches = difflib.get_close_matches(name.lower(), lower, 1)
    return lower[matches[0]] if matches else None


def nearest(name: str, known: Sequence[str]) -> str:
    """A cure for a name that is not known."""
    near = closest(name, known)
    return f"did you mean {near}?" if near else "choose one of these"
