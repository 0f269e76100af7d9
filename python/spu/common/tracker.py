"""Counting the bytes of tensors as they come and go, whatever device or fake device they are on."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from spu.common.flops import flop_formulas
from spu.common.inner import inner_bytes
from spu.common.torch_private import TorchDispatchMode, packet_of, schema_of, storage_id, tree_leaves

__all__ = ["MemoryTracker", "Operators", "Tally", "Traffic"]


class Tally:
    """Bytes of live storages, and the most there have been. Safe to share between the trackers of several threads.

    Attributes:
        live: bytes of the storages that were seen made and are still in use.
        peak: the largest ``live`` since the tally was made or `restart` was called.
    """

    def __init__(self) -> None:
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}
        self._lock = threading.RLock()  # a storage may be freed by the collector, inside `add`

    def add(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage from now until it is freed; once, however many tensors share it."""
        storage = tensor.untyped_storage()
        key = storage_id(tensor)
        with self._lock:
            if key in self._known:
                return
            count = storage.nbytes()
            self._known[key] = weakref.finalize(storage, self._drop, key, count)
            self.live += count
            self.peak = max(self.peak, self.live)

    def reach(self, count: int) -> None:
        """Note that so many bytes were live for a moment beside those that are now."""
        with self._lock:
            self.peak = max(self.peak, self.live + count)

    def restart(self) -> None:
        """Set the peak to the bytes that are live now."""
        with self._lock:
            self.peak = self.live

    def _drop(self, key: int, count: int) -> None:
        with self._lock:
            del self._known[key]
            self.live -= count


class MemoryTracker(TorchDispatchMode):
    """Counts the storage of every tensor that an operator makes in the threads that have entered it.

    Works on real, meta and fake tensors alike, so that predictions on fake tensors and measurements on real ones count
    the same bytes. Of what a kernel allocates for itself, tensors of our own ops are counted (`inner_bytes`), and the
    room that a thread keeps for its products is not; nor are tensors from before.

    Args:
        tally: where to count; default: one of its own.
    """

    def __init__(self, tally: Tally | None = None) -> None:
        super().__init__()
        self.tally = tally or Tally()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {storage_id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for leaf in tree_leaves(result):
            # A view, or an argument changed in place, is memory from before.
            if isinstance(leaf, torch.Tensor) and storage_id(leaf) not in given:
                self.tally.add(leaf)
        self.tally.reach(inner_bytes(func, args))
        return result


class Operators(TorchDispatchMode):
    """Counts operators. (It cannot stop them: an error that is raised here may end the process in C++.)"""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


_FREE = ("mm", "addmm", "bmm", "baddbmm", "empty", "empty_like", "empty_strided", "new_empty")
"""Operators whose time does not depend on the bytes that they move."""


_WEIGHT_GRADIENTS = ("linear_dw_", "linear_dw_db_", "linear_dw_each_", "experts_dw_")
"""What schedules with split backwards put off."""


class Traffic(TorchDispatchMode):
    """Bytes that operators other than products read and write, and the work of weight gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes = 0
        self.deferred_flops = 0
        self._products = set(flop_formulas()) | {getattr(torch.ops.aten, name) for name in _FREE}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        packet = packet_of(func)
        if packet is not None and packet.__name__ in _WEIGHT_GRADIENTS:
            dzs = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.deferred_flops += sum(2 * dz.numel() for dz in dzs) * args[1].shape[-1]
        if packet in self._products:
            return result
        storages = {storage_id(t) for t in given}
        changes = any(argument.alias_info and argument.alias_info.is_write for argument in schema_of(func).arguments)
        if changes or any(storage_id(t) not in storages for t in made):
            self.moved_bytes += sum(t.numel() * t.element_size() for t in (*given, *made))
        return result
