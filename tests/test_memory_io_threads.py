"""Background threads: order, turns, failures, and ends without hanging."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable

import pytest

from spu.memory import io_threads
from spu.memory.io_threads import IOThreads, Request
from spu.memory.store import StoreError


class Gate:
    """Work that notes what it does, and waits until it is let go."""

    def __init__(self) -> None:
        self.open, self.entered, self.log = threading.Event(), threading.Event(), list[str]()

    def work(self, name: str) -> Callable[[int], None]:
        def run(piece: int) -> None:
            self.entered.set()
            assert self.open.wait(20)
            self.log.append(f"{name}{piece}")

        return run


def test_reads_in_order_writes_in_order_and_these_in_turns() -> None:
    gate, threads = Gate(), IOThreads("store", 1)
    requests = [threads.submit(gate.work("first"), 1)]
    assert gate.entered.wait(20)
    for name, write in (("w", True), ("x", True), ("r", False), ("s", False)):
        requests.append(threads.submit(gate.work(name), 3, write=write))
    gate.open.set()
    for request in requests:
        request.wait()
    threads.close()
    order = gate.log[1:]
    assert [o for o in order if o[0] in "rs"] == ["r0", "r1", "r2", "s0", "s1", "s2"]
    assert [o for o in order if o[0] in "wx"] == ["w0", "w1", "w2", "x0", "x1", "x2"]
    kinds = [o[0] in "rs" for o in order]
    assert all(a != b for a, b in itertools.pairwise(kinds))


def test_two_threads_work_on_one_request() -> None:
    meet = threading.Barrier(2)
    threads = IOThreads("store", 2)
    threads.submit(lambda piece: meet.wait(20) and None, 2).wait()
    threads.close()


def test_a_request_of_nothing_is_done() -> None:
    threads = IOThreads("store", 1)
    threads.submit(lambda piece: None, 0).wait()
    threads.close()


def test_a_failure_is_told_at_wait_and_stops_what_is_queued_and_what_comes() -> None:
    gate, threads = Gate(), IOThreads("store", 1)

    def fail(piece: int) -> None:
        gate.entered.set()
        assert gate.open.wait(20)
        raise StoreError("no disk")

    failing = threads.submit(fail, 3)
    assert gate.entered.wait(20)
    queued = threads.submit(gate.work("later"), 2, write=True)
    gate.open.set()
    for _ in range(2):
        with pytest.raises(StoreError, match="^no disk$"):
            failing.wait()
    with pytest.raises(StoreError, match="not done after an earlier failure: no disk"):
        queued.wait()
    with pytest.raises(StoreError, match="refused after an earlier failure: no disk"):
        threads.submit(gate.work("never"), 1)
    threads.close()
    assert gate.log == []


def test_any_exception_in_a_thread_is_a_store_error_at_wait() -> None:
    threads = IOThreads("the disk", 1)
    request = threads.submit(lambda piece: 1 / piece and None, 1)
    with pytest.raises(StoreError, match="the disk: ZeroDivisionError"):
        request.wait()
    threads.close()


def test_close_finishes_what_is_queued_and_refuses_what_comes() -> None:
    done: list[int] = []
    threads = IOThreads("store", 1)

    def run(piece: int) -> None:
        time.sleep(0.01)
        done.append(piece)

    request = threads.submit(run, 5)
    assert threads.close()
    assert done == [0, 1, 2, 3, 4]
    request.wait()
    with pytest.raises(StoreError, match="store is closed"):
        threads.submit(run, 1)
    assert threads.close()


def test_abandoned_requests_fail_at_once() -> None:
    gate, threads = Gate(), IOThreads("store", 1)
    request = threads.submit(gate.work("a"), 100)
    assert gate.entered.wait(20)
    threading.Timer(0.05, gate.open.set).start()
    assert threads.close(abandon=True)
    assert gate.log == ["a0"]
    with pytest.raises(StoreError, match="closed before this was done"):
        request.wait()


def test_a_thread_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_threads, "PATIENCE_S", 0.2)
    gate, threads = Gate(), IOThreads("the disk", 1)
    threads.submit(gate.work("a"), 1)
    assert gate.entered.wait(20)
    with pytest.warns(UserWarning, match="the disk has not answered"):
        assert not threads.close()
    gate.open.set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert threads.close()


def test_what_a_request_holds_is_let_go_when_it_is_done() -> None:
    class Held:
        gone = threading.Event()

        def __del__(self) -> None:
            self.gone.set()

    held, threads = Held(), IOThreads("store", 1)
    request = threads.submit(lambda piece, held=held: None, 1)
    del held
    request.wait()
    assert Held.gone.wait(20)
    threads.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_process_is_refused_and_ends() -> None:
    gate, threads = Gate(), IOThreads("store", 1)
    request = threads.submit(gate.work("a"), 1)
    assert gate.entered.wait(20)
    found: list[str] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except StoreError as error:
            found.append(str(error))

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt(request.wait)
            attempt(lambda: threads.submit(gate.work("b"), 1))
            threads.close()
            os.write(writing, "|".join(found).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        texts = pipe.read().split("|")
    os.waitpid(child, 0)
    gate.open.set()
    request.wait()
    threads.close()
    assert "does not go on in a forked process" in texts[0]
    assert "store: this process was forked" in texts[1]


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 2)"])
def test_the_program_ends_with_requests_in_flight(end: str) -> None:
    code = (
        "import os, time\n"
        "from spu.memory.io_threads import IOThreads\n"
        "threads = IOThreads('store', 2)\n"
        "threads.submit(lambda piece: time.sleep(0.05), 100_000)\n"
        f"{end}\n"
    )
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert time.monotonic() - start < 40  # most of it imports; the queue would take an hour


def test_a_ticket_can_be_waited_for_by_many() -> None:
    gate, threads = Gate(), IOThreads("store", 1)
    request: Request = threads.submit(gate.work("a"), 1)
    waiting = [threading.Thread(target=request.wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    gate.open.set()
    for thread in waiting:
        thread.join(20)
        assert not thread.is_alive()
    threads.close()
