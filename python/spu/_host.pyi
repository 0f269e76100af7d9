from collections.abc import Sequence

from typing_extensions import Buffer

def simulate(
    first: Sequence[int],
    stages: Sequence[int],
    kinds: Sequence[int],
    microbatches: Sequence[int],
    seconds: Sequence[float],
    transfers: Sequence[float],
) -> tuple[list[float], list[float]]: ...
def crc32c(data: Buffer, before: int = 0) -> int: ...
def crc32c_by_tables(data: Buffer, before: int = 0) -> int: ...
