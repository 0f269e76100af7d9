"""Which backend serves an op: automatic by device, dtype and shape, or forced by name.

A forced backend (``SPU_BACKEND`` or ``use_backend``) works or raises; only the automatic choice falls back, and says so
once. The choice is made when an op runs forward; its backward uses the same backend on whatever thread it runs.

On a CUDA device the automatic choice follows the measured tables of ``spu.kernels.table`` (by architecture, op, dtype
and shape class) among the backends that work there; where nothing was measured it takes the first of ``CUDA_BACKENDS``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spu.common import wire
from spu.common.dtypes import STORAGE
from spu.common.torch_private import carried, carry, constant_when_traced, operator_has_kernel
from spu.ops import cpu_table, schema
from spu.ops.schema import BACKENDS, COMPOSED, COMPOSED_REFERENCE, SCHEMAS

__all__ = [
    "CUDA_BACKENDS",
    "DTYPES",
    "BackendStatus",
    "Loader",
    "backends",
    "choose_backend",
    "cuda_candidates",
    "cuda_library_status",
    "forced_backend",
    "has_kernel",
    "select_cuda",
    "status_of",
    "use_backend",
]

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (*STORAGE, torch.float64),
    "cpu": STORAGE,
    "triton": STORAGE,
    "cuda": STORAGE,
}
CUDA_BACKENDS = ("triton", "cuda")  # those that serve CUDA tensors, the preferred one first
BUILD_LAUNCHER = "sudo apt-get install -y gcc python3-dev"  # what Triton's needs on a Debian
_BUILD = (
    "build the extensions in a checkout of spu, with a C++17 compiler: "
    "SPU_BUILD=1 pip install --no-build-isolation --no-deps --force-reinstall ."
)
_BUILD_CUDA = (
    "build it in a checkout of spu, with nvcc 12.4 or later: "
    "SPU_BUILD=1 SPU_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall ."
)


@dataclass(frozen=True)
class BackendStatus:
    """The state of a backend: ``available`` here, or a ``reason`` why not and a ``fix``.

    ``device_types`` are those whose tensors it takes; empty: any. ``composed`` names the ops that it has no kernel for:
    they are built from its smaller ops.
    """

    name: str
    available: bool
    reason: str = ""
    fix: str = ""
    device_types: tuple[str, ...] = ()
    composed: tuple[str, ...] = ()


class Loader:
    """A backend's library, loaded at first need and at most once."""

    def __init__(self, load: Callable[[], BackendStatus]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._status: BackendStatus | None = None

    def status(self) -> BackendStatus:
        if self._status is None:
            with self._lock:
                if self._status is None:
                    self._status = self._load()
        return self._status


def _load_cpu() -> BackendStatus:
    try:
        module = importlib.import_module("spu._C")  # importing it registers the kernels
    except ImportError as error:
        return BackendStatus("cpu", False, f"spu._C cannot be imported: {error}", _BUILD, ("cpu",))
    try:
        module.isa()
    except ValueError as error:  # SPU_CPU_ISA asks for what this processor lacks
        return BackendStatus(
            "cpu", False, str(error), "unset SPU_CPU_ISA, or set it to what the processor has", ("cpu",)
        )
    status = _library_status("cpu", "CPU", "spu._C", _BUILD)
    if status.available:
        _choose_products(module.isa())
    return status


def _choose_products(isa: str) -> None:
    """Let the tables of this processor's family say whose matrix products serve; say why where one cannot be read."""
    name = cpu_table.family(isa)
    try:
        cpu_table.install(cpu_table.tables(name) if name else ())
    except ValueError as error:
        warnings.warn(f"spu multiplies by its own kernels alone: {error}", RuntimeWarning, stacklevel=2)


def _load_triton() -> BackendStatus:
    def unavailable(reason: str, fix: str) -> BackendStatus:
        return BackendStatus("triton", False, reason, fix, ("cuda",))

    if importlib.util.find_spec("triton") is None:
        return unavailable("triton is not installed", "pip install 'triton>=3.6,<3.10'")
    cuda, recorded = torch.cuda.is_available(), _launches_are_recorded()
    if not cuda and not recorded and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return unavailable(
            "torch sees no CUDA device",
            "set TRITON_INTERPRET=1 before the start to run its kernels, slowly, on the CPU",
        )
    try:
        backend = importlib.import_module("spu.kernels.backend")
    except ImportError as error:
        return unavailable(f"spu.kernels cannot be imported: {error}", "pip install --upgrade 'triton>=3.6,<3.10'")
    if cuda and not recorded and not backend.interpreted() and (problem := backend.launch_problem()):
        return unavailable(problem, f"install a C compiler and Python's headers: {BUILD_LAUNCHER}")
    device_types = ("cuda", "cpu") if recorded or backend.interpreted() else ("cuda",)

    def pack(x: Tensor, codec: str) -> Tensor:
        return backend.IMPLEMENTATIONS["pack"](x, codec, wire.header(x.shape, x.dtype, codec))  # type: ignore[no-any-return]

    kernels = {**backend.IMPLEMENTATIONS, "pack": pack}
    guarded = {name: _on_its_device(kernel) for name, kernel in kernels.items()} if cuda else kernels
    schema.register_backend("triton", guarded, *(name.upper() for name in device_types))
    composed = tuple(sorted(name for name in COMPOSED if name not in kernels))
    return BackendStatus("triton", True, device_types=device_types, composed=composed)


def _launches_are_recorded() -> bool:
    """Tell whether this is inside ``spu.kernels.ahead.recording``, which takes CPU tensors for those of a GPU."""
    launch = sys.modules.get("spu.kernels.launch")
    return launch is not None and launch.stands_for_a_gpu()


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return the kernel with its first tensor's device as the current one, because Triton launches on the current
    device.
    """

    def run(first: Tensor | Sequence[Tensor], *args: Any) -> Any:
        tensor = first if isinstance(first, Tensor) else first[0] if first else None
        if tensor is None or not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
            return kernel(first, *args)
        with torch.cuda.device(tensor.device):
            return kernel(first, *args)

    return run


def _load_cuda() -> BackendStatus:
    def unavailable(reason: str, fix: str) -> BackendStatus:
        return BackendStatus("cuda", False, reason, fix, ("cuda",))

    if importlib.util.find_spec("spu._cuda") is None:
        return unavailable("spu._cuda is not built", _BUILD_CUDA)
    if not torch.cuda.is_available():
        return unavailable("torch sees no CUDA device", "see the row 'CUDA device' of `spu doctor`")
    try:
        module = importlib.import_module("spu._cuda")  # importing it registers the kernels
    except ImportError as error:
        return unavailable(f"spu._cuda cannot be imported: {error}", _BUILD_CUDA)
    from spu.ops import cuda_library

    if lacks := cuda_library.uncovered(module.architectures()):
        reason = f"spu._cuda was compiled for {module.architectures()}, which has no code for {', '.join(lacks)}"
        return unavailable(reason, f"SPU_CUDA_ARCHS={cuda_library.wanted()} as well: {_BUILD_CUDA}")
    status = cuda_library_status("CUDA")
    if status.available:
        cuda_library.choose_tiles(module)
    return status


def cuda_library_status(key: str) -> BackendStatus:
    """Return the status of the loaded library, whose kernels are registered for a dispatch key ("CUDA")."""
    return _library_status("cuda", key, "spu._cuda", _BUILD_CUDA)


def _library_status(backend: str, key: str, library: str, build: str) -> BackendStatus:
    lacks = [name for name in SCHEMAS if not operator_has_kernel(f"spu::{name}.{backend}", key)]
    missing = [name for name in lacks if name not in COMPOSED]
    device_types = (key.lower(),)
    if missing:
        reason = f"{library} lacks {', '.join(missing)}: it is of another version"
        return BackendStatus(backend, False, reason, build, device_types)
    return BackendStatus(backend, True, device_types=device_types, composed=tuple(lacks))


class _Forced(threading.local):
    """The override of each thread. (Not a ContextVar: torch.compile cannot trace one, but guards on this.)"""

    name: str | None = None


_REFERENCE = BackendStatus("reference", True, composed=COMPOSED_REFERENCE)
_LOADERS = {"cpu": Loader(_load_cpu), "triton": Loader(_load_triton), "cuda": Loader(_load_cuda)}
_FORCED = _Forced()
_CARRIED = "spu backend"
_FORCING: list[str] = []  # by threads now, and so perhaps for the backward that another one runs
_FROM_ENVIRONMENT = os.environ.get("SPU_BACKEND") or None
_AUTOMATIC: dict[tuple[torch.device, torch.dtype], str] = {}


def backends() -> dict[str, BackendStatus]:
    """Return all backends by name, each with the reason and the fix when it is unavailable."""
    return {"reference": _REFERENCE} | {name: one.status() for name, one in _LOADERS.items()}


def status_of(name: str) -> BackendStatus:
    """Return one backend's status; load no other."""
    return _REFERENCE if name == "reference" else _LOADERS[name].status()


def has_kernel(op: str, backend: str) -> bool:
    """Tell whether a backend serves an op by a kernel of its own, not by a composition of smaller ops."""
    return op not in status_of(backend).composed


def _check_name(name: str, origin: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{origin} names an unknown backend {name!r}: use one of {', '.join(map(repr, BACKENDS))}")


@constant_when_traced
def _callers() -> str | None:
    """Return what is forced where the backward was started that this thread runs: a GPU's has a thread of its own, in
    which layers are run again, and hooks.
    """
    return carried(_CARRIED) if _FORCING else None


def forced_backend() -> str | None:
    """Return the backend forced in this thread or by ``SPU_BACKEND``; None means automatic.

    Hand it to a worker thread and enter ``use_backend(name)`` there: the override is not inherited by threads, but for
    those in which autograd runs a backward.
    """
    return _FORCED.name or _callers() or _FROM_ENVIRONMENT


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a backend for the ops called inside, in this thread. None changes nothing.

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
    before = carried(_CARRIED)  # in a GPU's backward what its caller forces, and not this thread
    _FORCING.append(name)
    carry(_CARRIED, name)
    try:
        yield
    finally:
        carry(_CARRIED, before)
        _FORCING.remove(name)
        _FORCED.name = previous


def _require(name: str) -> BackendStatus:
    status = status_of(name)
    if not status.available:
        raise RuntimeError(f"backend {name!r} was asked for but is unavailable: {status.reason}. Fix: {status.fix}")
    return status


def _checked(name: str, device_type: str, dtype: torch.dtype) -> str:
    _check_name(name, "SPU_BACKEND")
    status = _require(name)
    if status.device_types and device_type not in status.device_types:
        where = status.device_types[0]
        raise ValueError(
            f"backend {name!r} was forced but the tensor is on {device_type!r}: move it with .to({where!r})"
        )
    if dtype not in DTYPES[name]:
        known = ", ".join(map(str, DTYPES[name]))
        raise TypeError(f"backend {name!r} was forced but does not compute in {dtype}: it knows {known}")
    return name


def _fall_back(reason: str, fix: str) -> str:
    warnings.warn(
        f"spu computes with plain torch (backend 'reference'), which is slow in 16 bits: {reason}. To make it fast, "
        f"{fix}",
        RuntimeWarning,
        stacklevel=6,
    )
    return "reference"


@constant_when_traced  # run as it stands while Dynamo traces: it may import the extension and warn
def _automatic(device_type: str, dtype: torch.dtype) -> str:
    if device_type == "cpu" and dtype in DTYPES["cpu"]:
        status = status_of("cpu")
        return "cpu" if status.available else _fall_back(status.reason, status.fix)
    if device_type == "cuda":
        works = cuda_candidates(dtype)
        if works:
            return works[0]
        if dtype in STORAGE:
            first = status_of(CUDA_BACKENDS[0])
            return _fall_back(first.reason, first.fix)
    return "reference"


def cuda_candidates(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the backends that can serve CUDA tensors of a dtype here, the preferred one first."""
    return tuple(name for name in CUDA_BACKENDS if dtype in DTYPES[name] and status_of(name).available)


@lru_cache(maxsize=4096)
def select_cuda(op: str, dtype: torch.dtype, capability: tuple[int, int], shape: tuple[int, ...]) -> str | None:
    """Return the backend that the tables prefer for an op of a shape (rows, columns, inner) on an architecture.

    None where they say nothing, or name a backend that does not work here.
    """
    from spu.kernels import table
    from spu.ops import cuda_library

    preferred = table.preferred_backend(capability, op, dtype, shape)
    if preferred == "cuda" and not cuda_library.takes(op, shape):  # measured on aligned rows
        return None
    return preferred if preferred in cuda_candidates(dtype) else None


def choose_backend(
    tensor: Tensor, dtype: torch.dtype | None = None, *, op: str = "", shape: tuple[int, ...] = ()
) -> str:
    """Return the backend that will serve ``tensor``: the forced one, else the fastest that supports its device and
    dtype.

    Args:
        dtype: of the computation; default: the tensor's.
        op: the op's name and ``shape`` its (rows, columns, inner) for the measured choice on CUDA devices; without
            them, and while torch.compile traces, the choice is by device and dtype alone.

    Raises:
        RuntimeError, ValueError, TypeError: if a forced backend cannot serve it.
    """
    device, dtype = tensor.device, dtype or tensor.dtype
    name = _FORCED.name or _callers() or _FROM_ENVIRONMENT
    if name is not None:
        return _checked(name, device.type, dtype)
    if op and tensor.is_cuda and not torch.compiler.is_compiling():
        selected = select_cuda(op, dtype, torch.cuda.get_device_capability(device), shape)
        if selected is not None:
            return selected
    found = _AUTOMATIC.get((device, dtype))
    if found is None:
        found = _AUTOMATIC[device, dtype] = _automatic(device.type, dtype)
    return found
