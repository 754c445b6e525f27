"""Resume points: what a killed run goes on from, written now and then, whole or not at all.

A point ends with the sha256 of what it holds and of whose it is, and the one before it is kept: of a point that was
damaged, or belongs to another run, no number is taken, and nobody has to remove it.
"""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from modelstock.errors import AskedToEnd
from modelstock.files import atomic_path
from modelstock.notices import remark
from modelstock.stopping import asked_to_end, may_be_asked
from modelstock.tracking.history import write_rows
from modelstock.training.loop import Callback, DamagedPoint, Run

SAVE_EVERY_S = 20.0  # a resume point of the tiny tower takes 0.03 s
SAVE_SHARE = 0.02  # at most this share of the time goes into resume points, however large the model
_DIGEST = hashlib.sha256().digest_size


class _Hashed:
    """A file for torch to write to, which hashes what passes through."""

    def __init__(self, file: IO[bytes], of: str) -> None:
        self._file, self.sha256 = file, hashlib.sha256(of.encode())

    def write(self, data: bytes) -> int:
        """Write and hash."""
        self.sha256.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Pass it on."""
        self._file.flush()


def write_state(path: Path, state: Mapping[str, Any], *, of: str) -> None:
    """Write a resume point, whole or not at all. `of`: whose it is.

    Raises:
        RoomError: a full disk.
    """
    # What a killed process left half-written is of no use, and may be large.
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        hashed = _Hashed(file, of)
        torch.save(dict(state), hashed)  # type: ignore[arg-type]
        file.write(hashed.sha256.digest())


def read_state(path: Path, *, of: str) -> dict[str, Any]:
    """Read the resume point of `of`; nothing in it is executed.

    Raises:
        FileNotFoundError: there is none.
        DamagedPoint: it is not what was written for `of`.
    """
    try:
        with open(path, "rb") as file:
            _check(file, of)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedPoint(error.strerror) from error
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def _check(file: IO[bytes], of: str) -> None:
    """Raise DamagedPoint unless the last bytes of a file are the sha256 of `of` and of all before them."""
    left, digest = os.fstat(file.fileno()).st_size - _DIGEST, hashlib.sha256(of.encode())
    while left > 0 and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    if left or file.read() != digest.digest():
        raise DamagedPoint("not the bytes that this run wrote")


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
    """Writes `state.pt` and `history.jsonl` to a folder now and then and at the end. It must be the last callback.

    The point before is kept as `previous.pt`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._clock = folder, Clock()

    def resume(self, run: Run) -> None:
        """Go on from the folder's last resume point that is what was written, where there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        points = [self.folder / "state.pt", self.folder / "previous.pt"]
        damaged = []
        for point in points:
            try:
                state = read_state(point, of=self._name(run))
                run.check_state(state)
            except FileNotFoundError:
                continue
            except DamagedPoint as error:
                damaged.append((point, str(error)))
                continue
            run.load_state(state)
            break
        # No process goes on, and so none can finish and remove the point, before all have read it.
        run.world.barrier()
        if run.world.rank == 0:
            for point, wrong in damaged:
                remark(point, f"not used: {wrong}; the run goes on from step {run.step}, to the same end")
                point.unlink(missing_ok=True)
            write_rows(self.folder / "history.jsonl", run.history)

    def after_step(self, run: Run) -> None:
        """Save, where it is time; of several processes, the first saves what all of them hold.

        Raises:
            AskedToEnd: this process or another one was asked to end, before the last step; all of them end.
        """
        # Processes agree on it after the same step; where nobody can ask, that costs them nothing.
        ends = run.step < run.steps and may_be_asked() and run.world.any(asked_to_end())
        if run.world.rank == 0 and (ends or run.step == run.steps or self._clock.due()):
            self._clock.time(lambda: self.save(run))
        if ends:
            run.world.barrier()
            raise AskedToEnd(f"at step {run.step} of {run.steps}")

    def save(self, run: Run) -> None:
        """Write the state first, then the history, which others follow while a run trains."""
        point = self.folder / "state.pt"
        new = self.folder / "next.pt"
        write_state(new, run.state(), of=self._name(run))
        if point.exists():
            os.replace(point, self.folder / "previous.pt")
        os.replace(new, point)
        write_rows(self.folder / "history.jsonl", run.history)
        run.saved_step = run.step

    def _name(self, run: Run) -> str:
        """Whose point it is: the job's key is its folder's name."""
        return f"{self.folder.name}/{run.name}"
