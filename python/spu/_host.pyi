from collections.abc import Sequence

from spu.plan.core import Problem

def simulate(
    first: Sequence[int],
    stages: Sequence[int],
    kinds: Sequence[int],
    microbatches: Sequence[int],
    seconds: Sequence[float],
    transfers: Sequence[float],
) -> tuple[list[float], list[float]]: ...
def best_cuts(problem: Problem, slacks: Sequence[float]) -> list[list[int]]: ...
def nearest_cuts(problem: Problem) -> list[int]: ...
