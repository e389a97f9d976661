"""Processes that wait for each other: without a limit, but never for one that has failed."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from kdcache.errors import KdcacheError, RetryError, UsageError
from kdcache.system import alarm
from kdcache.system.alarm import Alarm
from kdcache.system.interrupts import Stopped


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(alarm, "LOOK", 0.01)


def team(*works):
    """Run each work as a process of a job (here a thread), with its alarm; the error that each ended with."""
    store = dist.HashStore()

    def ended(number: int):
        own = Alarm(number, len(works), store)
        try:
            with own.watched():
                works[number](own)
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(ended, range(len(works))))


def failing(error: BaseException):
    def work(own: Alarm) -> None:
        raise error

    return work


def test_all_of_them_wait_for_the_slowest():
    late = []

    def slow(own: Alarm) -> None:
        time.sleep(0.1)
        late.append(True)
        own.wait()

    def quick(own: Alarm) -> None:
        own.wait()
        assert late

    assert team(slow, quick, quick) == [None] * 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UsageError("no such thing", why="because", fix="this"), "process 0 of 3: no such thing"),
        (ZeroDivisionError("by zero"), "process 0 of 3 failed: ZeroDivisionError: by zero"),
        (Stopped(), "process 0 of 3 failed: it was interrupted"),
    ],
)
def test_whoever_waits_for_one_that_fails_is_told_its_error(error, said):
    first, *others = team(failing(error), Alarm.wait, Alarm.wait)
    assert first is error
    for other in others:
        assert isinstance(other, UsageError if isinstance(error, UsageError) else RetryError)
        assert other.what == said


def test_an_error_that_comes_of_anothers_is_replaced_by_that_one():
    def lost(own: Alarm) -> None:
        assert own._heard.wait(10)
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:2283")

    first, second = team(failing(MemoryError("all of it")), lost)
    assert isinstance(first, MemoryError)
    assert isinstance(second, KdcacheError)
    assert second.what == "process 0 of 2 failed: MemoryError: all of it"


def test_a_process_that_is_gone_without_a_word_is_noticed():
    def lost(own: Alarm) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:2283")

    first, second = team(lost, Alarm.wait)
    assert "ended without a word" in first.what
    assert "ended without a word" in second.what


def test_work_that_needs_no_other_process_goes_on():
    failed = threading.Event()

    def fails(own: Alarm) -> None:
        failed.set()
        raise ValueError("early")

    def goes_on(own: Alarm) -> None:
        with own.apart():
            assert failed.wait(10)
            assert own._heard.wait(10)
            time.sleep(0.1)
            done.append(True)
        own.wait()

    done: list[bool] = []
    _, second = team(fails, goes_on)
    assert done
    assert second.what == "process 0 of 2 failed: ValueError: early"


def test_what_all_have_agreed_on_is_no_failure():
    def stops(own: Alarm) -> None:
        own.agree()
        raise Stopped

    assert [type(error) for error in team(stops, stops)] == [Stopped, Stopped]


def test_an_operation_that_waits_for_a_failed_process_is_broken_off(monkeypatch):
    monkeypatch.setattr(alarm, "LEAVE", 0.05)
    broken = threading.Event()

    def stuck(own: Alarm) -> None:
        own._break_off = broken.set
        assert broken.wait(10)
        raise RuntimeError("NCCL communicator was aborted")

    _, second = team(failing(ValueError("early")), stuck)
    assert second.what == "process 0 of 2 failed: ValueError: early"
