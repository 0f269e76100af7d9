"""fp16 accumulation of fp16 products: asked for by name, checked while it runs, given up where it is too inexact.

GeForce GPUs multiply twice as fast where the tensor cores add up in fp16. With it on, the products of ``OPS`` (forward
and input gradient) sum ``block_k`` terms in fp16 and add those sums in fp32; weight gradients never do. A tensor core
rounds its fp16 sum at least once for 16 terms, so an element of a @ b is off by at most

    ceil(block_k / 16) * 2^-11 * sum over k of |a_ik| |b_kj|          (plus the usual fp32 terms),

and is infinite where a partial sum passes 65504. That bound is no use as a test: random signs leave far less of it. The
check therefore measures: at the first call for a weight's shape and every ``CHECK_EVERY`` calls after it,
``SAMPLED_ROWS`` rows are multiplied both ways. Where they differ by more than ``TOLERANCE`` of a row's largest value
(bf16's rounding), products with that shape go back to fp32 accumulation for good, with a warning. The comparison stays
on the device and is read when it has arrived: nothing waits for it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

OPS = ("linear", "linear_dx")
CHECK_EVERY = 64
SAMPLED_ROWS = 16
TOLERANCE = 2.0**-8
_FROM_ENVIRONMENT = os.environ.get("SPU_FP16_ACCUMULATION", "0") not in ("", "0")


class _Wanted(threading.local):
    value: bool | None = None


_WANTED = _Wanted()


@contextmanager
def fp16_accumulation(enabled: bool = True) -> Iterator[None]:
    """Allow fp16 products to be summed in fp16 inside, in this thread (``enabled=False``: forbid it). Off by default.

    ``SPU_FP16_ACCUMULATION=1`` switches it on for a whole process, its backward threads included.
    """
    previous, _WANTED.value = _WANTED.value, enabled
    try:
        yield
    finally:
        _WANTED.value = previous


def wanted() -> bool:
    """Tell whether it is on in this thread."""
    value = _WANTED.value
    return _FROM_ENVIRONMENT if value is None else value


class Watch:
    """The products of one op and weight shape on one device: how many there were, and whether they may go on."""

    def __init__(self, name: str) -> None:
        self.usable = True
        self._name, self._calls = name, 0
        self._arriving: tuple[Tensor, torch.cuda.Event | None] | None = None

    def due(self) -> bool:
        """Count a call; tell whether it is to be checked. Read an earlier check's result if that has arrived."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # a CUDA graph must not hold an event's question
        if self._arriving is not None:
            value, event = self._arriving
            if event is None or event.query():
                self._arriving = None
                self._judge(float(value))
        self._calls += 1
        return self.usable and self._arriving is None and self._calls % CHECK_EVERY == 1

    def compare(self, half: Tensor, full: Tensor) -> None:
        """Take the same rows summed in fp16 and in fp32, both fp32 [rows, columns]; start a comparison without waiting
        for it.
        """
        difference, size = (half - full).abs().amax(1), full.abs().amax(1)
        share = torch.where(
            size.isfinite(), difference / size.clamp_min(1e-30), 0.0
        )  # an overflow of both is neither's
        worst = share.nan_to_num(nan=torch.inf).amax()
        if worst.is_cuda:
            here = torch.empty((), pin_memory=True, dtype=torch.float32, device="cpu").copy_(worst, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._arriving = here, event
        else:
            self._arriving = worst, None

    def _judge(self, share: float) -> None:
        if share <= TOLERANCE:
            return
        self.usable = False
        warnings.warn(
            f"fp16 accumulation is off for {self._name}: sampled rows differ from fp32 accumulation by {share:.2g} of "
            f"their largest value, allowed is {TOLERANCE:.2g}",
            RuntimeWarning,
            stacklevel=5,
        )


_WATCHES: dict[tuple[str, torch.device, int, int], Watch] = {}


def watch_of(op: str, a: Tensor, b: Tensor) -> Watch | None:
    """Return the watch of a product a @ b, None where it is not to be summed in fp16."""
    if op not in OPS or a.dtype != torch.float16:
        return None
    k, n = b.shape
    key = op, a.device, k, n
    found = _WATCHES.get(key)
    if found is None:
        found = _WATCHES.setdefault(key, Watch(f"{op} by [{k}, {n}] on {a.device}"))
    return found if found.usable else None
