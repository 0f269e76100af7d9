"""Where the weights of a run's model are until its layers have their places: in memory, on the disk, in their files."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from spu.devices.tiers import split_budget
from spu.memory.spill import spilled
from spu.train.config import TrainConfig

__all__ = ["beside_disk", "may_wait"]


def beside_disk(config: TrainConfig) -> AbstractContextManager[None]:
    """Return a context in which large new tensors lie on the budget's disk, where layers may be streamed from it."""
    disk = _spill_folder(config)
    return nullcontext() if disk is None else spilled(disk)


def may_wait(config: TrainConfig) -> bool:
    """Tell whether weights may stay in the model's own files until a trainer reads those of its stages.

    They are nowhere else then than where they stay, and what is frozen never exists in fp32. DoRA begins with the
    norms of all weights, so it reads them. Under a limit on the process's data (RLIMIT_DATA), which counts memory
    that nothing was written to, weights are made in files of the disk, if there is one.
    """
    if config.lora is not None and config.lora_kind == "dora":
        return False
    return not _data_is_limited() or config.engine == "distributed" or _spill_folder(config) is None


def _spill_folder(config: TrainConfig) -> Path | None:
    return None if config.residency == "resident" else split_budget(config.budget)[1].disk


def _data_is_limited() -> bool:
    try:
        import resource
    except ImportError:  # not on Windows
        return False
    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY
