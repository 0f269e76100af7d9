"""How fast devices and the links between them are: measured once, remembered as JSON.

The cache is one file a figure under ``$SPU_CACHE``, else ``$XDG_CACHE_HOME/spu``, else ``~/.cache/spu``; each holds the
hardware, the settings and the versions it is true for, and is ignored when any of these differs or the file is damaged.

A figure that a CPU reached while something else had its cores is used, but not remembered: the CPU time of the
measuring thread is then much less than the time on the clock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import platform
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch

from spu import __version__
from spu.common.dtypes import DTYPES
from spu.common.files import cache_directory, write_json
from spu.devices.host import cpu_model
from spu.devices.manager import Device
from spu.devices.pin import call_pinned

__all__ = [
    "DeviceSpeed",
    "LinkSpeed",
    "cache_directory",
    "identity",
    "linear_identity",
    "measure_device",
    "measure_link",
    "measure_loopback",
]

_FORMAT = 1
# Sides of the square product. The small one tells whether the large one is affordable (fp16 in plain torch on a CPU is
# two orders slower than fp32); the large ones fill the caches of a core, and a GPU.
_SMALL_SIDE, _CPU_SIDE, _CUDA_SIDE = 128, 768, 4096
_SECONDS_EACH = 0.15
# More than the caches of a core hold, and copied in a few milliseconds.
_COPY_BYTES = 64 << 20
_LINK_BYTES = 32 << 20
# A measuring thread that had its core for a smaller share of the time shared it with somebody.
_QUIET_SHARE = 0.8


@dataclass(frozen=True)
class DeviceSpeed:
    """FLOP/s of a square linear layer (2 per multiply-add) by dtype, and bytes/s of a copy.

    Attributes:
        fp32, bf16, fp16: FLOP/s; 0 in a dtype that the device cannot do.
        memory_bandwidth: bytes read and bytes written, per second.
        busy: something else had the device's cores meanwhile: the figures are not remembered.
    """

    fp32: float
    bf16: float
    fp16: float
    memory_bandwidth: float
    busy: bool = False


@dataclass(frozen=True)
class LinkSpeed:
    """Bytes/s of a link; ``busy`` as in `DeviceSpeed`."""

    bytes_per_s: float
    busy: bool = False


Values = dict[str, float]


def measure_device(device: Device, *, refresh: bool = False) -> DeviceSpeed:
    """Measure the device as a stage on it finds it: in a thread with its cores and its thread count.

    The linear layer is ``spu.ops.linear_act`` where it works, else torch's. Takes about a second.

    Args:
        device: which one.
        refresh: measure also where figures are remembered.
    """
    linear = _linear()

    def measure() -> Values:
        values = {name: _flops(linear, device.torch_device, dtype) for name, dtype in DTYPES.items()}
        return values | {"memory_bandwidth": _copy_bandwidth(device.torch_device)}

    key = {"what": "device", "device": identity(device), "linear": linear_identity()}
    names = [*DTYPES, "memory_bandwidth"]
    values, busy = _cached_values(key, names, lambda: _measure_on(device, measure), refresh)
    return DeviceSpeed(**values, busy=busy)


def measure_link(a: Device, b: Device, *, pinned: bool = True, refresh: bool = False) -> LinkSpeed:
    """Measure the link from ``a`` to ``b``: one tensor copied by a thread of ``b`` (of ``a`` where ``b`` is a GPU).

    Between CPU devices that is a copy in the host's memory, between GPUs one from peer to peer; for copies from and to
    a GPU host memory is page-locked, or pageable with ``pinned=False``.
    """

    def measure() -> Values:
        return {"bytes_per_s": _link_bandwidth(a.torch_device, b.torch_device, pinned)}

    key = {"what": "link", "from": identity(a), "to": identity(b)}
    if not pinned:
        key["memory"] = "pageable"
    worker = a if b.torch_device.type == "cuda" else b
    gpu = "cuda" in (a.torch_device.type, b.torch_device.type)
    values, busy = _cached_values(key, ["bytes_per_s"], lambda: _measure_on(worker, measure, waits=gpu), refresh)
    return LinkSpeed(values["bytes_per_s"], busy)


def measure_loopback(*, refresh: bool = False) -> float:
    """Return bytes/s from one process of this machine to another over TCP: of two threads with a socket between them.

    These threads wait for one another, so that their CPU time does not tell whether the machine is busy.
    """
    key = {"what": "loopback", "cpu": cpu_model(), "machine": platform.machine()}
    values, _ = _cached_values(key, ["bytes_per_s"], lambda: ({"bytes_per_s": _loopback_bandwidth()}, False), refresh)
    return values["bytes_per_s"]


# Measuring.


def _measure_on(device: Device, measure: Callable[[], Values], *, waits: bool = False) -> tuple[Values, bool]:
    """Return what ``measure`` returns in a thread pinned to the device, and whether others had its cores meanwhile.

    Args:
        device: where.
        measure: takes all its time on the CPU, where the device is one.
        waits: it also waits for a GPU, and so its CPU time tells nothing.
    """

    def timed() -> tuple[Values, bool]:
        wall, own = perf_counter(), thread_time()
        values = measure()
        busy = thread_time() - own < _QUIET_SHARE * (perf_counter() - wall)
        return values, busy and not waits and device.torch_device.type == "cpu"

    return call_pinned(device, timed)


def _linear() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return our linear layer, or torch's where ours is missing or does not run."""
    try:
        from spu.ops import linear_act

        one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        linear_act(one, one)
    except Exception:
        return torch.nn.functional.linear
    return linear_act


def _flops(linear: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of the median product; 0 if the device cannot do it in this dtype."""
    try:
        side, seconds = _SMALL_SIDE, _linear_seconds(linear, _SMALL_SIDE, device, dtype, 0.0)
        large = _CUDA_SIDE if device.type == "cuda" else _CPU_SIDE
        if seconds * (large / side) ** 3 < 2 * _SECONDS_EACH:
            side = large
        seconds = _linear_seconds(linear, side, device, dtype, _SECONDS_EACH)
    except RuntimeError:
        return 0.0
    return 2.0 * side**3 / seconds


def _linear_seconds(
    linear: Callable[..., torch.Tensor], side: int, device: torch.device, dtype: torch.dtype, budget_s: float
) -> float:
    # A generator of its own: measuring must not move the caller's random numbers.
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(side, side, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
        for _ in range(2)
    )
    with torch.no_grad():
        return _median_seconds(lambda: linear(x, weight), device, budget_s)


def _copy_bandwidth(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES // 4, device=device, dtype=torch.float32)
    target = torch.ones_like(source)
    return 2.0 * _COPY_BYTES / _median_seconds(lambda: target.copy_(source), device, _SECONDS_EACH)


def _link_bandwidth(a: torch.device, b: torch.device, pinned: bool) -> float:
    pin = pinned and {a.type, b.type} == {"cpu", "cuda"}
    sync = b if b.type == "cuda" else a
    # Page-locked memory needs a context: else it would make one on this thread's own GPU, which may be another.
    with torch.cuda.device(sync) if sync.type == "cuda" else contextlib.nullcontext():
        source = torch.ones(_LINK_BYTES // 4, device=a, pin_memory=pin and a.type == "cpu", dtype=torch.float32)
        target = torch.ones(_LINK_BYTES // 4, device=b, pin_memory=pin and b.type == "cpu", dtype=torch.float32)
        return _LINK_BYTES / _median_seconds(lambda: target.copy_(source), sync, _SECONDS_EACH)


def _loopback_bandwidth() -> float:
    payload, target = bytes(_LINK_BYTES), memoryview(bytearray(_LINK_BYTES))

    def receive(end: socket.socket) -> None:
        done = 0
        while done < _LINK_BYTES:
            done += end.recv_into(target[done:])
        end.sendall(b"!")

    def once() -> None:
        receiver = threading.Thread(target=receive, args=(there,))
        receiver.start()
        here.sendall(payload)
        here.recv(1)
        receiver.join()

    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as here:
        there, _ = server.accept()
        with there:
            return _LINK_BYTES / _median_seconds(once, torch.device("cpu"), _SECONDS_EACH)


def _median_seconds(function: Callable[[], Any], device: torch.device, budget_s: float) -> float:
    """Return median seconds of a call, after an unmeasured one; 1 to 20 samples, as many as ``budget_s`` allows."""

    def once() -> float:
        start = perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return perf_counter() - start

    once()
    samples = [once()]
    while sum(samples) < budget_s and len(samples) < 20:
        samples.append(once())
    return max(sorted(samples)[len(samples) // 2], 1e-9)


# What a figure is true for.


def identity(device: Device) -> dict[str, Any]:
    """Return what decides how fast the device is, as JSON takes it."""
    if device.torch_device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device.torch_device)
        return {"gpu": gpu.name, "memory": gpu.total_memory, "index": device.torch_device.index}
    cores = list(device.cores)
    return {"cpu": cpu_model(), "machine": platform.machine(), "cores": cores, "threads": device.threads}


def linear_identity() -> list[Any]:
    """Return what decides which linear kernel runs: a forced backend, the C++ one's build and its instruction set."""
    build = None
    try:
        module = importlib.import_module("spu._C")
        status = os.stat(str(module.__file__))
        build = [status.st_size, status.st_mtime_ns, module.isa()]
    except (ImportError, OSError, AttributeError):
        pass
    return [os.environ.get("SPU_BACKEND", ""), build, _linear() is not torch.nn.functional.linear]


@functools.lru_cache(maxsize=1)
def _versions() -> dict[str, Any]:
    return {"format": _FORMAT, "spu": __version__, "torch": torch.__version__}


# The cache.


def _cached_values(
    key: dict[str, Any], names: list[str], measure: Callable[[], tuple[Values, bool]], refresh: bool
) -> tuple[Values, bool]:
    """Return the remembered values of ``key``, else measured ones, and whether the device was busy meanwhile.

    Values of a busy device are not written. A cache that cannot be read or written is done without.
    """
    key = json.loads(json.dumps(key | _versions()))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = cache_directory() / f"{key['what']}-{digest[:16]}.json"
    remembered = None if refresh else _read(path, key, names)
    if remembered is not None:
        return remembered, False
    values, busy = measure()
    if not busy:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"key": key, "values": values})
    return values, busy


def _read(path: Path, key: dict[str, Any], names: list[str]) -> Values | None:
    """Return the file's values; None if it is missing, damaged or about something else."""
    try:
        entry = json.loads(path.read_bytes())
        values = {name: float(entry["values"][name]) for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = all(math.isfinite(value) and value >= 0 for value in values.values())
    return values if sound and entry.get("key") == key else None
