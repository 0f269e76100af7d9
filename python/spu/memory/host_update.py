"""A stage's deferred update as work for a thread of the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from spu import ops
from spu.memory.device_store import HostUpdate, Part
from spu.memory.store import Region
from spu.memory.unit import Absent, Unit
from spu.memory.work import Work

__all__ = ["host_update"]


def host_update(unit: Unit, work: Work, absent: Absent, failed: Callable[[Exception], None]) -> HostUpdate:
    """Return the update of a unit; nobody else may look at the unit until it is done.

    Args:
        unit: what is updated; it has gradients and state.
        work: does it, with the kernel backend of the thread that calls this function.
        absent: what stands for the unit's tensors afterwards.
        failed: told of an error before it is raised.
    """
    grads, state, written = unit.grads, unit.state, unit.written
    assert grads is not None
    assert state is not None
    backend = ops.forced_backend()

    def run(memory: Mapping[Region, Tensor]) -> bool:
        try:
            for piece in (*written, state):
                piece.put(memory[piece.region])
            with ops.use_backend(backend):
                return work.update(unit.index, grads.views(memory[grads.region]))
        except Exception as error:
            failed(error)
            raise
        finally:
            absent.put(*written, state)

    further = [Part(piece.region, piece.bytes, None) for piece in (grads, state)]
    return HostUpdate(further, run, [state.region, *(piece.region for piece in written)])
