"""Processes that work for another, and end with it."""

import os
import signal
import threading
from multiprocessing import parent_process


def follow_parent(number: int = 0) -> None:
    """In a worker: end when the process that started it is killed, and leave Ctrl-C to it.

    torch's own loader workers ask who their parent is once they run: one whose parent was killed before would wait for
    work for ever. `number`: of the worker, which does not matter.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
