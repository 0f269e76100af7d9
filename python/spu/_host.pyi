from collections.abc import Sequence

def simulate(
    first: Sequence[int],
    stages: Sequence[int],
    kinds: Sequence[int],
    microbatches: Sequence[int],
    seconds: Sequence[float],
    transfers: Sequence[float],
) -> tuple[list[float], list[float]]: ...
