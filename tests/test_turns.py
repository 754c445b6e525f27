"""Turns on a device: never more at a time than fit, the next turn built meanwhile, nothing left behind."""

import threading
from threading import Event, Timer
from typing import ClassVar

import pytest

from modelstock.scoring.turns import Turns

PATIENCE_S = 60


class Built:
    """Something that takes memory; `alive` is what has been built and not freed, `most` the most there ever were."""

    alive: ClassVar[set[int]] = set()
    built: ClassVar[list[int]] = []
    most = 0

    def __init__(self, source: int) -> None:
        self.source = source
        Built.built.append(source)
        Built.alive.add(source)
        Built.most = max(Built.most, len(Built.alive))

    def __del__(self) -> None:
        Built.alive.discard(self.source)


@pytest.fixture(autouse=True)
def _nothing_built():
    Built.alive.clear()
    Built.built.clear()
    Built.most = 0


def sources(turns):
    return [[built.source for built in turn] for turn in turns]


def building_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("next turn")]


@pytest.mark.parametrize("most", [3, 4])
def test_what_fits_together_is_built_once_and_stays(most):
    with Turns(range(3), Built, most=most) as turns:
        assert turns.together
        assert [sources(turns), sources(turns)] == 2 * [[[0, 1, 2]]]
        assert Built.built == [0, 1, 2]
    assert not Built.alive


@pytest.mark.parametrize(
    ("most", "forth"), [*((most, [[0], [1], [2], [3], [4]]) for most in (1, 2, 3)), (4, [[0, 1], [2, 3], [4]])]
)
def test_turns_go_back_and_forth_with_never_more_than_fit(most, forth):
    with Turns(range(5), Built, most=most) as turns:
        assert not turns.together
        assert sources(turns) == forth
        assert sources(turns) == forth[::-1]
        assert sources(turns) == forth
    assert Built.most <= most
    assert len(Built.built) == 5 + 2 * (5 - len(forth[-1])) - (len(forth[0]) - len(forth[-1]))  # ends are kept
    assert not Built.alive


def test_the_next_turn_and_no_other_is_built_while_the_present_one_is_in_use():
    here = {source: Event() for source in range(6)}

    def build(source):
        built = Built(source)
        here[source].set()
        return built

    with Turns(range(6), build, most=4) as turns:
        for turn in turns:
            last = turn[-1].source
            assert all(here[source].wait(PATIENCE_S) for source in range(last + 1, min(last + 3, 6)))
            assert Built.built == list(range(min(last + 3, 6)))


@pytest.mark.parametrize("most", [1, 2])
def test_what_building_raises_is_raised_in_the_caller_when_its_turn_comes(most):
    def build(source):
        if source == 2:
            raise ValueError("does not fit")
        return Built(source)

    used = []

    def use():
        with Turns(range(4), build, most=most) as turns:
            for turn in turns:
                used.extend(built.source for built in turn)

    with pytest.raises(ValueError, match="does not fit"):
        use()
    assert used == [0, 1]
    assert not building_threads()


def test_an_interrupt_waits_for_what_is_being_built_and_for_no_more():
    begun, let_go = Event(), Event()

    def build(source):
        if source == 3:
            begun.set()
            assert let_go.wait(PATIENCE_S)
        return Built(source)

    def interrupted():
        with Turns(range(9), build, most=6) as turns:
            for _ in turns:
                assert begun.wait(PATIENCE_S)
                Timer(0.05, let_go.set).start()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert Built.built == [0, 1, 2, 3]
    assert not building_threads()
