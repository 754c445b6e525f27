"""Turns on a device, for what does not fit it together: the next turn's is built while the present turn's runs."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Self, TypeVar

Source = TypeVar("Source")
Built = TypeVar("Built")


class Turns(Generic[Source, Built]):
    """What `build` makes of each source, of which at most `most` are there at a time.

    All of them at once where they are no more than that. Else in turns of half as many: while one turn is in use, a
    thread builds the next, and nothing further ahead. Where `most` is 1, each is built when its turn comes.

    A context manager: however it is left, the thread ends then, once it has built what it is at.
    """

    def __init__(self, sources: Sequence[Source], build: Callable[[Source], Built], *, most: int) -> None:
        size = len(sources) if most >= len(sources) else max(1, most // 2)
        self._turns = [sources[i : i + size] for i in range(0, len(sources), size)]
        self._build, self._ahead = build, most >= 2
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="next turn")
        self._present: list[Built] = []

    @property
    def together(self) -> bool:
        """Whether all are there at once."""
        return len(self._turns) == 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._present.clear()

    def __iter__(self) -> Iterator[Sequence[Built]]:
        """What was built for one turn after the other; each is emptied when the next one is asked for.

        The last turn's is kept, and is the first of the next iteration: turns go back and forth. What `build` raises,
        in the thread or not, is raised here when its turn comes.
        """
        self._present = self._present or [self._build(source) for source in self._turns[0]]
        for following in self._turns[1:]:
            ahead = [self._thread.submit(self._build, source) for source in following] if self._ahead else []
            yield self._present
            self._present.clear()  # the caller still has a name for it
            self._present = [future.result() for future in ahead] or [self._build(source) for source in following]
        yield self._present
        self._turns.reverse()
