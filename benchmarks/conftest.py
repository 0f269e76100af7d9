"""What the benchmarks share: the machine's ceilings, measured here and now, and the closing table.

Rules: each figure is the median of repeated calls after a warm-up; threads are torch's own (--threads, default 1, so
that the figures are those of one core); inputs are allocated once and outputs as the op does it; peers run in the same
process and order, on the same values. A core's clock drifts by a third and more on shared machines, so a ceiling is
measured again beside every figure, and a figure's share is of that one; and where the ratio to a peer is what counts,
the two run in turns and the ratio is the median over the pairs. report.py writes the table, with the targets
that a benchmark names beside what was measured, and draws the roofline.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import report
import torch
from goals import GOALS
from must_reach import LARGE_STEP, MUST_REACH

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the benchmarks use the tests' error bound

# Twelve independent chains: two units times the latency of four or five cycles need ten. Named variables, because an
# array of accumulators may be kept in memory.
FMA_SOURCE = """
typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
#define EACH(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
float burn(long rounds) {
  vf x, y;
  for (int j = 0; j < VECTOR_BYTES / 4; ++j) x[j] = 0.999f, y[j] = 1e-9f;
#define START(i) vf acc##i = y * i;
#define STEP(i) acc##i = acc##i * x + y;
#define HOLD(i) __asm__("" : "+v"(acc##i));
#define SUM(i) y += acc##i;
  EACH(START)
  for (long r = 0; r < rounds; ++r) {
    EACH(STEP)
    EACH(HOLD)
  }
  EACH(SUM)
  return y[0];
}
"""
FMA_CHAINS = 12
PAIRED_SECONDS = 0.6
SLOW_SECONDS = 0.5


@dataclass(frozen=True)
class Ceilings:
    """fp32 multiply-adds in FLOP/s and a large copy in bytes read + written a second, both on ``threads`` threads.

    ``burn`` measures the first again, ``source`` and ``target`` serve the second.
    """

    threads: int
    fma: float | None
    copy: float
    burn: Callable[[int, int], float] | None
    source: torch.Tensor
    target: torch.Tensor

    def now(self, flops: bool) -> float | None:
        """The ceiling at this moment, in 30 ms."""
        if not flops:
            return measure_copy(self.source, self.target, 2)
        return None if self.burn is None else max(self.burn(self.threads, 1_000_000) for _ in range(4))


def build_fma(folder: Path) -> Callable[[int, int], float] | None:
    """(threads, rounds) -> FLOP/s of independent multiply-add chains in registers; None without a compiler."""
    if shutil.which("gcc") is None or platform.machine() != "x86_64":
        return None
    wide = "avx512f" in Path("/proc/cpuinfo").read_text()
    bytes_, flag = (64, "-mavx512f") if wide else (32, "-mavx2")
    (folder / "fma.c").write_text(FMA_SOURCE)
    command = ["gcc", "-O3", flag, "-mfma", "-ffp-contract=fast", f"-DVECTOR_BYTES={bytes_}"]
    subprocess.run(
        [*command, "-shared", "-fPIC", str(folder / "fma.c"), "-o", str(folder / "fma.so")],
        check=True, capture_output=True,
    )  # fmt: skip
    burn = ctypes.CDLL(str(folder / "fma.so")).burn
    burn.restype = ctypes.c_float

    def rate(threads: int, rounds: int) -> float:
        workers = [threading.Thread(target=burn, args=(ctypes.c_long(rounds),)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return threads * rounds * FMA_CHAINS * (bytes_ / 4) * 2 / (time.perf_counter() - start)

    return rate


def seconds_of(function: Callable[[], object]) -> float:
    """With one thread the process's own processor time, which other programs on the machine do not add to. (Of the
    process, because a trainer works in a thread of its own.)
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def ratio_in_turns(ours: Callable[[], object], peer: Callable[[], object]) -> float:
    """The peer's time over ours: the median over pairs of calls, one after the other."""
    peer()
    once = seconds_of(ours) + seconds_of(peer)
    least = 9 if once < SLOW_SECONDS else 3  # the median of three pairs of 0.1 s moved by a twentieth between runs
    rounds = max(least, min(100, int(PAIRED_SECONDS / once)))
    return statistics.median(seconds_of(peer) / seconds_of(ours) for _ in range(rounds))


def measure_copy(source: torch.Tensor, target: torch.Tensor, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch threads to benchmark with (default 1)")
    parser.addoption("--report", type=Path, default=None, help="folder for the table and the roofline picture")


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ceilings:
    threads = request.config.getoption("--threads")
    torch.set_num_threads(threads)
    burn = build_fma(tmp_path_factory.mktemp("fma"))
    fma = None if burn is None else max(burn(threads, 20_000_000) for _ in range(8))
    source = torch.ones(1 << 25)  # 128 MB: past every cache
    target = torch.empty_like(source)
    found = Ceilings(threads, fma, measure_copy(source, target, 8), burn, source, target)
    request.config.stash[CEILINGS] = found
    return found


CEILINGS = pytest.StashKey[Ceilings]()
Measure = Callable[..., None]


@pytest.fixture
def measure(benchmark: Any, ceilings: Ceilings) -> Measure:
    """measure(what, shape, peer, function, flops=, bytes_=): times ``function`` for one figure of the closing table.

    A product gives both flops and bytes_ and is held against the multiply-adds; a pass over memory gives bytes_, and
    the operations it does a byte as intensity. targets: what the figure has to reach, as {"ceiling": share} and {peer:
    ratio of rates}. slow: a peer that takes seconds a call and needs no warm-up to be known as slow. paired: peers, by
    name, that do the same work as ``function`` and are run in turns with it, for PAIRED_SECONDS each.
    """

    def run(
        what: str,
        shape: str,
        peer: str,
        function: Callable[[], object],
        *,
        flops: float = 0,
        bytes_: float = 0,
        intensity: float = 0,
        targets: dict[str, float] | None = None,
        slow: bool = False,
        paired: dict[str, Callable[[], object]] | None = None,
    ) -> None:
        torch.set_num_threads(ceilings.threads)
        rounds = 1
        if not slow:
            function()
            start = time.perf_counter()
            function()
            once = time.perf_counter() - start
            rounds = max(3, min(100, int(0.25 / max(once, 1e-6)))) if once < 1 else 1
        before = ceilings.now(flops > 0)
        benchmark.group = f"{what} {shape}"
        benchmark.pedantic(function, rounds=rounds, iterations=1)
        after = ceilings.now(flops > 0)
        benchmark.extra_info.update(
            what=what, shape=shape, peer=peer, flops=flops, bytes=bytes_, targets=targets or {},
            intensity=intensity or (flops / bytes_ if bytes_ else 0),
            ceiling=None if before is None or after is None else (before + after) / 2,
            paired={name: ratio_in_turns(function, other) for name, other in (paired or {}).items()},
        )  # fmt: skip

    return run


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("timeout"):  # the tests' own limit is too short for a pipeline among its peers
        for item in items:
            item.add_marker(pytest.mark.timeout(1500))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["cpu_name"] = cpu_name()
    try:
        from spu import _C

        machine_info["spu_isa"] = _C.isa()
    except ImportError as error:
        machine_info["spu_isa"] = f"none: {error}"


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in GOALS:
        terminalreporter.write_line(line)
    session = getattr(config, "_benchmarksession", None)
    found = config.stash.get(CEILINGS, None)
    if session is None or found is None:
        for line in MUST_REACH.lines():
            terminalreporter.write_line(line)
        return
    entries = [e for e in session.benchmarks if e.stats is not None and e.stats.data and "what" in e.extra_info]
    figures = [report.Figure(median=e.stats.median, **e.extra_info) for e in entries]
    for figure in (f for f in figures if f.what == "large decoder training step"):
        for ratio in figure.paired.values():
            MUST_REACH.add(LARGE_STEP[figure.peer], ratio, figure.shape)
    for ratio, which in report.beside_torch(f for f in figures if "training step" not in f.what):
        MUST_REACH.add("any op, beside torch's", ratio, which)
    fma = f"{found.fma / 1e9:.1f} GFLOP/s fp32 FMA" if found.fma else "FMA unknown (no gcc)"
    head = [
        f"{cpu_name()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {found.threads} thread(s)",
        f"ceilings: {fma}; copy {found.copy / 1e9:.1f} GB/s read + written (each measured again beside its figures)",
    ]
    lines = [*head, *report.table(figures), "", *MUST_REACH.lines()]
    for line in ("", *lines):
        terminalreporter.write_line(line)
    folder = config.getoption("--report")
    if folder is not None and found.fma is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.txt").write_text("\n".join(lines) + "\n")
        report.roofline(figures, found.fma, found.copy, folder / "roofline.svg")
