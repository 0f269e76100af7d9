"""Processes that wait lend their cores: products of the others are divided over these too, and stay the same bits."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from ranks import in_ranks
from test_cpu_help import results, until

from spu.devices.host import usable_cores
from spu.distributed.job import Job
from spu.engine.channel import helping_kernels

C = helping_kernels()

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="threads wait by a futex"),
    pytest.mark.skipif(C is None, reason="spu._C was not built"),
    pytest.mark.usefixtures("one_thread"),
]

OWN, LENT, TAKEN, WANTED = range(4)


@pytest.fixture
def words() -> Iterator[torch.Tensor]:
    """Three cores' words in memory that a forked process has too, and their end."""
    yield torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.int32)[:3]
    C.borrow_no_more()


def borrow(words: torch.Tensor) -> None:
    core = min(usable_cores())
    assert all(C.borrow_core(words.data_ptr() + 4 * index, core) for index in range(len(words)))


@contextlib.contextmanager
def lent(words: torch.Tensor) -> Iterator[None]:
    C.lend_cores(words.data_ptr(), len(words))
    try:
        yield
    finally:
        C.take_cores_back(words.data_ptr(), len(words))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_the_same_with_the_cores_of_others(words, dtype):
    alone = results(dtype)

    def look():
        for mine, theirs in zip(alone, results(dtype), strict=True):
            assert torch.equal(mine, theirs)

    borrow(words)
    with lent(words):
        before = C.helped()
        until(lambda: C.helped() > before, look)
    assert words.tolist() == [OWN] * 3
    before = C.helped()
    look()
    assert C.helped() == before  # they are their owner's again
    with lent(words):
        until(lambda: C.helped() > before, look)


def test_cores_go_to_and_fro_while_products_run(words):
    alone, over, times = results(torch.float16), threading.Event(), [0]

    def wait_often():
        while not over.is_set():
            with lent(words):
                time.sleep(1e-3)
            times[0] += 1

    borrow(words)
    thread = threading.Thread(target=wait_often, daemon=True)
    thread.start()
    try:
        before = C.helped()

        def look():
            for mine, theirs in zip(alone, results(torch.float16), strict=True):
                assert torch.equal(mine, theirs)

        until(lambda: C.helped() > before and times[0] > 20, look)
    finally:
        over.set()
        thread.join(60)
    assert words.tolist() == [OWN] * 3


def test_a_core_is_lent_to_one_at_a_time_and_goes_back_after_a_piece(words):
    C.lend_cores(words.data_ptr(), 1)
    words[0] = TAKEN  # by another process
    begin = time.monotonic()
    C.take_cores_back(words.data_ptr(), 1)  # it has died there
    assert words[0] == OWN
    assert time.monotonic() - begin < 30

    words[0] = TAKEN
    word = ctypes.c_int32.from_address(words.data_ptr())  # a forked child may not be able to run torch
    child = os.fork()
    if child == 0:
        while word.value == TAKEN:  # it is wanted; or the child has come so late that it was given up
            pass
        word.value = OWN  # as one whose piece has ended
        os._exit(0)
    C.take_cores_back(words.data_ptr(), 1)
    assert words[0] == OWN
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_core_that_is_not_lent_is_taken_by_nobody(words):
    borrow(words)
    before = C.helped()
    results(torch.float16)
    assert C.helped() == before
    assert words.tolist() == [OWN] * 3


def test_a_forked_process_has_none_and_may_have_its_own(words):
    alone = results(torch.float16)
    borrow(words)
    child = os.fork()
    if child == 0:
        helped, words[:] = C.helped(), LENT
        same = all(map(torch.equal, results(torch.float16), alone)) and C.helped() == helped
        C.borrow_no_more()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_there_are_so_many_and_no_more(words):
    made = [C.borrow_core(words.data_ptr(), min(usable_cores())) for _ in range(65)]
    assert made == [True] * 64 + [False]
    C.borrow_no_more()
    C.borrow_no_more()
    assert C.borrow_core(words.data_ptr(), 10**4)  # no such core: the thread runs where the process may


def trained(chosen: bool) -> list[object]:
    """Return whether cores are lent, what helped, the products' sums and how many threads there are after the job."""
    os.environ.pop("MKL_NUM_THREADS", None)
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}
    torch.set_num_threads(len(usable_cores()) + 2 if chosen else 1)
    before = threads_here()
    job = Job("cpu")
    torch.manual_seed(job.rank)
    if job.rank == 1:
        with job.idle():
            job.receive((1,), torch.int64, 0)
    else:
        helped, end = C.helped(), time.monotonic() + (0 if chosen else 60)
        while C.helped() == helped and time.monotonic() < end:
            results(torch.float16)
        job.send(torch.zeros(1, dtype=torch.int64), 1)
    lends, during = job._lent is not None, threads_here()
    job.total(torch.zeros(1, dtype=torch.float64), {"batch": 1.0})
    job.close()
    return [lends, C.helped() > 0, during > before, threads_here()]


def threads_here() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not dist.is_available() or len(usable_cores()) < 2, reason="needs two cores")
def test_a_rank_that_waits_lends_its_core_to_the_other():
    first, second = in_ranks(2, trained, False)
    assert first[:3] == [True, True, True]
    assert second[:2] == [True, False]


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_ranks_whose_threads_were_chosen_lend_nothing():
    for rank in in_ranks(2, trained, True):
        assert rank[:2] == [False, False]
