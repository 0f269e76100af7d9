"""``make gpu-lease``: what a machine with a GPU is asked in one command of at most 500 s; ``make gpu-again``: the rest.

    python benchmarks/gpu/lease.py [--again] [--parts NAME ...] [--seconds 500] [--dry]

Each part is a process with its own limit; time that one leaves is the next ones'. Everything is written as it comes,
into $OUT (else build/gpu-lease): ``results.jsonl`` has a line a result, ``log.txt`` what the parts said, and the table
of tuning, the trace and the profile lie beside it. A run that is cut off has lost nothing. What was carried
(``prepare.py``) is checked against its manifest first. ``--again`` runs what failed, was cut off or has not run yet, of
the machine's last run. ``--dry`` rehearses every part without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lease_carried import unpacked
from lease_lines import MARK

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORK = ROOT / "build" / "gpu-lease"  # what a later command on the same machine finds again
SECONDS, AGAIN_SECONDS, DRY_SECONDS = 495.0, 230.0, 170.0
_LOG_BYTES, _PART_BYTES = 15 << 20, 2 << 20
_FILES = ("results.jsonl", "log.txt", "tests.jsonl", "sm_90.json", "profile.csv", "trace.json.gz", "state.json")


@dataclass(frozen=True)
class Part:
    """One process: what it runs with this Python, its seconds, and what the environment has beside the usual."""

    name: str
    seconds: float
    command: tuple[str, ...]
    dry: tuple[str, ...] = ("--dry",)  # added to rehearse it
    variables: dict[str, str] = field(default_factory=dict)
    lines: str = "results.jsonl"


def _own(script: str, *arguments: str) -> tuple[str, ...]:
    return (str(HERE / script), *arguments)


def _group(name: str, seconds: float) -> Part:
    return Part(f"cases-{name}", seconds, _own("lease_cases.py", name))


def _tune(name: str, seconds: float) -> Part:
    return Part(f"tune-{name}", seconds, _own("lease_steps.py", "tune", name))


def parts() -> list[Part]:
    """Return the parts in order: what decides most comes first."""
    pytest = ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-p", "lease_lines", "-q", "--timeout=60")
    collect, tests = ("--collect-only",), "tests.jsonl"
    memcheck = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        *(Part(f"smoke-{name}", 25, _own("lease_steps.py", "smoke", name)) for name in ("triton", "cuda", "facts")),
        Part("test-cuda", 30, (*pytest, "-n", "4", "tests/test_cuda_device.py"), collect, lines=tests),
        Part(
            "test-triton", 60, (*pytest, "-n", "6", "tests/test_triton_gpu.py", "-k", "not training_job"), collect,
            lines=tests,
        ),
        *(_group(name, 16) for name in ("forward", "dx", "dw")),
        _group("memory", 20),
        _group("attention", 10),
        Part("train", 55, _own("lease_train.py", "train")),
        _tune("linear", 50),
        _tune("gated_linear", 30),
        _tune("linear_ce", 20),
        _group("gated", 14),
        _group("ce", 14),
        _group("between", 16),
        _group("layer", 20),
        _group("linear", 20),
        Part("profile", 40, _own("lease_steps.py", "profile")),
        Part("mixed", 30, _own("lease_train.py", "mixed")),
        Part("memcheck", 30, _own("lease_steps.py", "memcheck"), variables=memcheck, lines=tests),
        Part("test-streaming", 20, (*pytest, "tests/test_engine_streaming_gpu.py"), collect, lines=tests),
        Part("cap-streamed", 75, _own("lease_cap.py", "streamed")),
        Part("cap-fsdp2", 45, _own("lease_cap.py", "fsdp2")),
        Part("cap-resident", 30, _own("lease_cap.py", "resident")),
        _group("other", 30),
    ]  # fmt: skip


def _rehearsed(found: list[Part]) -> list[Part]:
    """Return the parts for a rehearsal: the groups of cases in one process, because most of its time is its start."""
    groups = tuple(part.name.removeprefix("cases-") for part in found if part.name.startswith("cases-"))
    return [Part("cases", 0, _own("lease_cases.py", *groups)), *(p for p in found if not p.name.startswith("cases-"))]


class Lease:
    """One command: where it writes, when it ends, and what the parts came to."""

    def __init__(self, seconds: float, dry: bool) -> None:
        self.dry, self._ends = dry, time.monotonic() + seconds
        self.out = Path(os.environ.get("OUT") or WORK)
        self.out.mkdir(parents=True, exist_ok=True)
        WORK.mkdir(parents=True, exist_ok=True)
        self._state_file = WORK / ("state-dry.json" if dry else "state.json")
        self.state: dict[str, str] = {}
        if self._state_file.is_file():
            self.state = json.loads(self._state_file.read_text())
        self._carried: dict[str, str] = {}
        self._compiling: subprocess.Popen[bytes] | None = None

    def begin(self, again: bool) -> None:
        """Take out what was carried; forget an earlier run unless this one goes on with it."""
        if not again:
            self.state = {}
            for name in _FILES:
                (self.out / name).unlink(missing_ok=True)
        self._carried, row = unpacked(ROOT / "build" / "gpu-prepare", WORK / "carried")
        self._line({"part": "carried", **row})
        self._say(f"carried: {row}")
        if row["carried"] and not row["cache"] and not self.dry:
            self._compile_here()

    def _compile_here(self) -> None:
        """Compile, beside the first parts, what was carried for another Triton; it ends with this command."""
        command = [sys.executable, str(HERE / "carry.py"), "--cache", self._carried["TRITON_CACHE_DIR"], "--jobs", "10"]
        paths = [str(HERE), *filter(None, [self._carried.get("PYTHONPATH"), os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        with (WORK / "carry.log").open("w") as log:
            self._compiling = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, part: Part, seconds: float) -> str:
        """Run a part for at most so long; return "passed", "failed" or "cut"."""
        before = self._kernels()
        command = [sys.executable, *part.command, *(part.dry if self.dry else ())]
        self._say(f"== {part.name}, at most {seconds:.0f} s")
        self._line({"part": part.name, "event": "begins", "limit_s": round(seconds)})
        began, rc = time.monotonic(), self._process(part, command, seconds)
        took = time.monotonic() - began
        outcome = "passed" if rc == 0 else "cut" if rc < 0 and took >= seconds - 1 else "failed"
        compiled = self._kernels() - before
        self._line({"part": part.name, "event": "ends", "outcome": outcome, "rc": rc, "seconds": round(took, 1),
                    "compiled_here": compiled})  # fmt: skip
        self.state[part.name] = outcome
        self._state_file.write_text(json.dumps(self.state))
        return outcome

    def left(self) -> float:
        return self._ends - time.monotonic()

    def end(self, wanted: list[Part]) -> int:
        """Print the table last, where a reader of the output's end finds it; return 1 unless all have passed."""
        if self._compiling is not None:
            _kill(self._compiling)
        for part in wanted:
            self._say(f"{self.state.get(part.name, 'not run'):8} {part.name}")
        for line in _best_lines(self.out / "results.jsonl"):
            self._say(line)
        return int(any(self.state.get(part.name) != "passed" for part in wanted))

    def _process(self, part: Part, command: list[str], seconds: float) -> int:
        environment = {**os.environ, **self._carried, **part.variables, "PYTHONUNBUFFERED": "1",
                       "SPU_LEASE_PART": part.name, "SPU_LEASE_OUT": str(self.out),
                       "SPU_LEASE_LINES": str(self.out / part.lines), "SPU_CACHE": str(WORK / "cache")}  # fmt: skip
        paths = [str(HERE), *filter(None, [self._carried.get("PYTHONPATH"), os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
        clock = threading.Timer(max(1.0, seconds), _kill, [process])
        clock.start()
        try:
            assert process.stdout is not None
            written = 0
            for line in process.stdout:
                if line.startswith(MARK):
                    continue  # it is in the results already
                written += len(line)
                if written < _PART_BYTES:
                    self._say(line.rstrip("\n"), shown=False)
            return process.wait()
        finally:
            clock.cancel()
            _kill(process)  # what it started and left

    def _kernels(self) -> int:
        """Count the kernels in Triton's cache: those that a part adds were not carried."""
        folder = Path(self._carried.get("TRITON_CACHE_DIR", WORK / "none"))
        return sum(1 for _ in folder.glob("*/*.cubin")) if folder.is_dir() else 0

    def _line(self, row: dict[str, Any]) -> None:
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _say(self, line: str, shown: bool = True) -> None:
        if shown:
            print(line, flush=True)
        log = self.out / "log.txt"
        if not log.exists() or log.stat().st_size < _LOG_BYTES:
            with log.open("a") as file:
                file.write(line + "\n")


def _kill(process: subprocess.Popen[Any]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _best_lines(file: Path) -> list[str]:
    """The measured cases, a short line each."""
    lines = []
    for text in file.read_text().splitlines() if file.is_file() else ():
        row = json.loads(text)
        if "us" in row:
            lines.append(
                f"{row['group'][:28]:28} {row['shape']:20} {row['peer']:22} {row['us']:10.1f} us {row['share']:5.2f}"
            )
        elif row.get("ratio"):
            lines.append(f"{row['what']}: {row['ratio']:.2f}x")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask a machine with a GPU everything, in one command.")
    parser.add_argument("--again", action="store_true", help="what the last run on this machine has not passed")
    parser.add_argument("--parts", nargs="+", help="these alone")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    default = DRY_SECONDS if options.dry else AGAIN_SECONDS if options.again else SECONDS
    lease = Lease(options.seconds or default, options.dry)
    known = _rehearsed(parts()) if options.dry else parts()
    if unknown := set(options.parts or ()) - {part.name for part in known}:
        parser.error(f"unknown parts {sorted(unknown)}: choose from {', '.join(part.name for part in known)}")
    wanted = [part for part in known if not options.parts or part.name in options.parts]
    if options.again and not options.parts:
        # First what has not run at all: a failed part has left its reason already.
        order = {"cut": 1, "failed": 2}
        wanted = [part for part in wanted if lease.state.get(part.name) != "passed"]
        wanted.sort(key=lambda part: order.get(lease.state.get(part.name, ""), 0))
    lease.begin(options.again)
    shutil.copy(__file__, WORK / "ran.py")
    if options.dry:  # nothing is timed: as many at once as there are cores
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda part: lease.run(part, max(1.0, lease.left())), wanted))
        return lease.end(wanted)
    lent = 0.0  # what parts have left of their time
    for part in wanted:
        seconds = min(part.seconds + lent, lease.left() - 5)
        if seconds < 5:
            break
        began = time.monotonic()
        lease.run(part, seconds)
        lent = max(0.0, lent + part.seconds - (time.monotonic() - began))
    return lease.end(wanted)


if __name__ == "__main__":
    sys.exit(main())
