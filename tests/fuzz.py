"""The equivalence fuzzer: random models, losses and trainers against plain PyTorch, for some time or number of cases.
Every fourth case is a loop of one's own around an accelerated model.

    python tests/fuzz.py --seconds 60 --seed 0           # as many cases as fit, from seed 0 on
    python tests/fuzz.py --cases 20000 --processes 2
    python tests/fuzz.py --only 4711                     # one case, with its description and traceback

A case is its seed: the same on every machine, for the same menu.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import multiprocessing
import sys
import time
import traceback
import warnings

import torch
from fuzz_case import draw_case, run_case
from fuzz_loop import run_loop


def attempt(seed: int) -> tuple[int, str, str]:
    """(seed, outcome, traceback of a failure)."""
    try:
        return seed, run_loop(seed) if seed % 4 == 3 else run_case(seed), ""
    except Exception as error:
        return seed, f"FAILED: {type(error).__name__}: {error}", traceback.format_exc()


Failures = list[tuple[int, str, str]]  # (seed, outcome, traceback)


def run_cases(
    first: int, count: int | None, seconds: float | None, processes: int
) -> tuple[collections.Counter[str], Failures]:
    """How often each outcome came, and the failures."""
    outcomes: collections.Counter[str] = collections.Counter()
    failures: Failures = []
    stop = time.monotonic() + seconds if seconds is not None else None
    last = first + count if count is not None else 2**62
    seeds = itertools.takewhile(lambda _: stop is None or time.monotonic() < stop, range(first, last))
    with multiprocessing.get_context("spawn").Pool(processes, _quiet) if processes > 1 else _Here() as pool:
        for seed, outcome, trace in pool.imap_unordered(attempt, seeds, chunksize=1):
            outcomes[outcome.split(":")[0] if trace else outcome] += 1
            if trace:
                failures.append((seed, outcome, trace))
                print(f"seed {seed}: {outcome}", flush=True)
    return outcomes, failures


class _Here:
    """A pool of this process alone."""

    def __enter__(self) -> _Here:
        _quiet()
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @staticmethod
    def imap_unordered(function, items, chunksize):  # type: ignore[no-untyped-def]
        return map(function, items)


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    parser.add_argument("--seconds", type=float, help="stop after so long; default 60, or never with --cases")
    parser.add_argument("--cases", type=int, help="how many cases")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", type=int, help="run and describe this one case")
    given = parser.parse_args()
    if given.only is not None:
        _quiet()
        print("a loop" if given.only % 4 == 3 else draw_case(given.only)[0])
        _, outcome, trace = attempt(given.only)
        print(trace or outcome)
        return int(bool(trace))
    seconds = 60.0 if given.seconds is None and given.cases is None else given.seconds
    start = time.monotonic()
    outcomes, failures = run_cases(given.seed, given.cases, seconds, given.processes)
    minutes = (time.monotonic() - start) / 60
    for outcome, count in outcomes.most_common():
        print(f"{count:6} {outcome}")
    print(f"{sum(outcomes.values())} cases from seed {given.seed} in {minutes:.1f} minutes, {len(failures)} failed")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
