"""The live mirror: a growing history, sent to a tracker while the run trains."""

import threading
from collections.abc import Callable, Mapping
from contextvars import Context
from pathlib import Path
from types import TracebackType
from typing import Any

from modelstock.notices import notice
from modelstock.tracking.times import note_began, note_ended
from modelstock.tracking.tracker import Times, Tracker

AFTER_S = 30.0  # opening a tracker costs seconds of processor time
PATIENCE_S = 10


class Mirror:
    """Sends a growing history to a tracker every few seconds while the block trains; never lets an error reach it.

    `tracker` is opened by the mirror's own thread, once the block has lasted `AFTER_S`; a shorter run is there when the
    stage `compare` sends it. The first failure is one notice, later ones are silent: what was missed is sent by
    `compare`. When the block has ended, the last rows are sent; a tracker that has not taken them after `PATIENCE_S` is
    left behind. Notices are printed and not kept: the results are the same without.
    """

    def __init__(
        self,
        tracker: Callable[[], Tracker],
        history: Path,
        *,
        key: str,
        name: str,
        params: Mapping[str, Any],
        every_s: float = 5.0,
    ) -> None:
        self._tracker, self._history, self._every_s = tracker, history, every_s
        self._key, self._name, self._params = key, name, dict(params)
        self._stop, self._left, self._times = threading.Event(), False, Times()
        self._thread = threading.Thread(target=self._follow, name="mirror", daemon=True)

    def __enter__(self) -> "Mirror":
        self._times = note_began(self._key)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._times = note_ended(self._key)
        self._stop.set()
        self._thread.join(timeout=PATIENCE_S)
        if self._thread.is_alive():
            self._left = True
            text = f"the tracker has not answered for {PATIENCE_S} s; `dvc repro -s -f compare` sends what it lacks"
            Context().run(notice, self._name, text)  # outside of what collects notices

    def _follow(self) -> None:
        try:
            if self._stop.wait(AFTER_S):
                return
            tracker, last = self._tracker(), False
            while not last:
                last = self._stop.wait(self._every_s)
                tracker.live(
                    key=self._key, name=self._name, params=self._params, history=self._history, times=self._times
                )
        except Exception as error:
            if not self._left:
                notice(error, "training goes on")
