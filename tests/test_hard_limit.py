"""The helper that runs Python under a limit of the system: it limits, and it sees what was held."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("resource", reason="this system has no resource limits")
if not sys.platform.startswith("linux"):
    pytest.skip("needs /proc", allow_module_level=True)

from hard_limit import run_limited

MB = 1 << 20
TAKE = "import mmap, sys, time\ntaken = mmap.mmap(-1, {size}, flags={flags})\n{touch}\ntime.sleep(0.05)\nprint('taken')"
PRIVATE = "mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS"


def take(size: int, *, flags: str = PRIVATE, touch: str = "") -> str:
    return TAKE.format(size=size, flags=flags, touch=touch)


def test_more_than_the_limit_is_not_given() -> None:
    run = run_limited(take(300 * MB), limit_bytes=200 * MB, imports="")
    assert run.code == 1
    assert run.out_of_memory
    assert "Cannot allocate memory" in run.errors


def test_less_than_the_limit_is_given_and_seen() -> None:
    run = run_limited(take(100 * MB, touch="taken.write(bytes(40 << 20))"), limit_bytes=300 * MB, imports="")
    assert (run.code, run.output) == (0, "taken\n"), run.errors
    assert not run.out_of_memory
    assert 100 * MB < run.peaks["VmData"] < 200 * MB
    assert 40 * MB < run.peaks["RssAnon"] < 140 * MB
    assert run.max_rss >= 40 * MB


def test_shared_memory_is_not_counted() -> None:
    run = run_limited(take(300 * MB, flags="mmap.MAP_SHARED | mmap.MAP_ANONYMOUS"), limit_bytes=200 * MB, imports="")
    assert run.code == 0, run.errors


@pytest.mark.parametrize(("size", "fits"), [(90 * MB, True), (110 * MB, False)])
def test_headroom_over_the_imports(size: int, fits: bool) -> None:
    run = run_limited(take(size), headroom_bytes=100 * MB, imports="import json")
    assert (run.code == 0) is fits
    assert run.out_of_memory is not fits


def test_a_tensor_over_the_limit_is_torchs_error() -> None:
    run = run_limited(
        "import torch; torch.ones(200 << 20, dtype=torch.uint8)", headroom_bytes=100 * MB, imports="import torch"
    )
    assert run.out_of_memory, run.errors
    assert "can't allocate memory" in run.errors


def test_arguments_reach_the_program_and_signals_are_told() -> None:
    run = run_limited(
        "import sys, os; print(sys.argv[1:], flush=True); os.kill(os.getpid(), 9)", imports="", arguments=["a", "b"]
    )
    assert (run.code, run.output) == (-9, "['a', 'b']\n")
    assert not run.out_of_memory


def test_a_program_that_does_not_end_is_killed() -> None:
    with pytest.raises(TimeoutError, match=r"not done in 0\.5 s"):
        run_limited("import time; time.sleep(60)", imports="", seconds=0.5)
