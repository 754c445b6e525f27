"""Items made by a thread before they are asked for, so that making one takes no time from the work between two."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
_AHEAD = 2


def _gpu() -> int | None:
    """This thread's GPU, where one is in use."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]


def _use_gpu(number: int | None) -> None:
    """Make it this thread's too; a new thread's is the first, whatever that of others."""
    if number is not None:
        torch.cuda.set_device(number)


def made_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The items in their order, the next two made while the present one is used.

    Making one must not use torch's global generators, which the caller's thread draws from meanwhile. What it raises is
    raised when that item is asked for. Closed, or left by an error, the generator waits for the item that is being
    made, and its thread ends.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=_use_gpu, initargs=(_gpu(),)) as maker:
        made: deque[Future[Item | None]] = deque()
        try:
            made.extend(maker.submit(next, items, None) for _ in range(1 + _AHEAD))
            while (item := made.popleft().result()) is not None:
                yield item
                made.append(maker.submit(next, items, None))
        finally:
            for future in made:
                future.cancel()
