"""Every run of layers on one stage: its seconds, its bytes, and the layers that it recomputes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spu.plan.memory import state_bytes
from spu.plan.partition import Table, runs, sums_between

if TYPE_CHECKING:
    from spu.plan.request import Request

__all__ = ["LayerArrays", "StageTable"]

Bytes = NDArray[np.int64]

_MOST_CELLS = 1 << 22
"""Of the arrays [layers, runs] in which recompute is decided."""


class LayerArrays:
    """The layers' costs as arrays, for all stages of a request alike: [L] each, or [first, stop] of every run."""

    def __init__(self, request: Request) -> None:
        layers, precision, state = request.layers, request.settings.precision, request.settings.state
        deferred = request.memory.deferred
        self.inputs = _bytes(layer.input_bytes for layer in layers)
        self.own = _bytes(layer.own_bytes + (layer.deferred_bytes if deferred else 0) for layer in layers)
        output_saved = [False, *(layer.output_saved for layer in layers[:-1])]
        self.input_saved = np.array([layer.input_saved for layer in layers])
        self.inner = np.where(self.input_saved | output_saved, self.inputs, 0)
        extra = _bytes(layer.extra_bytes(deferred) for layer in layers)
        self.extra, self.extra_recomputed = _largest_between(extra), extra + [layer.own_bytes for layer in layers]
        self.each = sums_between(self.own)
        self.each[:-1] += sums_between(self.inner)[1:]  # where the first layer's input is, its stage says
        own = (sum(state_bytes(layer, precision, k, state)) for k, layer in enumerate(layers))
        self.states = sums_between(_bytes(own))
        for k, layer in enumerate(layers):
            if layer.ties:  # what the layers of a run share is counted once
                states = _bytes(sum(state_bytes(layer, precision, first, state)) for first in range(k + 1))
                self.states[: k + 1, k + 1 :] += (states - states[k])[:, None]


class StageTable:
    """Seconds and bytes of every run of layers on one stage, as matrices [first, stop] of L + 1 rows and columns.

    The bytes are a bound of what `StageMemory` counts, as a sum: a stage's first layer, its last one and all of its
    layers each add their part. What deferred weight gradients of recomputed layers keep is left out. Where recompute is
    "auto", as few layers are recomputed as the budget requires, those first that save most bytes for a second of work.

    Args:
        request: what is to be placed.
        stage: the stage's index.
        budget: bytes that the stage may use.
    """

    def __init__(self, request: Request, stage: int, budget: int) -> None:
        self._request, self._stage, self._budget = request, stage, budget
        self._layers, self._mode = request.arrays, request.settings.recompute.mode
        self._times = request.times[request.ranks[stage]]
        wires_in, entering, entering_recomputed, enter_s = self._start()
        wires_out, leaving, workspace, leave_s = self._end()
        fixed = self._layers.states + wires_in[:, None] + wires_out[None, :]
        each = self._layers.each + entering[:, None] + leaving[None, :]
        extra = np.maximum(self._layers.extra, workspace)
        work = np.array([forward + backward for forward, backward in self._times[:-1]])
        self._seconds = sums_between(work) + enter_s[:, None] + leave_s[None, :]
        self._needed = fixed + request.memory.in_flight[stage] * each + extra
        self._valid = runs(len(work))
        self._tried = np.zeros(fixed.shape, np.int64)
        if self._mode in ("auto", "all"):
            # What recomputing a layer saves, if it is the first of its stage, and if it is not.
            self._saved_first = self._layers.own + (entering - entering_recomputed)[:-1]
            self._saved = self._layers.own + self._layers.inner - self._layers.inputs
            self._order = self._most_worth_first()
            chosen = self._valid & (self._needed > budget) if self._mode == "auto" else self._valid
            if self._mode == "auto" and chosen.any():
                chosen &= ~self._settle_hopeless(chosen, fixed, each, extra)
            rows, columns = np.nonzero(chosen)
            for start in range(0, len(rows), size := max(_MOST_CELLS // len(work), 1)):
                at = rows[start : start + size], columns[start : start + size]
                self._recompute(at, fixed[at], each[at], extra[at])

    def fitting(self) -> Table:
        """Return the seconds of the runs that are within the budget, infinity elsewhere."""
        return np.where(self._valid & (self._needed <= self._budget), self._seconds, math.inf)

    def lacking(self) -> Table:
        """Return the bytes that each run needs beyond the budget, below 0 where some are left over."""
        return np.where(self._valid, (self._needed - self._budget).astype(np.float64), math.inf)

    def recomputed(self, first: int, stop: int) -> tuple[int, ...]:
        """Return the layers that a stage with layers `first` to `stop - 1` recomputes."""
        if not self._tried[first, stop]:
            return ()
        tried = [int(k) for k in self._order[: self._tried[first, stop]] if first <= k < stop]
        if self._mode == "auto":
            tried = [k for k in tried if (self._saved_first if k == first else self._saved)[k] > 0]
        return tuple(sorted(tried))

    def _settle_hopeless(self, runs_: NDArray[np.bool_], fixed: Bytes, each: Bytes, extra: Bytes) -> NDArray[np.bool_]:
        """Recompute all layers that save anything of those runs that no recompute makes fit; return which these are."""
        inside, first = np.maximum(self._saved, 0), np.maximum(self._saved_first, 0)
        saved = sums_between(inside)
        saved[:-1] += (first - inside)[:, None]
        least = fixed + self._request.memory.in_flight[self._stage] * (each - saved)
        hopeless = runs_ & (least + extra > self._budget)
        recomputed = _largest_between(np.where(self._saved > 0, self._layers.extra_recomputed, 0))
        at_first = np.where(self._saved_first > 0, self._layers.extra_recomputed, 0)
        extra = np.maximum(extra, np.append(np.maximum(recomputed[1:], at_first[:, None]), recomputed[:1], axis=0))
        self._needed[hopeless] = (least + extra)[hopeless]
        self._tried[hopeless] = len(self._order)
        return hopeless

    def _recompute(self, at: tuple[Bytes, Bytes], fixed: Bytes, each: Bytes, extra: Bytes) -> None:
        """Recompute layers of the runs at these places, one after the other as long as the budget asks for it."""
        k, (firsts, stops) = self._order[:, None], at
        saved = np.where(k == firsts, self._saved_first[k], self._saved[k])  # [L, runs]
        more = (firsts <= k) & (k < stops)
        more &= (saved > 0) | (self._mode == "all")
        each = each - np.cumsum(more * saved, axis=0)
        extra = np.maximum(extra, np.maximum.accumulate(more * self._layers.extra_recomputed[k], axis=0))
        needed = fixed + self._request.memory.in_flight[self._stage] * each + extra
        forward = np.array([seconds for seconds, _ in self._times[:-1]])[k]
        seconds = np.cumsum(np.concatenate([self._seconds[at][None, :], more * forward]), axis=0)[1:]
        last = np.full(len(firsts), len(k) - 1)
        if self._mode == "auto":
            enough = needed <= self._budget
            last = np.where(enough.any(axis=0), enough.argmax(axis=0), last)
        self._tried[at] = last + 1
        self._needed[at] = needed[last, np.arange(len(last))]
        self._seconds[at] = seconds[last, np.arange(len(last))]

    def _most_worth_first(self) -> Bytes:
        """Return the layers by the bytes that recomputing them saves in a second, most first; ties by index."""

        def worth(k: int) -> float:
            saved, seconds = float(self._saved[k]), self._times[k][0]
            return saved / seconds if seconds > 0.0 else (math.inf if saved > 0 else 0.0)

        return _bytes(sorted(range(len(self._saved)), key=lambda k: (-worth(k), k)))

    def _start(self) -> tuple[Bytes, Bytes, Bytes, Table]:
        """Return what beginning with each layer adds, [L + 1] each: bytes of wires, bytes of a microbatch for the input
        if the layer is kept and if it is recomputed, seconds of a microbatch."""
        inputs = np.append(self._layers.inputs, 0)
        if self._stage == 0:
            return 0 * inputs, 0 * inputs, 0 * inputs, 0.0 * inputs
        copied = inputs * self._request.boundaries[self._stage - 1].copied
        wires, enter_s = self._crossing(self._stage - 1, inputs)
        return wires, copied * np.append(self._layers.input_saved, False), copied, enter_s

    def _end(self) -> tuple[Bytes, Bytes, int, Table]:
        """Return what ending before each layer adds: bytes of wires and of a microbatch, [L + 1] each, bytes of
        workspace, and seconds of a microbatch, [L + 1]."""
        layers, loss = self._request.layers, self._request.loss
        outputs = _bytes([0, *(layer.output_bytes for layer in layers)])
        if self._stage == len(self._request.ranks) - 1:
            kept = loss.own_bytes + (loss.input_bytes if loss.input_saved or layers[-1].output_saved else 0)
            workspace = max(loss.forward_extra_bytes + loss.input_bytes, loss.backward_extra_bytes)
            return 0 * outputs, 0 * outputs + kept, workspace, np.full(len(outputs), sum(self._times[-1]))
        wires, leave_s = self._crossing(self._stage, outputs)
        return wires, outputs, 0, leave_s

    def _crossing(self, boundary: int, sizes: Bytes) -> tuple[Bytes, Table]:
        """Return the bytes of this stage's wires, and its seconds of packing, if tensors of these sizes cross."""
        request, side = self._request, int(boundary < self._stage)
        rate = request.speeds[request.ranks[self._stage]].pack_rate
        crossed, precision = request.boundaries[boundary], request.settings.precision
        known = {n: (crossed.wires(n, precision)[side], crossed.packing_s(n, rate)) for n in set(sizes.tolist())}
        return _bytes(known[n][0] for n in sizes.tolist()), np.array([known[n][1] for n in sizes.tolist()])


def _bytes(values: Iterable[int]) -> Bytes:
    return np.array(list(values), dtype=np.int64)


def _largest_between(values: Bytes) -> Bytes:
    """Return the matrix [first, stop] of the largest of ``values[first:stop]``, 0 where there are none."""
    count = len(values)
    here = np.where(np.arange(count + 1)[:, None] <= np.arange(count)[None, :], values, 0)
    return np.concatenate([np.zeros((count + 1, 1), np.int64), np.maximum.accumulate(here, axis=1)], axis=1)
