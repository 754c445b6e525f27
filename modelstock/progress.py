"""Progress of long work on stderr: a bar in a terminal; in a log or a pipe a short line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY_S = 30.0
LINE_WIDTH = 99
_paused: "dict[str, Lines]" = {}  # by name: what stopped before its total and may go on in another `Lines`


def duration(seconds: float, *, rough: bool = False) -> str:
    """A time as people say it, `42 s`, `1 min 20 s` or `2 h 5 min`; `rough`: an estimate, with no false digits."""
    if rough:
        step = next((s for limit, s in ((20, 1), (120, 10), (3600, 60)) if seconds < limit), 300)
        seconds = max(1, round(seconds / step) * step)
    whole = round(seconds)
    if whole < 3600:
        parts = [(whole // 60, "min"), (whole % 60, "s")]
    else:
        parts = [(whole // 3600, "h"), (whole % 3600 // 60, "min")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


class Lines:
    """What a bar shows, as lines on stderr: at most one in `LINE_EVERY_S` seconds, and with `leave` one at the end.

    It has the part of tqdm's interface that is used here. One that goes on where the last of its name stopped, as of
    seeds that are trained in turns, has that one's clock.
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        total: float | None = None,
        initial: float = 0,
        desc: str = "",
        unit: str = "it",
        leave: bool = True,
        disable: bool = False,
        **for_bars_only: Any,
    ) -> None:
        self.n = initial
        self.total = len(iterable) if total is None and isinstance(iterable, Sized) else total
        self._iterable, self._desc, self._unit, self._leave = iterable, desc, unit, leave
        self._silent, self._shown = disable, -1.0  # the count in the last line
        self._initial, self._began = initial, time.monotonic()
        self._written = self._began
        before = _paused.pop(desc, None)
        if before is not None and before.n == initial > 0:
            self._initial, self._began, self._written = before._initial, before._began, before._written

    def __iter__(self) -> Iterator[Any]:
        assert self._iterable is not None
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Count `n` more as done."""
        self.n += n
        if time.monotonic() - self._written >= LINE_EVERY_S:
            self._write()

    def close(self) -> None:
        """The end, also of what was interrupted."""
        if self._leave and self._shown != self.n:
            self._write()
        if not self._leave and self.total and self.n < self.total:
            _paused[self._desc] = self
        self._silent = True

    def _write(self) -> None:
        if self._silent:
            return
        self._written, self._shown = time.monotonic(), self.n
        seconds, done = self._written - self._began, self.n - self._initial
        text = f"{self.n:,.0f}" + (f" of {self.total:,.0f}" if self.total else "") + f" {self._unit}s"
        text += f", {duration(seconds)} elapsed"
        if self.total and done > 0 and self.n < self.total:
            text += f", about {duration(seconds / done * (self.total - self.n), rough=True)} left"
        name = f"{self._desc[: LINE_WIDTH - len(text) - 2]}: " if self._desc else ""
        try:
            print(name + text, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads stderr any more: no reason to stop the work
            self._silent = True


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> "tqdm[Any] | Lines":
    """tqdm(iterable, **options) where stderr is a terminal, else `Lines`."""
    if not sys.stderr.isatty():
        return Lines(iterable, **options)
    from tqdm import tqdm

    return tqdm(iterable, **options)
