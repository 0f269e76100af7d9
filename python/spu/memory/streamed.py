"""Streaming: a stage's tensors lie in a store below its device and come into slots for each visit.

A slot holds the weights of a whole stage. Stage ``s`` always uses slot ``s % slots``, so a stage's weights are at the
same address in its forward and in its backward: what autograd has saved of them in the forward (``weight.t()``, say)
is right in the backward too. While a stage is worked on, the next ones' weights are read.

An update is deferred to the stage's next visit, just before its weights are used: then gradients and the optimizer's
tensors come into a buffer, the stage's own optimizer runs, and what it has changed is written back while the stage
computes. So a step's update runs beside the next step, nothing is stale, and a weight is read twice a step whatever the
number of microbatches. In a backward visit the gradients add up in a buffer, which is written at its end. (The order
of layers, and an update that overlaps with the next forward, for SSDs: GreedySnake, arXiv:2512.17570. There a part of
the parameters is updated late; here all of them are, exactly.)

Beside a GPU the host updates. Then a slot holds weights alone and a buffer gradients alone; gradients and weights are
updated where they lie below, by a thread of the host, when the stage's visit comes near, and the new weights go to
their slot. Between runs the parameters of such a stage are on the CPU, like everything that lies below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from spu.memory.changes import Watch, take_out
from spu.memory.device_store import DeviceStore, HostUpdate, Part
from spu.memory.host_update import host_update
from spu.memory.residency import Visit
from spu.memory.store import Region, Store, StoreError, Ticket, settle
from spu.memory.unit import Absent, Entry, Piece, Unit, narrow
from spu.memory.work import Work

__all__ = ["Streamed"]


class Streamed:
    """The residency of stages whose tensors lie in a store below.

    Args:
        units: by stage; stages that are not in it are resident.
        store: where their pieces lie. With a `DeviceStore` the host updates.
        slots: uint8 memory for weights on the device, each large enough for the units that use it.
        buffers: uint8 memory for gradients and state (for gradients, if the host updates), each large enough for any
            unit; with two, one is filled or emptied while the other is worked on.
        work: updates, and takes gradients.
        slot_of: the slot of each unit; default: its index modulo their number. A unit with one of its own stays there.
    """

    def __init__(
        self,
        units: Mapping[int, Unit],
        store: Store,
        slots: Sequence[Tensor],
        buffers: Sequence[Tensor],
        work: Work,
        slot_of: Mapping[int, int] | None = None,
    ) -> None:
        self.units = dict(units)
        self.store = store
        self._host = store if isinstance(store, DeviceStore) else None  # updates
        self._slot_of = {index: index % len(slots) for index in units} if slot_of is None else dict(slot_of)
        self._slots, self._buffers, self._work = list(slots), list(buffers), work
        self._held: list[int | None] = [None] * len(self._slots)  # the unit whose weights are in each slot
        self._buffer_of: dict[int, int] = {}  # unit -> the buffer with its gradients and state
        self._turn = 0
        self._arriving: dict[int, list[Ticket]] = {}  # unit -> reads in progress
        self._leaving: dict[Region, Ticket] = {}  # writes in progress
        self._slot_writes: list[list[Region]] = [[] for _ in self._slots]
        self._buffer_writes: list[list[Region]] = [[] for _ in self._buffers]
        self._visits: list[Visit] = []
        self._at = self._ahead = 0
        self._current: Unit | None = None
        self._watch = Watch()
        self._failed: Exception | None = None
        self._filled: set[int] = set()
        self._shown = True  # tensors are in the store's own memory, where anybody may change them
        self._updating: set[int] = set()  # units whose update the host has begun
        self._update_error: Exception | None = None
        self._absent_below = Absent(self.units.values(), torch.device("cpu"))
        # While graphs of a stage live, autograd must not see its weights change their device.
        self._absent = Absent(self.units.values(), slots[0].device)

    @property
    def failed(self) -> bool:
        """Whether the store has failed, so that what it held is lost."""
        return self._failed is not None

    @property
    def slot_bytes(self) -> int:
        """Bytes of all slots and buffers."""
        return sum(memory.numel() for memory in (*self._slots, *self._buffers))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all regions of the units."""
        return sum({piece.region: piece.bytes for unit in self.units.values() for piece in unit.pieces}.values())

    # A run

    def begin(self, visits: Sequence[Visit]) -> None:
        """Take the order of the visits to come, and start to read what the first ones need.

        Raises:
            StoreError: the store has failed before: what it held is lost.
        """
        self._check()
        self.hide()
        self._put_absent(self._absent)
        self._visits, self._at, self._ahead = list(visits), 0, 0
        self._top_up()

    def fetch(self, visit: Visit) -> None:
        """Bring a stage's weights into their slot; run its deferred update first."""
        unit = self.units.get(visit.stage)
        assert self._visits[self._at] == visit, f"{visit} is not the visit that was announced"
        while self._ahead <= self._at:
            self._start(self._visits[self._ahead], must=True)
            self._ahead += 1
        self._at += 1
        if unit is None:
            return
        self._current = unit
        for ticket in self._arriving.pop(unit.index, ()):
            self._wait(ticket)
        self._updating.discard(unit.index)
        for piece, memory in self._weights(unit):
            piece.put(memory)
        if self._host is None and self._work.pending(unit.index):
            self._update(unit)
        self._watch.begin(unit, (memory for _, memory in self._weights(unit)))
        if visit.backward and unit.grads is not None:
            memory = self._buffers[self._take_buffer(unit)][: unit.sum_bytes]
            self._work.lend(unit.index, unit.accumulators.views(memory))
        self._top_up()

    def release(self, visit: Visit) -> None:
        """Send a stage's gradients below; its weights stay in the slot until another stage needs it."""
        unit = self.units.get(visit.stage)
        if unit is None:
            return
        self._watch.check(unit, (memory for _, memory in self._weights(unit)))
        if visit.backward and unit.grads is not None:
            memory = self._buffers[self._buffer_of[unit.index]]
            self._work.collect(unit.index, unit.accumulators.views(memory))
            if unit.sums is not None:
                narrow(unit.sums, unit.grads, memory)
            self._write(unit.grads, memory[: unit.grad_bytes], self._buffer_writes[self._buffer_of.pop(unit.index)])
        self._leave(unit)
        self._top_up()

    def end(self) -> None:
        """End a run, also one that failed: nothing is on the device any more."""
        self._visits, self._at, self._ahead = [], 0, 0
        if self._current is not None:
            self._leave(self._current)
        self._buffer_of.clear()
        arriving, self._arriving = self._arriving, {}
        for index, tickets in arriving.items():
            self._forget(self.units[index])
            settle(tickets)
        self._updating.clear()
        self._put_absent(self._absent_below)

    # Between runs

    def written_over(self) -> list[tuple[int, Entry]]:
        """Return the weights that somebody has changed while they were below, with their stages; drop the changes."""
        standing = self._absent if self._absent.device.type == "cpu" else self._absent_below
        return [] if self._shown else standing.written_over()

    def fill(self, unit: Unit) -> None:
        """Move those of a unit's present weights and state to the store that are not there: before the first run all of
        them, later what somebody has replaced."""
        self._work.prepare(unit.index)
        for piece in (*unit.weights, unit.state):
            if piece is not None:
                piece.move_to(self.store.home(piece.region), zeroed=unit.index not in self._filled)
        self._filled.add(unit.index)

    def show(self) -> None:
        """Run all deferred updates, and put every tensor where it lies in the store: the model is the user's again."""
        if self._shown:
            return
        self._check()
        waiting = [Visit(index, backward=False) for index in self.units if self._work.pending(index)]
        if self._host is not None:
            self._update_below([self.units[visit.stage] for visit in waiting])
            waiting = []
        self.begin(waiting)
        try:
            for visit in waiting:
                self.fetch(visit)
                self.release(visit)
        finally:
            self.end()
        self._wait_for(list(self._leaving))
        self.store.exposed(self._regions())
        for unit in self.units.values():
            for piece in unit.pieces:
                if piece is not unit.grads:
                    piece.put(self.store.home(piece.region))
        self._shown = True

    def hide(self) -> None:
        """Take back below what :meth:`show` has put into the user's hands."""
        if not self._shown:
            return
        take_out(self.units.values(), self.store)
        for unit in self.units.values():
            self.fill(unit)
        self.store.hidden(self._regions())
        self.forget()
        for unit in self.units.values():
            self._absent.put(*unit.weights, unit.state)
        self._shown = False

    def forget(self) -> None:
        """Take nothing that is in a slot as valid any more: the store's regions have been changed."""
        self._held = [None] * len(self._slots)

    def close(self) -> None:
        """Wait for what is in progress, close the store and let go of the slots; harmless when called twice."""
        settle(self._leaving.values())
        self._leaving.clear()
        self.store.close()
        self._slots, self._buffers = [], []

    # Inside

    def _put_absent(self, absent: Absent) -> None:
        """Put stand-ins where weights were, between runs or in them; those of a CPU are the same."""
        if not self._shown and self._absent.device.type != "cpu":
            for unit in self.units.values():
                absent.put(*unit.weights)

    def _update(self, unit: Unit) -> None:
        assert unit.grads is not None
        assert unit.state is not None
        index = self._buffer_of.pop(unit.index)
        buffer, split = self._buffers[index], unit.grad_bytes
        state = buffer[split : split + unit.state_bytes]
        unit.state.put(state)
        try:
            changed = self._work.update(unit.index, unit.grads.views(buffer[:split]))
        finally:
            self._absent.put(unit.state)
        if not changed:
            return
        self._write(unit.state, state, self._buffer_writes[index])
        own = {piece.region for piece in unit.written}
        for piece, memory in self._weights(unit):
            if piece.region in own:
                self._write(piece, memory, self._slot_writes[self._slot_of[unit.index]])
        self._forget_sharers(unit)

    def _forget_sharers(self, unit: Unit) -> None:
        """Note that the stages which share a weight with this one have read it before its update."""
        shared = {piece.region for piece in unit.shared} & unit.owned
        for other in self.units.values():
            if other is not unit and shared & {piece.region for piece in other.shared}:
                self._forget(other)

    def _update_below(self, units: Sequence[Unit]) -> None:
        """Let the host update units, and wait for it; their weights stay below."""
        assert self._host is not None
        for unit in units:
            parts = [Part(piece.region, piece.bytes, None) for piece in unit.written]
            self._wait(self._host.bring(self._slot_of[unit.index], parts, self._host_update(unit)))
            self._forget(unit)

    def _host_update(self, unit: Unit) -> HostUpdate:
        """Return a unit's update for a thread of the host."""
        assert unit.grads is not None
        self._wait_for([unit.grads.region])
        self._forget_sharers(unit)
        absent = self._absent if self._visits else self._absent_below
        return host_update(unit, self._work, absent, partial(setattr, self, "_update_error"))

    def _top_up(self) -> None:
        """Start to read for the visits to come, as far as slots and buffers are free."""
        while self._ahead < len(self._visits) and self._ahead - self._at < len(self._slots) - 1:
            if not self._start(self._visits[self._ahead], must=False):
                return
            self._ahead += 1

    def _start(self, visit: Visit, *, must: bool) -> bool:
        """Start to read what a visit needs; False if that has to wait until a slot or a buffer is free."""
        unit = self.units.get(visit.stage)
        if unit is None:
            return True
        updates = self._updates(unit)
        slot = self._slot_of[unit.index]
        held = self._held[slot] == unit.index
        if not must:
            buffer_lacks = self._host is None and updates and self._turn in self._buffer_of.values()
            if (not held and self._is_used(slot, unit)) or self._owner_waits(unit) or buffer_lacks:
                return False
        tickets = self._arriving.setdefault(unit.index, [])
        if self._host is not None:
            if updates or not held:
                self._held[slot] = unit.index
                come = {piece.region for piece in (unit.written if held else unit.weights)}
                parts = [Part(p.region, p.bytes, memory) for p, memory in self._weights(unit) if p.region in come]
                tickets.append(self._host.bring(slot, parts, self._host_update(unit) if updates else None))
                self._updating.update([unit.index] if updates else [])
            return True
        if not held:
            self._wait_for(self._slot_writes[slot])
            self._held[slot] = unit.index
            for piece, memory in self._weights(unit):
                tickets.append(self._read(piece, memory))
        if updates:
            assert unit.grads is not None
            assert unit.state is not None
            buffer, split = self._buffers[self._take_buffer(unit)], unit.grad_bytes
            tickets.append(self._read(unit.grads, buffer[:split]))
            tickets.append(self._read(unit.state, buffer[split : split + unit.state_bytes]))
        return True

    def _owner_waits(self, unit: Unit) -> bool:
        """Tell whether a weight that this unit shares is still to be updated by the stage that owns it."""
        others = {piece.region for piece in unit.shared} - unit.owned
        waits = self._updates if self._host is not None else lambda owner: self._work.pending(owner.index)
        return bool(others) and any(others & owner.owned and waits(owner) for owner in self.units.values())

    def _is_used(self, slot: int, unit: Unit) -> bool:
        """Tell whether another unit is worked on in a slot, or will be before this one."""
        before = [visit.stage for visit in self._visits[self._at : self._ahead]]
        before += [] if self._current is None else [self._current.index]
        return any(index != unit.index and self._slot_of.get(index) == slot for index in before)

    def _updates(self, unit: Unit) -> bool:
        """Tell whether a deferred update of a unit has still to be begun (where the host updates) or prepared."""
        started = self._updating if self._host is not None else self._buffer_of
        return self._work.pending(unit.index) and unit.index not in started

    def _take_buffer(self, unit: Unit) -> int:
        index = self._turn
        assert index not in self._buffer_of.values(), "a buffer is taken while it is in use"
        self._wait_for(self._buffer_writes[index])
        self._buffer_of[unit.index] = index
        self._turn = (index + 1) % len(self._buffers)
        return index

    def _weights(self, unit: Unit) -> Iterable[tuple[Piece, Tensor]]:
        memory, at = self._slots[self._slot_of[unit.index]], 0
        for piece in unit.weights:
            yield piece, memory[at : at + piece.bytes]
            at += piece.bytes

    def _read(self, piece: Piece, memory: Tensor) -> Ticket:
        self._wait_for([piece.region])
        return self.store.read(piece.region, memory)

    def _write(self, piece: Piece, memory: Tensor, users: list[Region]) -> None:
        self._wait_for([piece.region])
        self._leaving[piece.region] = self.store.write(piece.region, memory)
        users.append(piece.region)

    def _wait_for(self, regions: list[Region]) -> None:
        """Wait until the writes of these regions have ended."""
        for region in regions:
            ticket = self._leaving.pop(region, None)
            if ticket is not None:
                self._wait(ticket)
        regions.clear()

    def _wait(self, ticket: Ticket) -> None:
        try:
            ticket.wait()
        except Exception as error:
            if error is not self._update_error:  # which has left the tier below whole
                self._failed = error
            raise

    def _check(self) -> None:
        if self._failed is not None:
            raise StoreError(
                f"the tier below has failed, and what it held is lost: {self._failed}. Make a new trainer and load the "
                "last checkpoint"
            ) from self._failed

    def _leave(self, unit: Unit) -> None:
        """Put the stand-ins where a unit's weights were."""
        self._absent.put(*unit.weights)
        if self._current is unit:
            self._current = None

    def _forget(self, unit: Unit) -> None:
        slot = self._slot_of[unit.index]
        if self._held[slot] == unit.index:
            self._held[slot] = None

    def _regions(self) -> list[Region]:
        return list(dict.fromkeys(piece.region for unit in self.units.values() for piece in unit.pieces))
