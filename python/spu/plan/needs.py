"""From what a profile counted to what planning needs: bytes, and seconds on every device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spu.plan.memory import LayerNeeds

if TYPE_CHECKING:
    from spu.profile import LayerCost

NOMINAL_FLOPS_PER_S = 5e10
"""Speed assumed of every device where neither layers nor devices were measured; such plans say "nominal"."""

Times = tuple[tuple[float, float], ...]


def layer_needs(cost: LayerCost, before: LayerCost | None) -> LayerNeeds:
    """What a layer needs. Costs of plain torch (no ``own_bytes``) are taken apart as far as they can be.

    Args:
        cost: the layer's.
        before: the cost of the layer before it, for what a plain cost does not say: the size of its input.
    """
    trained = cost.param_count if cost.trained_count is None else cost.trained_count
    share = cost.deferred_flops / cost.backward_flops if cost.backward_flops else 0.0
    if cost.own_bytes is not None:
        return LayerNeeds(
            cost.name,
            cost.param_count,
            trained,
            cost.own_bytes,
            cost.input_bytes,
            cost.output_bytes,
            cost.input_saved,
            cost.output_saved,
            cost.forward_extra_bytes,
            cost.backward_extra_bytes,
            cost.deferred_bytes,
            share,
            cost.left_bytes,
            cost.left_input,
            cost.ties,
        )
    given = before.output_bytes if before is not None else cost.input_bytes
    shared = min(cost.shared_bytes, cost.saved_bytes)
    # What is saved by both is this layer's input; it is counted as saved by the layer before.
    own = cost.saved_bytes - shared
    return LayerNeeds(cost.name, cost.param_count, trained, own, given, cost.output_bytes, False, False, 0, 0, 0, 0.5)


def plain_loss(last: LayerCost, item_bytes: int) -> LayerNeeds:
    """What cross entropy needs where it was not profiled: an fp32 log-softmax in place of the last output."""
    log_softmax = last.output_bytes // item_bytes * 4
    return LayerNeeds("loss", 0, 0, log_softmax, last.output_bytes, 4, False, False, 0, log_softmax)


def counted_times(costs: Sequence[LayerCost], flops_per_s: float, bytes_per_s: float | None) -> Times:
    """(forward, backward) seconds of each layer from counted work.

    Products at ``flops_per_s``; all other operators by the bytes they move, at ``bytes_per_s`` (None: free).
    A backward that was not run is twice the forward.
    """
    times = []
    for cost in costs:
        forward, backward = cost.forward_flops / flops_per_s, 2.0 * (cost.forward_flops / flops_per_s)
        if cost.backward_flops is not None:
            backward = cost.backward_flops / flops_per_s
        if bytes_per_s is not None:
            forward += cost.forward_traffic_bytes / bytes_per_s
            backward += cost.backward_traffic_bytes / bytes_per_s
        times.append((forward, backward))
    return tuple(times)


def measured_times(costs: Sequence[LayerCost]) -> Times | None:
    """(forward, backward) seconds of each layer as measured; None unless all were."""
    times = [(cost.forward_s, cost.backward_s) for cost in costs]
    if any(forward is None or backward is None for forward, backward in times):
        return None
    return tuple((float(forward or 0.0), float(backward or 0.0)) for forward, backward in times)
