"""Which backend serves an op: automatic by device and dtype, or forced by name.

A forced backend (``SPU_BACKEND`` or ``use_backend``) works or raises; only the automatic choice falls back, and says so
once. The choice is made when an op runs forward; its backward uses the same backend on whatever thread it runs.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .schema import BACKENDS, COMPOSED, SCHEMAS

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cpu": (torch.float16, torch.bfloat16, torch.float32),
}
_FIX = (
    "build the extensions in a checkout of spu, with a C++17 compiler: "
    "SPU_BUILD=1 pip install --no-build-isolation --no-deps --force-reinstall ."
)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can be used here; if not, the ``reason`` and a ``fix``."""

    name: str
    available: bool
    reason: str = ""
    fix: str = ""


class _Extension:
    """The C++ library, loaded at first need and at most once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._status: BackendStatus | None = None

    def status(self) -> BackendStatus:
        if self._status is None:
            with self._lock:
                if self._status is None:
                    self._status = self._load()
        return self._status

    @staticmethod
    def _load() -> BackendStatus:
        try:
            importlib.import_module("spu._C")  # importing it registers the kernels
        except ImportError as error:
            return BackendStatus("cpu", False, f"spu._C cannot be imported: {error}", _FIX)
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        needed = [name for name in SCHEMAS if name not in COMPOSED]
        missing = [name for name in needed if not has_kernel(f"spu::{name}.cpu", "CPU")]
        if missing:
            return BackendStatus("cpu", False, f"spu._C lacks {', '.join(missing)}: it is of another version", _FIX)
        return BackendStatus("cpu", True)


class _Forced(threading.local):
    """The override of each thread. (Not a ContextVar: torch.compile cannot trace one, but guards on this.)"""

    name: str | None = None


_EXTENSION = _Extension()
_FORCED = _Forced()
_FROM_ENVIRONMENT = os.environ.get("SPU_BACKEND") or None
_AUTOMATIC: dict[tuple[str, torch.dtype], str] = {}


def backends() -> dict[str, BackendStatus]:
    """All backends by name, each with the reason and the fix when it is unavailable."""
    return {"reference": BackendStatus("reference", True), "cpu": _EXTENSION.status()}


def _check_name(name: str, origin: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{origin} names an unknown backend {name!r}: use one of {', '.join(map(repr, BACKENDS))}")


def forced_backend() -> str | None:
    """The backend forced in this thread or by ``SPU_BACKEND``; None means automatic.

    Hand it to a worker thread and enter ``use_backend(name)`` there: the override is not inherited by threads.
    """
    return _FORCED.name or _FROM_ENVIRONMENT


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces a backend for the ops called inside, in this thread. None: as outside (does nothing).

    Raises:
        ValueError: for an unknown name.
        RuntimeError: if the backend is unavailable; the message says why and what would fix it.
    """
    if name is None:
        yield
        return
    _check_name(name, "use_backend()")
    _require(name)
    previous, _FORCED.name = _FORCED.name, name
    try:
        yield
    finally:
        _FORCED.name = previous


def _require(name: str) -> None:
    status = backends()[name]
    if not status.available:
        raise RuntimeError(f"backend {name!r} was asked for but is unavailable: {status.reason}. Fix: {status.fix}")


def _checked(name: str, device_type: str, dtype: torch.dtype) -> str:
    _check_name(name, "SPU_BACKEND")
    _require(name)
    if name == "cpu" and device_type != "cpu":
        raise ValueError(f"backend 'cpu' was forced but the tensor is on {device_type!r}: move it with .to('cpu')")
    if dtype not in DTYPES[name]:
        known = ", ".join(map(str, DTYPES[name]))
        raise TypeError(f"backend {name!r} was forced but does not compute in {dtype}: it knows {known}")
    return name


def _automatic(device_type: str, dtype: torch.dtype) -> str:
    if device_type != "cpu" or dtype not in DTYPES["cpu"]:
        return "reference"
    status = _EXTENSION.status()
    if status.available:
        return "cpu"
    warnings.warn(
        f"spu computes with plain torch (backend 'reference'), which is slow in 16 bits on a CPU: {status.reason}. "
        f"To make it fast, {status.fix}",
        RuntimeWarning,
        stacklevel=5,
    )
    return "reference"


# What torch.compiler.assume_constant_result does, without importing all of Dynamo for it: while tracing, the function
# is run as it stands (it may import the extension and warn) and its result is a constant of the graph.
_automatic._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(tensor: Tensor, dtype: torch.dtype | None = None) -> str:
    """The backend that will serve ``tensor``: the forced one, else the fastest that supports its device and dtype.

    Args:
        dtype: of the computation; default: the tensor's.

    Raises:
        RuntimeError, ValueError, TypeError: if a forced backend cannot serve it.
    """
    device_type, dtype = tensor.device.type, dtype or tensor.dtype
    name = _FORCED.name or _FROM_ENVIRONMENT
    if name is not None:
        return _checked(name, device_type, dtype)
    found = _AUTOMATIC.get((device_type, dtype))
    if found is None:
        found = _AUTOMATIC[device_type, dtype] = _automatic(device_type, dtype)
    return found
