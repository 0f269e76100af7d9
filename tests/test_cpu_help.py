"""Threads that wait by helping: others' products are divided among more threads, and stay the same bit for bit.

Runs on the instruction set that spu._C chooses here; test_cpu_isa.py runs this file again on emulated tiles.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from numeric import assert_equal
from torch import Tensor

from spu.engine.channel import Exchange

C = pytest.importorskip("test_cpu_kernels").C  # spu._C, or the library that test_cpu_isa.py has built

OPS = torch.ops.spu
# Products are shared from 2^25 multiply-adds on on AMX tiles, from 2^22 on elsewhere, from 2^21 on on emulated tiles,
# which are slow. These have 38M, emulated 6M: each is shared, where it is not torch's (fp32).
ROWS, WIDTH, HIDDEN = (96, 192, 320) if "SPU_TEST_LIBRARY" in os.environ else (128, 512, 576)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="threads wait by a futex"),
    pytest.mark.usefixtures("one_thread"),
]


@contextlib.contextmanager
def helpers(count: int) -> Iterator[None]:
    """Let so many threads help in this block."""
    over = threading.Event()

    def help_on() -> None:
        torch.set_num_threads(1)
        while not over.is_set():
            seen = C.rings()
            if not over.is_set():
                C.help_until(seen)

    threads = [threading.Thread(target=help_on, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        C.ring()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def results(dtype: torch.dtype) -> list[Tensor]:
    """Everything that shares its work: products with each epilogue, attention, norms, pointwise passes, codecs."""
    torch.manual_seed(0)
    x, dy = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(ROWS, WIDTH).to(dtype)
    up, gate = (torch.randn(HIDDEN, WIDTH).to(dtype) * 0.1 for _ in range(2))
    down = torch.randn(WIDTH, HIDDEN).to(dtype) * 0.1
    h, kept_gate, kept_up = OPS.gated_linear.cpu(x, gate, up, "silu", True)
    dgate, dup, again = OPS.gated_dh.cpu(dy, down, kept_gate, kept_up, "silu")
    main = torch.ones(HIDDEN, WIDTH)
    found, one = torch.zeros(1), torch.ones(1)
    OPS.linear_dw_.cpu(dgate, x, main, one * 0.5, found, True)
    q, k, v = (torch.randn(2, 64, 4, 32).to(dtype) for _ in range(3))
    out, lse = OPS.attention.cpu(q, k, v, 0.2, True)
    wide = torch.randn(1024, 512).to(dtype)
    weight = torch.randn(512).to(dtype)
    normed, rstd, _ = OPS.rms_norm.cpu(wide, None, weight, 1e-5, 0.0, False)
    return [
        h, kept_gate, kept_up, dgate, dup, again, main, found, out, lse, normed, rstd,
        *OPS.linear.cpu(x, up, None, "gelu", True),
        OPS.gated_dx.cpu(dgate, dup, gate, up),
        *OPS.mlp_dz.cpu(dy, down, kept_gate, "gelu", True, True),
        *OPS.attention_backward.cpu(out, q, k, v, out, lse, 0.2, True),
        *OPS.rms_norm_backward.cpu(wide, None, wide, weight, rstd, 0.0, False, True, True),
        OPS.pack.cpu(wide, "int8"),
        OPS.unpack.cpu(OPS.pack.cpu(wide, "int8"), wide.shape, dtype, "int8"),
    ]  # fmt: skip


def until(true: Callable[[], bool], work: Callable[[], object]) -> None:
    """Work until it is true: a helper may be late for one product, not for all of a minute."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, "no thread has helped"
        work()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, 3])
def test_results_are_the_same_whoever_helps(dtype: torch.dtype, count: int) -> None:
    alone = results(dtype)
    with helpers(count):
        before = C.helped()

        def look() -> None:
            for mine, theirs in zip(alone, results(dtype), strict=True):
                assert_equal(theirs, mine)

        look()
        until(lambda: C.helped() > before, look)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [2, 3, 5, 8])
def test_results_are_the_same_on_any_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    """Threads take turns at pieces whose length is left to chance; products of few columns divide their rows too."""

    def narrow() -> list[Tensor]:
        torch.manual_seed(1)
        x, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(70, WIDTH).to(dtype)
        dz, bias = torch.randn(ROWS, 70).to(dtype), torch.randn(70).to(dtype)
        main, main_bias, found, one = torch.ones(70, WIDTH), torch.ones(70), torch.zeros(1), torch.ones(1)
        OPS.linear_dw_db_.cpu(dz, x, main, main_bias, one * 0.5, found, True)
        logits = OPS.linear_ce.cpu(x, torch.randn(600, WIDTH).to(dtype), torch.arange(ROWS) % 600, -100)
        return [*OPS.linear.cpu(x, weight, bias, "silu", True), main, main_bias, found, *logits]

    alone = [*results(dtype), *narrow()]
    torch.set_num_threads(threads)
    for mine, theirs in zip(alone, [*results(dtype), *narrow()], strict=True):
        assert_equal(theirs, mine)


def test_several_share_at_once() -> None:
    alone = results(torch.float16)
    wrong: list[BaseException] = []

    def work() -> None:
        torch.set_num_threads(1)
        try:
            for _ in range(5):
                for mine, theirs in zip(alone, results_of_one_seed(), strict=True):
                    assert_equal(theirs, mine)
        except BaseException as error:
            wrong.append(error)

    lock = threading.Lock()

    def results_of_one_seed() -> list[Tensor]:
        with lock:  # the seed is the process's
            return results(torch.float16)

    x, weight = torch.randn(ROWS, HIDDEN).half(), torch.randn(WIDTH, HIDDEN).half()
    product = OPS.linear.cpu(x, weight, None, "none", False)[0]

    def other() -> None:
        torch.set_num_threads(1)
        for _ in range(50):
            if not torch.equal(OPS.linear.cpu(x, weight, None, "none", False)[0], product):
                wrong.append(AssertionError("a product changed"))

    with helpers(2):
        threads = [threading.Thread(target=body) for body in (work, other, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not wrong


@pytest.mark.parametrize("helping", [0, 2])
def test_a_message_wakes_the_one_who_waits(helping: int) -> None:
    exchange, taken = Exchange(helping), []

    def wait() -> None:
        taken.append(exchange.take("key"))
        exchange.leave()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    exchange.put("other", 1)
    thread.join(0.05)
    assert thread.is_alive()
    exchange.put("key", 2)
    exchange.leave()
    thread.join(60)
    assert taken == [2]
    assert not thread.is_alive()


def test_who_has_left_helps_until_all_have() -> None:
    exchange = Exchange(2)
    thread = threading.Thread(target=exchange.leave, daemon=True)
    thread.start()
    x, weight = torch.randn(ROWS, HIDDEN).half(), torch.randn(WIDTH, HIDDEN).half()
    before = C.helped()
    until(lambda: C.helped() > before, lambda: OPS.linear.cpu(x, weight, None, "none", False))
    assert thread.is_alive()
    exchange.leave()
    thread.join(60)
    assert not thread.is_alive()


def test_an_abort_ends_the_wait_of_one_who_has_left() -> None:
    exchange = Exchange(2)
    thread = threading.Thread(target=exchange.leave, daemon=True)
    thread.start()
    exchange.abort()
    thread.join(60)
    assert not thread.is_alive()


def test_a_forked_process_has_no_helpers() -> None:
    x, weight = torch.randn(ROWS, HIDDEN).half(), torch.randn(WIDTH, HIDDEN).half()
    alone = OPS.linear.cpu(x, weight, None, "none", False)[0]
    with helpers(1):
        before = C.helped()
        until(lambda: C.helped() > before, lambda: OPS.linear.cpu(x, weight, None, "none", False))
        child = os.fork()
        if child == 0:
            helped = C.helped()
            same = torch.equal(OPS.linear.cpu(x, weight, None, "none", False)[0], alone)
            os._exit(0 if same and C.helped() == helped else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_a_ticket_must_be() -> None:
    with pytest.raises(TypeError):
        C.help_until("now")
    C.help_until((C.rings() - 1) % 2**32)  # rung since: returns at once
