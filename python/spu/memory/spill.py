"""Large new tensors in files instead of memory: for building a model that does not fit."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spu.common.torch_private import CASTING_COPY, TorchDispatchMode
from spu.common.units import format_bytes
from spu.memory.store import ALIGNMENT, StoreError

__all__ = ["spilled"]

_FACTORIES = {
    torch.ops.aten.empty.memory_format: None,
    torch.ops.aten.zeros.default: 0.0,
    torch.ops.aten.ones.default: 1.0,
}


@contextmanager
def spilled(folder: str | os.PathLike[str], least_bytes: int = 1 << 20) -> Iterator[None]:
    """Put large CPU tensors that are made in this block into files that the system pages in and out.

    A model that is built or loaded in the block takes no memory of its own: its parameters lie in shared mappings of
    files, whose pages the system writes to the disk and drops when memory is short. Values are the same, bit for bit::

        with spu.spilled("/data/spill"):
            model = AutoModelForCausalLM.from_config(config)
        trainer = ModelParallelTrainer(model, "cpu:0", tiers="disk=/data/spill:100GB", residency="streamed")

    Only what makes tensors is caught: ``torch.empty``, ``zeros``, ``ones``, copies to another dtype, and clones. The
    files have no names, so they are gone with the last tensor that lies in them, or with the process.

    Args:
        folder: where the files are made; it is made too.
        least_bytes: smaller tensors stay in memory.

    Raises:
        StoreError: in the block: the disk is full, or the folder cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{path} cannot be made: {error.strerror}; name a folder on a disk with room") from error
    with _Spill(path, least_bytes):
        yield


class _Spill(TorchDispatchMode):
    def __init__(self, folder: Path, least_bytes: int) -> None:
        super().__init__()
        self._folder, self._least = folder, least_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            plain = kwargs.get("memory_format") in (None, torch.contiguous_format)
            if plain and self._takes(kwargs, torch.Size(args[0]).numel() * dtype.itemsize):
                made, value = self._new(args[0], dtype), _FACTORIES[func]
                return made if value is None else made.fill_(value)
        elif func is CASTING_COPY or func is torch.ops.aten.clone.default:
            (source,) = args
            dtype = kwargs.get("dtype") or source.dtype
            kept = kwargs.get("memory_format") in (None, torch.preserve_format, torch.contiguous_format)
            plain = source.device.type == "cpu" and source.layout == torch.strided and not source.is_quantized
            plain = plain and source.is_contiguous() and kept
            if plain and self._takes({"device": source.device} | kwargs, source.numel() * dtype.itemsize):
                return self._new(source.shape, dtype).copy_(source)
        return func(*args, **kwargs)

    def _takes(self, kwargs: dict[str, Any], size: int) -> bool:
        device, layout = kwargs.get("device"), kwargs.get("layout")
        on_cpu = torch.device(device if device is not None else "cpu").type == "cpu"
        large = size >= max(self._least, 1)  # there is no mapping of nothing
        return on_cpu and layout in (None, torch.strided) and not kwargs.get("pin_memory") and large

    def _new(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """Return a tensor in a file of its own, whose blocks are there."""
        numel = torch.Size(shape).numel()
        size = -(-numel * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        try:
            with tempfile.TemporaryFile(dir=self._folder, prefix="spu-spill-") as file:
                os.posix_fallocate(file.fileno(), 0, size)  # else a full disk shows as SIGBUS at some later write
                memory = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise StoreError(
                f"{format_bytes(size)} for a tensor of shape {tuple(shape)} cannot be had in {self._folder}: "
                f"{error.strerror}; name a folder with more room"
            ) from error
        # The memoryview keeps the mapping: torch keeps the object that it reads from, and not its buffer.
        return torch.frombuffer(memoryview(memory), dtype=dtype, count=numel).view(tuple(shape))
