"""Results of the lease as JSON lines: written at once, so that a part that is cut off leaves what it has.

Also a pytest plugin (``-p lease_lines``): a line for each test as it ends; a skipped test counts as failed, because on
the card nothing may be left out unsaid; and a process whose CUDA context is gone ends, so that another takes its tests.
"""

from __future__ import annotations

import json
import os
from typing import Any

MARK = "@lease "  # before a line on standard output, where no file is named
_EXCUSED = ("needs two GPUs",)  # what one card cannot do
_DEAD: list[str] = []


def emit(row: dict[str, Any]) -> None:
    """Append a result to the file in $SPU_LEASE_LINES, in one write, and print it."""
    row = {"part": os.environ.get("SPU_LEASE_PART", ""), **row}
    line = json.dumps(row)
    print(MARK + line, flush=True)
    if path := os.environ.get("SPU_LEASE_LINES"):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode() + b"\n")
        finally:
            os.close(handle)


def outcome_of(report: Any) -> str:
    """Return a test's outcome: "passed", "failed" (also where it was skipped), or "" for a phase that says nothing."""
    if report.skipped:
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        return "excused" if any(text in reason for text in _EXCUSED) else "failed"
    if report.failed:
        return "failed"
    return "passed" if report.when == "call" else ""


def pytest_runtest_logreport(report: Any) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # told by the controller
        return
    if not (outcome := outcome_of(report)):
        return
    row = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2)}
    if outcome != "passed":
        row["why"] = str(report.longreprtext or report.longrepr)[-1500:]
    emit(row)


def pytest_sessionfinish(session: Any, exitstatus: int) -> None:
    """End with 1 where a test was skipped: pytest itself would end with 0."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [] if reporter is None else reporter.stats.get("skipped", [])
    if exitstatus == 0 and any(outcome_of(report) == "failed" for report in skipped):
        session.exitstatus = 1


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    if call.excinfo is None or "CUDA" not in str(call.excinfo.value):
        return
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        _DEAD.append(str(error))


def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    if _DEAD and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)  # the controller counts the test as crashed, and starts another worker for the rest
