"""The processes of a distributed training: which there are, what each has, and what they tell one another.

torchrun starts them and says in environment variables where they meet. A process is a place in a pipeline of stages;
with several pipelines, each with rows of the batch of its own, it is in two groups: its pipeline's, and its place's.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

if dist.is_available():  # pipelining imports it: once a group is there, the defaults of its functions would keep that
    import torch.distributed.nn.functional

from spu.common.raw import bytes_of
from spu.devices.manager import Device, DeviceManager, Spec
from spu.distributed.collectives import added, gathered
from spu.distributed.consistency import HINTS
from spu.distributed.cores import described, share_of, where
from spu.distributed.lent_cores import lent_cores
from spu.distributed.meeting import found_store, meeting
from spu.distributed.sockets import Connections
from spu.distributed.step_consistency import check_told

__all__ = ["Job", "join", "leave"]


def join(devices: Spec, timeout_s: int) -> bool:
    """Join the process group that torchrun's environment describes; return False where this process is in one.

    Args:
        devices: as in `Job`.
        timeout_s: seconds after which a process that waits for another one gives up.

    Raises:
        ValueError: not started by torchrun.
        TimeoutError: another process has not come.
    """
    if not dist.is_available():
        raise ValueError("engine='distributed' needs a torch with torch.distributed; this one was built without")
    if dist.is_initialized():
        return False
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "engine='distributed' runs in processes that torchrun starts: torchrun --nproc-per-node 2 script.py; this "
            "one was started alone (no RANK and WORLD_SIZE in its environment)"
        )
    backend, timeout = "nccl" if _kind_of(devices) == "cuda" else "gloo", timedelta(seconds=timeout_s)
    store, rank, size = found_store(timeout_s)
    store = meeting(store, rank, size, timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    atexit.register(leave)
    return True


def leave() -> None:
    """Leave the process group that :func:`join` has joined; harmless when called twice.

    Its threads have ended when this returns, if nobody keeps the group. One that still had a message's tensor in hand
    while Python ends would wait for the interpreter's lock, which is not given any more: the process would abort.
    """
    atexit.unregister(leave)
    for job in list(_JOBS):
        job.let_go()
    if dist.is_initialized():
        dist.destroy_process_group()


class GroupUser(Protocol):
    """What keeps process groups of a job."""

    def under_way(self) -> bool:
        """Tell whether something is on its way that nobody waits for: a step has failed meanwhile."""

    def let_go(self) -> None:
        """Keep none any more; nothing runs afterwards."""


class Job:
    """The processes of a training, seen from one of them.

    Args:
        devices: this process's device, or "auto": the GPU of its number on its machine, or the CPU with its share of
            the cores (`spu.distributed.cores`), or the threads that were chosen for it.
        replicas: pipelines side by side, each with rows of the batch of its own.
        timeout_s: seconds after which a process that waits for another one gives up.

    Attributes:
        rank, size: of this process, and how many there are.
        replica, replicas: the pipeline that this process is in, and how many there are.
        place: in that pipeline.
        device: this process's.
        devices: of the first pipeline's places, named "rank0", "rank1", ...
        pipeline: the process group of this pipeline; None: all processes.
        alike: that of the processes at this place; None: this one alone.

    Raises:
        ValueError: not started by torchrun and in no process group, more than one device, or a number of processes
            that is no multiple of the replicas.
        ConnectionError: another process has ended.
    """

    def __init__(self, devices: Spec = "auto", *, replicas: int = 1, timeout_s: int = 600) -> None:
        self._joined = join(devices, timeout_s)
        self._users: weakref.WeakSet[GroupUser] = weakref.WeakSet()
        self._connections = Connections()  # of the groups that are made here, in which sums go on beside the work
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size % replicas:
            raise ValueError(
                f"{self.size} processes are no whole number of stages for replicas={replicas}: start a multiple of it"
            )
        self.replicas = replicas
        self.replica, self.place = divmod(self.rank, self.size // replicas)
        # The type of device whose memory the group's transport reads.
        self._carries = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
        self.pipeline: dist.ProcessGroup | None = None
        self.alike: dist.ProcessGroup | None = None
        _JOBS.add(self)
        if replicas > 1:
            ranks, timeout = torch.arange(self.size, device="cpu").view(replicas, -1), timedelta(seconds=timeout_s)
            # Not by a DeviceMesh: its groups wait for half an hour, and one of all processes is torch's default group.
            with self.exchanging("addresses", range(self.size)), self._connections.made_here():
                self.pipeline, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)
                self.alike, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=timeout)
        self.device = _own_device(devices, self.rank)
        self._share = share_of(self.gathered(where(self.device)), self.rank)
        self._lent = None
        with contextlib.ExitStack() as undone:  # of a job that nobody gets, nobody can close
            if self._share is not None:
                undone.callback(self._share.give_back)
                self.device = self._share.of(self.device)
                if self._share.of_all:
                    assert dist.group.WORLD is not None
                    with self.exchanging("where they lend cores", range(self.size)):
                        self._lent = lent_cores(dist.group.WORLD, self._share.of_all)
            if self._lent is not None:
                undone.callback(self._lent.close)
            everyones = self.gathered(_told(self.device))
            undone.pop_all()
        self.devices: list[Device] = [_Told(*told).device for told in everyones[: self.size // replicas]]

    def gathered(self, value: Any) -> list[Any]:
        """Return every process's value, by rank.

        Raises:
            ConnectionError: one of them has ended.
        """
        everyones: list[Any] = [None] * self.size
        with self.exchanging("what each knows", range(self.size)):
            dist.all_gather_object(everyones, value)
        return everyones

    def decided(self, make: Callable[[], str], what: str) -> str:
        """Return what rank 0 makes; called in every process.

        Args:
            make: called in rank 0.
            what: it does, for errors.

        Raises:
            ValueError: it failed there; rank 0 itself raises what it met.
        """
        box: list[Any] = [None, ""]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                failure, box[1] = error, f"{type(error).__name__}: {error}"
        with self.exchanging("what rank 0 decides", range(self.size)):
            dist.broadcast_object_list(box, src=0)
        if failure is not None:
            raise failure
        if box[0] is None:
            raise ValueError(f"rank 0 could not {what}: {box[1]}")
        return str(box[0])

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raise ValueError, in every process, where the processes differ in one of these facts (of JSON)."""
        everyones = self.gathered(dict(facts))
        for name in facts:
            others = [rank for rank, theirs in enumerate(everyones) if theirs.get(name) != everyones[0].get(name)]
            if others:
                hint = f", {HINTS[name]}" if name in HINTS else ""
                raise ValueError(
                    f"rank {others[0]} has another {name} than rank 0: every process must have the same one{hint}"
                )

    def places(self, count: int) -> list[Device]:
        """Return where the stages of each place are: the others' on this host's CPU, without a stage that runs."""
        away = [dataclasses.replace(device, torch_device=torch.device("cpu")) for device in self.devices[:count]]
        return [self.device if k == self.place else device for k, device in enumerate(away)]

    def neighbours(self, ranks: Sequence[int]) -> dict[int, list[int]]:
        """Return the ranks that this process exchanges messages with, and the stages of each."""
        own = {stage for stage, place in enumerate(ranks) if place == self.place}
        beside = {s + d for s in own for d in (-1, 1) if 0 <= s + d < len(ranks)} - own
        found: dict[int, list[int]] = {}
        for stage in sorted(beside):
            found.setdefault(self.rank_of(ranks[stage]), []).append(stage)
        return found

    @property
    def leads(self) -> bool:
        """Whether this process is in the pipeline whose state stands for all."""
        return self.replica == 0

    @property
    def transport(self) -> str:
        """The process group's backend: "gloo" or "nccl"."""
        return str(dist.get_backend())

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        """Send a tensor's bytes to another process, which waits for them."""
        if tensor.numel():
            dist.send(bytes_of(tensor).to(self._carries), rank)

    def post(self, tensor: torch.Tensor, rank: int) -> list[tuple[dist.Work, torch.Tensor]]:
        """Send a tensor's bytes as :meth:`send`, without waiting; return what to wait for and to keep."""
        flat = bytes_of(tensor).to(self._carries)
        work = dist.isend(flat, rank) if flat.numel() else None
        return [] if work is None else [(work, flat)]

    def rank_of(self, place: int) -> int:
        """Return the rank of a place in this process's pipeline."""
        return self.rank - self.place + place

    def receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> torch.Tensor:
        """Return, on the CPU, the tensor that another process sends."""
        made = torch.empty(tuple(shape), dtype=dtype, device="cpu")
        if made.numel():
            flat = made.view(-1).view(torch.uint8)
            raw = flat if self._carries.type == "cpu" else torch.empty_like(flat, device=self._carries)
            dist.recv(raw, rank)
            if raw is not flat:
                flat.copy_(raw)
        return made

    def total(self, values: torch.Tensor, told: Mapping[str, float | torch.Tensor]) -> torch.Tensor:
        """Return the sum over all processes, the same in each.

        Args:
            values: fp64, of one dimension.
            told: facts that travel with them: see `spu.distributed.step_consistency`.

        Raises:
            ConnectionError: another process has ended, or no longer answers.
            ValueError: the processes differ in one, in every process.
        """
        facts = torch.stack([torch.as_tensor(fact, dtype=values.dtype, device=values.device) for fact in told.values()])
        with self.exchanging("the end of a step", range(self.size)), self.idle():
            everyones = gathered(torch.cat([values, facts]))
        last = len(values)
        names = [dict(zip(told, own[last:].tolist(), strict=True)) for own in everyones]
        check_told(names, [rank % (self.size // self.replicas) for rank in range(self.size)], HINTS)
        return added([own[:last] for own in everyones])

    def idle(self) -> AbstractContextManager[None]:
        """Return a context in which this process only waits: others of its machine may have its cores meanwhile."""
        return _BUSY if self._lent is None else self._lent

    @contextlib.contextmanager
    def exchanging(self, what: str, ranks: Iterable[int]) -> Iterator[None]:
        """Return a context for an exchange with other processes.

        Raises:
            ConnectionError: inside, torch.distributed has lost one of them.
        """
        try:
            yield
        except RuntimeError as error:  # of torch.distributed
            others = [str(rank) for rank in ranks if rank != self.rank]
            many, of = ("", "") if len(others) == 1 else ("s", "one of ")
            raise ConnectionError(
                f"rank {self.rank} exchanged {what} with rank{many} {', '.join(others)}, {of}which has ended or no "
                f"longer answers; its own output says why. torch: {type(error).__name__}: {error}"
            ) from error

    def let_go_with(self, user: GroupUser) -> None:
        """Have :meth:`let_go` call that of an object that keeps a group."""
        self._users.add(user)

    def let_go(self) -> None:
        """Destroy the groups that were made here, and keep none of them; harmless when called twice.

        What is under way in them after a failure is given up: the others hear at once that this process has left.
        """
        if any(user.under_way() for user in list(self._users)):
            self._connections.shut_down()
        for user in list(self._users):
            user.let_go()
        made, self.pipeline, self.alike = (self.pipeline, self.alike), None, None
        for group in made:
            if group is not None and dist.is_initialized():
                with contextlib.suppress(ValueError):  # whose the default group is has ended these with it
                    dist.destroy_process_group(group)

    def close(self) -> None:
        """Leave the process group, if it was joined here, and the cores; harmless when called twice."""
        self.let_go()
        if self._lent is not None:
            self._lent.close()
        if self._share is not None:
            self._share.give_back()
        if self._joined:
            leave()
        self._joined = False


_JOBS: weakref.WeakSet[Job] = weakref.WeakSet()
_BUSY = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class _Told:
    """What the others are told of a device."""

    name: str
    kind: str
    index: int | None
    threads: int
    memory_bytes: int
    budget_bytes: int
    description: str

    @property
    def device(self) -> Device:
        place = torch.device(self.kind) if self.index is None else torch.device(self.kind, self.index)
        return Device(self.name, place, (), self.threads, self.memory_bytes, self.budget_bytes, self.description)


def _told(device: Device) -> tuple[Any, ...]:
    place = device.torch_device
    return (
        device.name,
        place.type,
        place.index,
        device.threads,
        device.memory_bytes,
        device.budget_bytes,
        device.description,
    )


def _kind_of(devices: Spec) -> str:
    if devices != "auto":
        return "cuda" if "cuda" in str(devices) else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _own_device(devices: Spec, rank: int) -> Device:
    local, beside = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    automatic = devices == "auto"
    if automatic and torch.cuda.is_available():
        devices = f"cuda:{local % torch.cuda.device_count()}"
    elif automatic:
        devices = "cpu"
    found = DeviceManager().get_devices(devices)
    if len(found) != 1:
        raise ValueError(
            f"engine='distributed' has one device in each process, and {len(found)} were given: "
            f"{', '.join(device.name for device in found)}; leave devices out, or give this process's own"
        )
    device = found[0]
    if device.torch_device.type == "cuda":
        torch.cuda.set_device(device.torch_device)
        return dataclasses.replace(device, name=f"rank{rank}")
    if automatic and beside > 1:
        one = DeviceManager().get_devices(["cpu"] * beside)[0]
        text = described(device.description, one.description)
        device = dataclasses.replace(device, budget_bytes=one.budget_bytes, description=text)
    return dataclasses.replace(device, name=f"rank{rank}", cores=(), threads=torch.get_num_threads())
