"""Where the processes of one start meet: keys that no process of an earlier start has written.

torchrun's processes meet in its agent's store, which outlives a restart (``--max-restarts``) with all that the dead
have written, and process groups look for one another's addresses under the same keys at every start. So rank 0 gives
each start a name, and the keys of its process groups begin with that.
"""

from __future__ import annotations

import threading
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

__all__ = ["found_store", "meeting"]

_PAUSE_S = 0.01


def found_store(timeout_s: float) -> tuple[dist.Store, int, int]:
    """Return the store that torchrun's environment names, this process's rank, and how many there are.

    Raises:
        TimeoutError: nobody answers there. Torch's own timeout is for the connection; for the first answer of a server
            that is stopped, or whose machine has gone, it waits for ever.
    """
    found: list[Any] = []

    def find() -> None:
        try:
            found.append(next(rendezvous("env://", timeout=timedelta(seconds=timeout_s))))
        except Exception as error:
            found.append(error)

    finder = threading.Thread(target=find, name="spu rendezvous", daemon=True)
    finder.start()
    finder.join(timeout_s + 1)
    if not found:
        raise TimeoutError(
            f"torchrun's store (MASTER_ADDR, MASTER_PORT) takes connections and has not answered for {timeout_s:g} s: "
            "its process is stopped, or its machine has gone"
        )
    if isinstance(found[0], Exception):
        raise found[0]
    store, rank, size = found[0]
    return store, rank, size


def meeting(store: dist.Store, rank: int, size: int, timeout_s: float) -> dist.Store:
    """Return the part of a store that belongs to the processes of this start; called in each of them.

    A process asks with a word that nobody has used before, so that no answer is an old one. Rank 0 answers whoever has
    asked, the dead too, until each process has said that it knows this start's name.

    Args:
        store: that all processes see, and those of earlier starts have seen.
        rank, size: of this process, and how many there are.
        timeout_s: seconds after which a process gives up.

    Raises:
        TimeoutError: a process has not come; rank 0 says which.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        _answer(store, word, size, timeout_s)
    else:
        store.set(f"spu/asked/{rank}", word)
        try:
            store.wait([f"spu/told/{word}"], timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise TimeoutError(f"rank {rank} has heard nothing of rank 0 for {timeout_s:g} s: {error}") from error
        word = store.get(f"spu/told/{word}").decode()
        store.set(f"spu/here/{word}/{rank}", "")
    return dist.PrefixStore(f"spu/{word}", store)


def _answer(store: dist.Store, name: str, size: int, timeout_s: float) -> None:
    """Tell every process the name of this start; return when all know it."""
    missing = set(range(1, size))
    answered: dict[int, str] = {}
    end = time.monotonic() + timeout_s
    while missing:
        for rank in sorted(missing):
            if store.check([f"spu/here/{name}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"spu/asked/{rank}"]):
                word = store.get(f"spu/asked/{rank}").decode()
                if answered.get(rank) != word:
                    store.set(f"spu/told/{word}", name)
                    answered[rank] = word
        if missing and time.monotonic() > end:
            raise TimeoutError(f"rank 0 has waited {timeout_s:g} s for ranks {sorted(missing)}: their output says why")
        time.sleep(_PAUSE_S if missing else 0)
