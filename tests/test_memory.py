"""In a pass, malloc keeps large blocks that are freed; afterwards it gives them back, and all that it had kept.

Each check asks the C library itself, in a process of its own: what a heap looks like depends on all that came before.
"""

import ctypes
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from modelstock.scoring import memory
from modelstock.scoring.memory import memory_kept

MIB = 1 << 20
PAGES = MIB // resource.getpagesize()  # per MiB
glibc = pytest.mark.skipif(memory._glibc() is None, reason="no glibc")


def in_a_fresh_process(function, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Block:
    """A block of malloc's, each of its bytes written."""

    def __init__(self, mebibytes):
        self.library = ctypes.CDLL(None)
        self.library.malloc.restype = ctypes.c_void_p
        self.place = ctypes.c_void_p(self.library.malloc(ctypes.c_size_t(mebibytes * MIB)))
        self.library.memset(self.place, 1, ctypes.c_size_t(mebibytes * MIB))

    def free(self):
        self.library.free(self.place)


def pages_of(mebibytes):
    """The pages that the system had to clear for a block of this size, which is freed again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    Block(mebibytes).free()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) / PAGES


def pages(device, error):
    """Pages of blocks of 64 MiB during a pass and after it, and of one of 16 MiB after it; each is the second."""
    found = []
    with suppress(KeyboardInterrupt), memory_kept(device):
        found.append([pages_of(64), pages_of(64)][1])
        if error:
            raise error
    return found + [[pages_of(size), pages_of(size)][1] for size in (64, 16)]


@glibc
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_in_a_pass_blocks_are_used_again_and_afterwards_only_those_of_a_smaller_training_are(error):
    during, after, smaller = in_a_fresh_process(pages, "cpu", error)
    assert during < PAGES
    assert after >= 64 * PAGES
    assert smaller < PAGES


@glibc
def test_on_a_gpu_nothing_changes():
    during, after, _ = in_a_fresh_process(pages, "cuda", None)
    assert min(during, after) >= 64 * PAGES


def kept():
    """MiB in memory before, in and after a pass in which 100 are freed, below a block that is not."""
    sizes = [resident()]
    with memory_kept("cpu"):
        below, above = Block(100), Block(1)
        below.free()
        sizes.append(resident())
    above.free()
    return [*sizes, resident()]


@glibc
def test_what_was_kept_goes_back_to_the_system():
    before, during, after = in_a_fresh_process(kept)
    assert during > before + 100
    assert after < before + 10


@glibc
def test_a_pass_keeps_it(tmp_path, variants, monkeypatch):
    from modelstock.data.dataset import open_dataset  # here: the processes above import this file without torch
    from modelstock.scoring import one_pass
    from tests.support.splits import make_split

    make_split(tmp_path, "shapes", 10)
    logits, found = one_pass.Tower.logits, []

    def measured(self, pixels):
        found.append([pages_of(64), pages_of(64)][1])
        return logits(self, pixels)

    monkeypatch.setattr(one_pass.Tower, "logits", measured)
    one_pass.score(open_dataset(tmp_path), variants[:1])
    (pages_again,) = found
    assert pages_again < PAGES


def test_without_glibc_nothing_changes(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with memory_kept("cpu"):
        pass
