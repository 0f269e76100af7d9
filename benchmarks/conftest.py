"""What the benchmarks share: the machine's ceilings, measured here and now, and the closing table.

Rules: each figure is the median of repeated calls after a warm-up; threads are torch's own (--threads, default 1, so
that the figures are those of one core); inputs are allocated once and outputs as the op does it; peers run in the same
process and order, on the same values. The table prints each figure as a share of its ceiling and beside its peers.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

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


@dataclass(frozen=True)
class Ceilings:
    """fp32 multiply-adds in FLOP/s and a large copy in bytes read + written a second, both on ``threads`` threads."""

    threads: int
    fma: float | None
    copy: float


def measure_fma(threads: int, folder: Path) -> float | None:
    """Independent chains of fused multiply-adds in registers; None without a compiler."""
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
    rounds = 20_000_000
    best = 0.0
    for _ in range(15):
        workers = [threading.Thread(target=burn, args=(ctypes.c_long(rounds),)) for _ in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, threads * rounds * FMA_CHAINS * (bytes_ / 4) * 2 / (time.perf_counter() - start))
    return best


def measure_copy() -> float:
    source = torch.ones(1 << 26)  # 256 MB: past every cache
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() * 4 / best


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch threads to benchmark with (default 1)")


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ceilings:
    threads = request.config.getoption("--threads")
    torch.set_num_threads(threads)
    found = Ceilings(threads, measure_fma(threads, tmp_path_factory.mktemp("fma")), measure_copy())
    request.config.stash[CEILINGS] = found
    return found


CEILINGS = pytest.StashKey[Ceilings]()
Measure = Callable[..., None]


@pytest.fixture
def measure(benchmark: Any, ceilings: Ceilings) -> Measure:
    """measure(what, shape, peer, function, flops=, bytes_=): times ``function`` for one figure of the closing table."""

    def run(
        what: str, shape: str, peer: str, function: Callable[[], object], *, flops: float = 0, bytes_: float = 0
    ) -> None:
        torch.set_num_threads(ceilings.threads)
        function()
        start = time.perf_counter()
        function()
        once = time.perf_counter() - start
        rounds = 1 if once > 1 else max(5, min(200, int(0.4 / max(once, 1e-6))))
        benchmark.group = f"{what} {shape}"
        benchmark.extra_info.update(what=what, shape=shape, peer=peer, flops=flops, bytes=bytes_)
        benchmark.pedantic(function, rounds=rounds, iterations=1)

    return run


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
    session = getattr(config, "_benchmarksession", None)
    found = config.stash.get(CEILINGS, None)
    if session is None or found is None:
        return
    rows: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
    for entry in session.benchmarks:
        info = entry.extra_info
        if entry.stats is not None and "what" in info:
            key = (info["what"], info["shape"])
            rows.setdefault(key, {})[info["peer"]] = (entry.stats.median, info["flops"], info["bytes"])
    write = terminalreporter.write_line
    write("")
    fma = f"{found.fma / 1e9:.1f} GFLOP/s fp32 FMA" if found.fma else "FMA unknown (no gcc)"
    write(f"{cpu_name()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {found.threads} thread(s)")
    write(f"ceilings: {fma}; copy {found.copy / 1e9:.1f} GB/s read + written")
    for (what, shape), peers in rows.items():
        others = {name: value[0] for name, value in peers.items() if not name.startswith("spu")}
        for name, (median, flops, bytes_) in peers.items():
            ceiling = found.fma if flops else found.copy
            rate = (flops or bytes_) / median
            share = f"{100 * rate / ceiling:4.0f}%" if ceiling else "   -"
            unit = "GFLOP/s" if flops else "GB/s   "
            ratios = "  ".join(f"{other / median:.2f}x {peer}" for peer, other in others.items())
            beside = ratios if name.startswith("spu") else ""
            write(f"{what:22} {shape:24} {name:14} {1e3 * median:9.3f} ms {rate / 1e9:7.1f} {unit} {share}  {beside}")
