"""A piece of Python in a process whose data is limited by the system, and the most that it held.

RLIMIT_DATA counts what a process may write and has to itself: anonymous memory, heaps, threads' stacks, the data of
libraries. It does not count files, also not shared mappings of files, and it counts what is mapped, touched or not. A
request over the limit fails as on a machine that has no more: MemoryError, or torch's "can't allocate memory".

    run = run_limited("import torch; torch.empty(1 << 30)", limit_bytes=1 << 30)
    assert run.out_of_memory
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("VmData", "RssAnon", "VmRSS")
SAMPLE_S = 0.002
OUT_OF_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "does not give")

# Few heaps and few threads: otherwise what is counted depends on the number of cores.
ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}

LAUNCHER = """
import resource, sys
imports, headroom, source = sys.argv[1], int(sys.argv[2]), sys.argv[3]
exec(imports)
if headroom >= 0:
    status = open("/proc/self/status").read()
    held = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + headroom, held + headroom))
sys.argv = ["limited", *sys.argv[4:]]
exec(compile(source, "limited", "exec"), {"__name__": "__main__"})
"""


@dataclass(frozen=True)
class LimitedRun:
    """How a process ended.

    Attributes:
        code: its exit status; negative: the signal that ended it.
        output: what it printed.
        errors: the same, to stderr.
        peaks: the most bytes of each of `FIELDS` of /proc/PID/status: what is limited; anonymous pages that are there;
            these and the pages of files. Seen every `SAMPLE_S` seconds, so a shorter peak may be missed.
        max_rss: the most of the last one, as the system itself counted it.
    """

    code: int
    output: str
    errors: str
    peaks: Mapping[str, int]
    max_rss: int

    @property
    def out_of_memory(self) -> bool:
        return self.code != 0 and any(text in self.errors for text in OUT_OF_MEMORY)


def run_limited(
    source: str,
    *,
    limit_bytes: int | None = None,
    headroom_bytes: int | None = None,
    imports: str = "import torch, spu",
    arguments: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    seconds: float = 600,
) -> LimitedRun:
    """Run Python ``source`` in a process of its own.

    Args:
        source: sees ``arguments`` as ``sys.argv[1:]``.
        limit_bytes: RLIMIT_DATA from the start, also for ``imports``; None for no limit.
        headroom_bytes: RLIMIT_DATA after ``imports``, over what the process holds then; None leaves it.
        imports: run before ``source``.
        environment: over this process's, and over `ENVIRONMENT`.
        seconds: after which it is killed: TimeoutError.
    """
    headroom = -1 if headroom_bytes is None else headroom_bytes

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))

    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, imports, str(headroom), source, *arguments],
            stdout=output, stderr=errors, preexec_fn=limit, env={**os.environ, **ENVIRONMENT, **(environment or {})},
        )  # fmt: skip
        killed = threading.Event()
        timer = threading.Timer(seconds, lambda: (killed.set(), process.kill()))
        timer.start()
        try:
            peaks, ended = _watch(process.pid)
        finally:
            timer.cancel()
        process.returncode = code = os.waitstatus_to_exitcode(ended[0])
        output.seek(0)
        errors.seek(0)
        texts = output.read(), errors.read()
    if killed.is_set():
        raise TimeoutError(f"not done in {seconds} s; it said {texts}")
    return LimitedRun(code, *texts, peaks, ended[1].ru_maxrss * 1024)


def _watch(pid: int) -> tuple[dict[str, int], tuple[int, resource.struct_rusage]]:
    """Look at a process until it ends; return the peaks, and its status and use of resources."""
    peaks = dict.fromkeys(FIELDS, 0)
    status = Path(f"/proc/{pid}/status")
    while True:
        found, code, used = os.wait4(pid, os.WNOHANG)
        if found:
            return peaks, (code, used)
        for name, value in status_bytes(status.read_text()).items():
            peaks[name] = max(peaks[name], value)
        time.sleep(SAMPLE_S)


def status_bytes(text: str) -> dict[str, int]:
    """Bytes of `FIELDS` in the text of a status file; fields that are not there are left out."""
    lines = (line.split() for line in text.splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0][:-1] in FIELDS}
