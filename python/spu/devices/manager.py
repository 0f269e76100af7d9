"""What hardware there is: devices, the cores a CPU device owns, and the memory each may use.

A CPU device (``cpu:0``, ``cpu:1``, ...) is our name for a set of cores: torch itself knows one CPU. Devices of one list
own disjoint cores, so that their stages run side by side, and as many of a processor's fast and small cores as each
other, because a plan takes them for equal. All of them share the host's memory, and so one budget.

The default budget is the memory available now less a reserve: a tenth of the host's memory (at least 1 GB) for the
system and Python; a twentieth of a GPU's memory (at least 256 MiB) for the driver's context and the allocator's
fragments; never more than half of what is available. A container's memory limit and CPU quota are respected.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import torch

from spu.common.units import format_bytes, split_pairs
from spu.devices.host import core_kinds, cpu_model, effective_cores, host_memory, physical_cores, usable_cores

__all__ = ["Device", "DeviceManager", "default_devices", "parse_bytes"]

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(?:(%)|(?:([kmgtp])(i?))?b)", re.IGNORECASE)
_CORES_FOR_GPUS = 2  # that CPU devices beside a GPU leave alone; at most a quarter of all
_LARGEST = 10**18  # bytes: more than any machine has, and few enough that sums of several fit 64 bits
_SIZE_FORMS = "8GB, 7.5GB, 512MB (powers of 1000), 8GiB (powers of 1024), 1000000B or 80%"


def parse_bytes(text: str | int, total: int | None = None) -> int:
    """Return the bytes of a size such as "8GB", "8 GiB", "512mb" or, when ``total`` is given, "80%".

    Units in any case: B, kB, MB, GB, TB, PB are powers of 1000, KiB, MiB, ... powers of 1024. An int is bytes already.

    Raises:
        ValueError: not a size, no unit, negative, or a percentage without a total.
        TypeError: neither text nor an int.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        raise TypeError(f"{text!r} is no size: text or a whole number of bytes is; valid: {_SIZE_FORMS}")
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"size {text} is negative; valid: {_SIZE_FORMS}")
        if text > _LARGEST:
            raise ValueError(f"size {text} is more memory than any machine has; valid: {_SIZE_FORMS}")
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        hint = f" (no unit: {text.strip()}GB?)" if re.fullmatch(r"[\d.]+", text.strip()) else ""
        raise ValueError(f"{text!r} is not a size{hint}; valid: {_SIZE_FORMS}")
    number = Decimal(match[1])
    if match[2]:
        if total is None:
            raise ValueError(f"{text!r}: a share needs a total to be a share of; valid here: 8GB, 8GiB, 1000000B")
        return int(number * total / 100)
    size = number * (1024 if match[4] else 1000) ** _UNITS[(match[3] or "").lower()]
    if size > _LARGEST:
        raise ValueError(f"{text!r} is more memory than any machine has; valid: {_SIZE_FORMS}")
    return int(size)


@dataclass(frozen=True)
class Device:
    """One place where a stage can run.

    Attributes:
        name: ours: ``"cpu:0"``, ``"cuda:0"``.
        torch_device: torch's: every ``cpu:k`` is ``torch.device("cpu")``.
        cores: logical cores that a CPU device owns; empty for a GPU.
        threads: torch threads a stage here runs with.
        memory_bytes: the whole memory behind the device; every ``cpu:k`` shows the host's, which they share.
        budget_bytes: what spu may use of it.
        description: model, cores, and where the budget comes from.
    """

    name: str
    torch_device: torch.device
    cores: tuple[int, ...]
    threads: int
    memory_bytes: int
    budget_bytes: int
    description: str

    def __str__(self) -> str:
        return self.name


Spec = str | torch.device | Device | Sequence[str | torch.device | Device]


class DeviceManager:
    """Finds devices and gives each its cores and its budget.

    Args:
        budget: ``"cuda:0=8GB,cpu=24GB"`` or a mapping of the same. Keys: ``cpu`` (split evenly among all ``cpu:k``),
            ``cpu:K``, ``cuda:K``. Values: see `parse_bytes`; ``%`` is of the device's whole memory. Other devices
            get the default.

    Raises:
        ValueError: a budget that is no size, is zero, is given twice, or is for a device that does not exist.
    """

    def __init__(self, budget: str | Mapping[str, str | int] | None = None) -> None:
        self._cuda = _cuda_models()
        self._host_total, self._host_available = host_memory()
        self._budgets = self._parse_budgets(budget)

    def get_devices(self, spec: Spec = "auto") -> list[Device]:
        """Return the devices named by ``spec``, in its order.

        Args:
            spec: ``"auto"`` (every GPU and one CPU device where there are GPUs, else the CPU in two halves, or one
                device if it has one core), a name (``"cpu"``: all cores), a comma-separated text, or a sequence of
                names, ``torch.device`` and `Device` (kept as they are). A bare ``"cpu"`` or ``"cuda"`` takes the
                lowest index not named otherwise: ``["cpu", "cpu"]`` is ``["cpu:0", "cpu:1"]``. With more ``cpu:k`` than
                cores they share cores in turn, one thread each.

        Raises:
            ValueError: an unknown device, one named twice, an empty list, or a budget that the devices cannot share.
        """
        items = self._items(spec)
        ready = {item.name: item for item in items if isinstance(item, Device)}
        names = _assign_names([item.name if isinstance(item, Device) else item for item in items], self.known())
        self._check_cpus([n for n in names if n.startswith("cpu:") and n not in ready])
        # Cores are shared out in index order, whatever the order in the list; cores of ready-made devices stay theirs.
        cpu_names = sorted((n for n in names if n.startswith("cpu:") and n not in ready), key=_index)
        taken = {core for device in ready.values() for core in device.cores}
        free = [c for c in usable_cores() if c not in taken] or usable_cores()
        if any(name.startswith("cuda:") for name in names):  # its worker and autograd's thread launch all the time
            free = free[: len(free) - min(_CORES_FOR_GPUS, len(free) // 4)]
        core_sets = _split_cores(free, len(cpu_names))
        budgets = self._cpu_budgets(cpu_names)
        made = dict(ready)
        for name, cores in zip(cpu_names, core_sets, strict=True):
            made[name] = self._cpu_device(name, cores, *budgets[name])
        for name in names:
            if name not in made:
                made[name] = self._cuda_device(name)
        return [made[name] for name in names]

    def host_budget(self) -> int:
        """Return what the budgets give CPUs, together; 0 if nothing."""
        return sum(size for name, size in self._budgets.items() if name.startswith("cpu"))

    def known(self) -> str:
        """Return the names that `get_devices` accepts here, for messages."""
        gpus = [f"cuda:{i} ({gpu[0]})" for i, gpu in enumerate(self._cuda)]
        cpu = f"cpu or cpu:0, cpu:1, ... ({len(usable_cores())} cores)"
        return ", ".join([*gpus, cpu]) + ("" if gpus else "; torch sees no CUDA device")

    def _items(self, spec: Spec) -> list[str | Device]:
        if isinstance(spec, str) and spec.strip().lower() == "auto":
            if self._cuda:
                return [*(f"cuda:{i}" for i in range(len(self._cuda))), "cpu"]
            return ["cpu"] * min(2, effective_cores())
        parts: list[str | torch.device | Device]
        if isinstance(spec, str):
            parts = list(spec.split(","))
        elif isinstance(spec, (torch.device, Device)):
            parts = [spec]
        elif spec is None or isinstance(spec, int):
            raise TypeError(
                f"devices is {spec!r}: name them, as in 'cpu:0,cpu:1' or ['cuda:0', 'cpu'], or give 'auto'; there is: "
                f"{self.known()}"
            )
        else:
            parts = [piece for part in spec for piece in (part.split(",") if isinstance(part, str) else [part])]
        items: list[str | Device] = []
        for part in parts:
            if not isinstance(part, (str, torch.device, Device)):
                raise TypeError(f"device {part!r} is a {type(part).__name__}; there is: {self.known()}")
            items.append(part if isinstance(part, Device) else self._check_name(str(part)))
        if not items:
            raise ValueError(f"no device was named; there is: {self.known()}")
        return items

    def _check_name(self, text: str) -> str:
        """Return ``text`` as a lower-case name; raise ValueError if no such device can exist here."""
        name = text.strip().lower()
        match = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", name)
        missing_gpu = match is not None and match[1] == "cuda" and int(match[2] or 0) >= len(self._cuda)
        if match is None or missing_gpu:
            raise ValueError(f"unknown device {text.strip()!r}; there is: {self.known()}")
        return match[1] + (f":{int(match[2])}" if match[2] else "")

    def _check_cpus(self, names: list[str]) -> None:
        """Raise ValueError for an index beyond the cores, unless a list names more CPU devices than cores, and all."""
        count = max(len(usable_cores()), len(names))
        for name in names:
            if _index(name) >= count:
                raise ValueError(
                    f"unknown device {name!r}: the {len(usable_cores())} cores make cpu:0 to cpu:{count - 1}; "
                    f"there is: {self.known()}"
                )

    def _parse_budgets(self, budget: str | Mapping[str, str | int] | None) -> dict[str, int]:
        if budget is None:
            return {}
        pairs: Iterable[tuple[str, str | int]]
        if isinstance(budget, str):
            pairs = split_pairs(budget)
        else:
            pairs = budget.items()
        budgets: dict[str, int] = {}
        for key, value in pairs:
            name = self._check_name(key)
            if name == "cuda":
                raise ValueError(f"budget {key}={value}: name the GPU, for example cuda:0={value}")
            if name in budgets:
                raise ValueError(
                    f"budget {key}={value}: {name} has one already, {format_bytes(budgets[name])}; give one"
                )
            total = self._cuda[_index(name)][1] if name.startswith("cuda") else self._host_total
            try:
                budgets[name] = parse_bytes(value, total)
            except (ValueError, TypeError) as error:
                raise type(error)(f"budget {key}={value}: {error}") from None
            if budgets[name] == 0:
                raise ValueError(f"budget {key}={value} is zero; leave {key} out of the devices, or give it memory")
            if budgets[name] > total:
                warnings.warn(
                    f"budget {key}={value} is more than the {format_bytes(total)} there is: a plan may not fit",
                    stacklevel=3,
                )
        return budgets

    def _cpu_budgets(self, names: list[str]) -> dict[str, tuple[int, str]]:
        """Return (budget, where it comes from) of each CPU device: they share the host's memory."""
        unused = [n for n in self._budgets if n.startswith("cpu:") and n not in names]
        if unused and names:
            raise ValueError(
                f"budget for unknown device {unused[0]!r}; the CPU devices here are {', '.join(names)} "
                "(the key 'cpu' is split among them)"
            )
        own = {n: self._budgets[n] for n in names if n in self._budgets}
        rest = [n for n in names if n not in own]
        result = {n: (size, "as given") for n, size in own.items()}
        if not rest:
            return result
        if "cpu" in self._budgets:
            pool, how = self._budgets["cpu"], "a share of the cpu budget" if len(names) > 1 else "as given"
        else:
            reserve = _host_reserve(self._host_total, self._host_available)
            pool = self._host_available - reserve
            how = f"{format_bytes(self._host_available)} available less {format_bytes(reserve)} kept for the system"
            how += f", shared by {len(names)}" if len(names) > 1 else ""
        left = pool - sum(own.values())
        if left < len(rest):
            given = ", ".join(f"{n}={format_bytes(size)}" for n, size in own.items())
            raise ValueError(
                f"budget {given} leaves nothing of the cpu budget {format_bytes(pool)} for {', '.join(rest)}; "
                "lower it, or give each CPU device its own budget"
            )
        return result | {n: (left // len(rest), how) for n in rest}

    def _cpu_device(self, name: str, cores: tuple[int, ...], budget: int, how: str) -> Device:
        # A CPU quota below the number of cores is shared in proportion.
        threads = max(1, min(physical_cores(cores), effective_cores() * len(cores) // len(usable_cores())))
        which = f"core {cores[0]}" if len(cores) == 1 else f"cores {_ranges(cores)}"
        text = f"{cpu_model()}, {which}; budget {format_bytes(budget)}: {how}"
        return Device(name, torch.device("cpu"), cores, threads, self._host_total, budget, text)

    def _cuda_device(self, name: str) -> Device:
        model, total = self._cuda[_index(name)]
        free, ours = _cuda_free(_index(name), total)
        budget, how = self._budgets.get(name), "as given"
        reserve = _cuda_reserve(total, free if budget is None else free + ours)
        if budget is not None and free + ours - reserve < budget <= total:
            have = format_bytes(free + ours)
            warnings.warn(
                f"budget {name}={format_bytes(budget)} is more than the {have} that are free: the driver and other "
                "programs have the rest, so a plan may not fit. Without a budget it is what is free, less a reserve"
                if free + ours < budget
                else f"budget {name}={format_bytes(budget)} leaves {format_bytes(free + ours - budget)} of the {have} "
                "that are free to what no plan counts, torch's fragments and the workspaces and kernels of libraries, "
                f"so a plan may not fit. Without a budget {format_bytes(reserve)} are kept for it",
                stacklevel=4,
            )
        if budget is None:
            budget = free - reserve
            how = f"{format_bytes(free)} available less {format_bytes(reserve)} kept for the driver"
        text = f"{model}; budget {format_bytes(budget)}: {how}"
        return Device(name, torch.device(name), (), 1, total, budget, text)


def default_devices(spec: Spec, residency: str, disk: Path | None = None) -> Spec:
    """Return ``spec``, where "auto" is one device with all cores if layers are to be streamed and there is no GPU.

    Also where they may be streamed, from ``disk``: with the few microbatches that little memory leaves, two halves wait
    for each other.
    """
    streams = residency in ("offloaded", "streamed") or (residency == "auto" and disk is not None)
    return "cpu" if streams and isinstance(spec, str) and spec == "auto" and not torch.cuda.is_available() else spec


def _split_cores(cores: list[int], parts: int) -> list[tuple[int, ...]]:
    """Return ``parts`` disjoint sets of cores, about as many of each kind in all, and as many together: runs of
    neighbours. Single cores in turn where there are fewer.
    """
    if parts > len(cores):
        return [(cores[i % len(cores)],) for i in range(parts)]
    kinds = core_kinds(cores) if parts else []
    if any(len(kind) < parts for kind in kinds):
        kinds = [cores]
    shares: list[list[int]] = [[] for _ in range(parts)]
    for kind in kinds:
        each, left = divmod(len(kind), parts)
        # One more to those that have the fewest: three fast cores and three small ones are three and three.
        more = sorted(range(parts), key=lambda i: (len(shares[i]), -i))[:left]
        sizes = [each + (i in more) for i in range(parts)]
        for share, end, size in zip(shares, itertools.accumulate(sizes), sizes, strict=True):
            share += kind[end - size : end]
    return [tuple(sorted(share)) for share in shares]


def _assign_names(names: list[str], known: str) -> list[str]:
    """Return full names: each bare "cpu" or "cuda" gets the lowest index of its kind that no other entry names."""
    used = [n for n in names if ":" in n]
    twice = next((n for n in used if used.count(n) > 1), None)
    if twice is not None:
        raise ValueError(f"device {twice!r} is named twice; give each stage its own, there is: {known}")
    result = []
    for name in names:
        if ":" not in name:
            kind = name
            name = next(full for i in range(len(names) + 1) if (full := f"{kind}:{i}") not in used)
            used.append(name)
        result.append(name)
    return result


def _index(name: str) -> int:
    return int(name.split(":")[1])


def _ranges(cores: Sequence[int]) -> str:
    """Return (0, 1, 2, 5) as "0-2,5"."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _cuda_models() -> list[tuple[str, int]]:
    """Return (model, total bytes) of each GPU that torch can use; none of them is touched."""
    if not torch.cuda.is_available():
        return []
    gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [(str(gpu.name), int(gpu.total_memory)) for gpu in gpus]


def _cuda_free(index: int, total: int) -> tuple[int, int]:
    """Return the bytes of a GPU that are free, with what torch keeps of tensors that are gone, and those of this
    process's tensors. Asking makes a context there, of hundreds of megabytes: only a GPU that is used is asked.
    """
    try:
        free = int(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:  # a GPU whose context cannot be made now (full, or in exclusive use)
        return total, 0
    ours = torch.cuda.memory_allocated(index)
    return free + torch.cuda.memory_reserved(index) - ours, ours


def _cuda_reserve(total: int, available: int) -> int:
    return min(max(total // 20, 256 << 20), available // 2)


def _host_reserve(total: int, available: int) -> int:
    return min(max(total // 10, 10**9), available // 2)
