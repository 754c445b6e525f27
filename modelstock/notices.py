"""Notices: what differs from what a user would assume, and is not refused.

Each is one line that names place and cause. It is a Python warning for who calls the library; commands and stages
print it as `notice: ...` on stderr; what is written while it was given carries it in its metadata, so that a comparison
can list everything unusual that it rests on. What makes a result wrong is refused instead: see modelstock.errors.
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from modelstock.errors import redacted

_collecting: ContextVar[tuple[list[str], ...]] = ContextVar("collecting", default=())


class Notice(UserWarning):
    """Something unusual that a result rests on."""


def notice(place: object, text: str) -> None:
    """Give a notice: `place` is the file, tensor or setting it is about."""
    line = redacted(" ".join(f"{place}: {text}".split()))
    for lines in _collecting.get():
        if line not in lines:
            lines.append(line)
    warnings.warn(line, Notice, stacklevel=3)


def remark(place: object, text: str) -> None:
    """A notice that no result rests on, such as what a resumed run found: given, and not collected."""
    warnings.warn(" ".join(f"{place}: {text}".split()), Notice, stacklevel=3)


def repeat(lines: Iterable[str]) -> None:
    """Give notices again that were kept with what is read now."""
    for line in lines:
        place, _, text = line.partition(": ")
        notice(place, text)


@contextmanager
def collected(lines: list[str] | None = None) -> Iterator[list[str]]:
    """The notices that this thread gives in the block, each once, in `lines`; blocks around it collect them too."""
    lines = [] if lines is None else lines
    token = _collecting.set((*_collecting.get(), lines))
    try:
        yield lines
    finally:
        _collecting.reset(token)


def so_far() -> list[str]:
    """What the outermost `collected` block has collected."""
    around = _collecting.get()
    return list(around[0]) if around else []


@contextmanager
def printed() -> Iterator[None]:
    """For commands and stages: notices are lines on stderr, each once, and `so_far` has them."""
    shown: set[str] = set()
    with warnings.catch_warnings(), collected():
        warnings.simplefilter("always", Notice)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, Notice):
                usual(message, category, *place, **more)
            elif str(message) not in shown:
                shown.add(str(message))
                print(f"notice: {message}", file=sys.stderr)

        warnings.showwarning = show
        yield
