"""Groups of the lease's cases: each timed and written as it is measured.

    python benchmarks/gpu/lease_cases.py GROUP ... [--dry]

Shares are of the peaks of this process: a device-to-device copy, an 8192-cube by cuBLAS.
"""

from __future__ import annotations

import argparse
import os
import sys

if "--dry" in sys.argv:  # read when triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from lease_lines import emit
from lease_work import GROUPS, on_card, small


def rehearse(group: str) -> int:
    """Call every case once, small, on the CPU; return how many of ours failed."""
    from spu.ops import backends

    failed, absent = 0, {f"spu {name}" for name, status in backends().items() if not status.available}
    for case in GROUPS[group](small()):
        row = {"group": case.group, "shape": case.shape, "peer": case.peer}
        try:
            case.make()()
        except Exception as error:
            excused = case.peer in absent or not case.peer.startswith("spu")
            failed += not excused
            row["absent" if excused else "error"] = f"{type(error).__name__}: {str(error)[:200]}"
        emit(row)
    return failed


def measure(group: str) -> int:
    """Time every case; return how many of ours failed."""
    import bench

    from spu.tune.run import context_is_gone

    ceilings, failed = bench.peaks(), 0
    emit({"what": "peaks", "device": torch.cuda.get_device_name(), **ceilings})
    for case in GROUPS[group](on_card()):
        try:
            row = bench._measure(case, ceilings)
        except Exception as error:
            emit(
                {"group": case.group, "shape": case.shape, "peer": case.peer, "error": f"{error}"[:300], "ended": True}
            )
            if context_is_gone(error, torch.device("cuda")):
                return failed + 1
            continue
        failed += "error" in row and case.peer.startswith("spu")
        emit(row)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description="One group of cases.")
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    return int(sum(map(rehearse if options.dry else measure, options.groups)) > 0)


if __name__ == "__main__":
    sys.exit(main())
