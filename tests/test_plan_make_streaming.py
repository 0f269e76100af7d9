"""Plans that move layers between tiers: bytes of every tier by hand, seconds, refusals that name what fits."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from test_plan_make import MB, device, layer, layers

from spu.devices.tiers import Tiers
from spu.plan import BudgetError, Plan
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import Machine, Speed
from spu.plan.make_streaming import StreamingRequest, grouped
from spu.settings import Settings

DISK = Tiers(0, Path("/spill"), 1000 * MB)
LOSS = LayerCost(name="loss", input_bytes=100_000, output_bytes=4)


def stream(costs, tiers=DISK, *, budget=1000 * MB, flops=1e12, update_rate=1e12, disk=(1e9, 1e9), **settings):
    machine = Machine((device("cpu:0", budget),), (Speed(flops, 1e12, update_rate),), disk=disk)
    options = {"residency": "streamed", "microbatches": 4, "activations": "keep", "recompute": True, **settings}
    request = StreamingRequest(tuple(costs), LOSS, machine, Settings(**options), tiers)
    return request.plan(model="tiny", rows=2, tokens=100)


def page(count: int) -> int:
    return -(-count // 4096) * 4096


def test_every_tier_holds_what_is_counted_by_hand():
    plan = stream(layers(6, params=100_000))
    s = plan.streaming
    assert s is not None
    assert [stage.layers for stage in plan.stages] == [(k, k + 1) for k in range(6)]
    assert (plan.settings.schedule, plan.settings.residency, plan.devices) == ("layer_outer", "streamed", ("cpu:0",))
    weights, grads, state = page(200_000), page(400_000), page(1_200_000)
    assert s.ring_bytes == s.slots * weights + s.state_slots * (grads + state)
    tiers = {tier.name: tier for tier in s.tiers}
    assert list(tiers) == ["cpu:0", "disk"]
    assert tiers["disk"].peak_bytes == 6 * (weights + grads + state)
    # 4 microbatches of 5 inputs that wait, gradients of the 3 others, the store's own memory; a layer is recomputed
    waiting = 4 * 5 * 100_000 + 3 * 100_000 + state
    assert s.ring_bytes + waiting < tiers["cpu:0"].peak_bytes < s.ring_bytes + waiting + 2 * MB
    assert tiers["cpu:0"].peak_bytes == plan.predicted.peak_bytes[0]
    # What is in the slots at the end of a forward and of a backward is not read again.
    assert s.disk_read_bytes == 2 * (6 - s.slots) * weights + 6 * (grads + state)
    assert s.disk_written_bytes == 6 * (200_000 + state + grads)
    assert s.link_in_bytes == s.link_out_bytes == 0


def test_more_memory_is_more_slots_from_which_nothing_comes_again():
    """Two to four slots were all that a plan took, whatever the budget."""
    few, more, most = (
        stream(layers(24, params=1_000_000), budget=MB * size, disk=(1e6, 1e6)).streaming for size in (50, 70, 1000)
    )
    assert 4 <= few.slots < more.slots < most.slots == 24
    weights, other = page(2_000_000), 24 * (page(4_000_000) + page(12_000_000))
    for s in (few, more, most):
        assert s.disk_read_bytes == 2 * (24 - s.slots) * weights + other
        assert s.tiers[0].peak_bytes <= s.tiers[0].budget_bytes
    assert stream(layers(24, params=1_000_000), flops=1e9).streaming.slots == 2  # nothing to gain: computing is all


def test_below_a_gpu_what_was_trained_comes_to_weights_that_stayed():
    """The host has updated it; the frozen rest of a stage is in its slot."""
    adapted = [dataclasses.replace(cost, trained_count=1000) for cost in layers(12, params=1_000_000)]
    for budget in (25 * MB, 1000 * MB):
        s = stream_on(adapted, [1e15], budget=budget).streaming
        whole, trained = page(2 * 999_000) + page(2 * 1000), page(2 * 1000)
        assert s.link_in_bytes == 2 * (12 - s.slots) * whole + s.slots * trained
    assert s.slots == 12


def test_bf16_gradients_take_half_the_room_below_and_none_less_on_the_device():
    wide, half = (stream(layers(6, params=100_000), grads=grads) for grads in ("fp32", "bf16"))
    assert wide.streaming.tiers[1].peak_bytes - half.streaming.tiers[1].peak_bytes == 6 * (
        page(400_000) - page(200_000)
    )
    state = page(1_200_000)  # with the gradients of an update it is larger than fp32 gradients
    saved = wide.streaming.ring_bytes - half.streaming.ring_bytes
    assert saved == half.streaming.state_slots * (page(400_000) - page(200_000))
    assert half.streaming.disk_written_bytes == 6 * (200_000 + state + page(200_000))
    assert "grads bf16 below" in half.table(200)


def test_a_slow_disk_is_the_step_and_a_fast_one_is_hidden():
    slow, fast = stream(layers(8, params=100_000), disk=(1e6, 1e6)), stream(layers(8, params=100_000))
    s, f = slow.streaming, fast.streaming
    assert s is not None
    assert f is not None
    assert s.bottleneck == "disk"
    assert s.seconds["disk"] == pytest.approx((s.disk_read_bytes + s.disk_written_bytes) / 1e6)
    assert 0.999 * s.seconds["disk"] <= slow.predicted.step_s < 1.1 * s.seconds["disk"]
    assert f.bottleneck == "compute"
    # 8 layers x 4 microbatches of forward, recompute and backward: 4e9 FLOP at 1e12 a second; 38 bytes an update
    assert f.seconds["compute"] == pytest.approx(8 * 4 * 4e-3 + 8 * 100_000 * 38 / 1e12, rel=0.01)
    assert f.seconds["compute"] <= fast.predicted.step_s < 1.1 * f.seconds["compute"]
    assert s.limit_s == s.seconds["disk"]
    # A step of 800 tokens is hidden by the fast disk and not by the slow one: from so many tokens each would be.
    assert 0 < f.hidden_tokens < 800 < s.hidden_tokens
    assert 900 * f.hidden_tokens < s.hidden_tokens < 1001 * f.hidden_tokens  # with more slots less is to be hidden


def test_offloaded_weights_stay_and_states_move():
    plan = stream(layers(6, params=100_000), residency="offloaded", state="exact")
    s = plan.streaming
    assert s is not None
    assert s.residency == ("offloaded",) * 6
    grads, state = page(400_000), page(412_500)
    assert s.tiers[1].peak_bytes == 6 * (grads + state)
    assert s.disk_read_bytes == 6 * (grads + state)
    assert s.ring_bytes == s.state_slots * (grads + state)
    assert s.tiers[0].peak_bytes > 6 * page(200_000) + s.ring_bytes


def test_frozen_layers_have_weights_alone_which_are_never_written():
    frozen = [LayerCost(**{**vars(c), "trained_count": 0}) for c in layers(6, params=100_000)]
    s = stream(frozen).streaming
    assert s is not None
    assert s.tiers[1].peak_bytes == 6 * page(200_000)
    assert s.disk_written_bytes == 0


def test_activations_wait_on_the_disk_where_they_do_not_fit():
    costs = layers(8, params=1000, output=10 * MB, saved=1000)
    kept = stream(costs, budget=400 * MB, activations="auto").streaming
    parked = stream(costs, budget=200 * MB, activations="auto").streaming
    packed = stream(costs, budget=200 * MB, activations="int8").streaming
    assert kept is not None
    assert parked is not None
    assert packed is not None
    assert (kept.activations, parked.activations, packed.activations) == ("keep", "exact", "int8")
    # Seven inputs of layers; the last one's backward follows at once. Regions have room for a few headers.
    assert parked.disk_written_bytes - kept.disk_written_bytes == pytest.approx(4 * 6 * 10 * MB, rel=1e-3)
    assert sum(map(sum, parked.parked_bytes)) * 4 == parked.disk_written_bytes - kept.disk_written_bytes
    assert 0.5 < (packed.disk_written_bytes - kept.disk_written_bytes) / (4 * 6 * 10 * MB) < 0.54
    assert parked.tiers[0].peak_bytes < 200 * MB


def test_small_neighbours_share_a_stage_that_is_no_larger_than_the_largest():
    costs = [layer(str(k), params=p) for k, p in enumerate((10, 4, 4, 4, 9, 1, 1, 10, 3))]
    assert grouped(costs) == [range(1), range(1, 3), range(3, 4), range(4, 6), range(6, 7), range(7, 8), range(8, 9)]


def test_a_plan_with_streaming_is_read_as_it_was_written():
    plan = stream(layers(4))
    assert Plan.from_json(plan.to_json()) == plan
    broken = plan.to_json().replace('"store": "disk"', '"store": "tape"')
    with pytest.raises(ValueError, match="streaming.store is 'tape'; there are 'host', 'disk'"):
        Plan.from_json(broken)


def test_a_refusal_names_every_tier_that_is_short_and_what_fits():
    costs = layers(8, params=1_000_000)
    with pytest.raises(BudgetError) as error:
        stream(costs, Tiers(0, Path("/spill"), 100 * MB))
    text = str(error.value)
    assert "disk is short by 44.1 MB: needs 144 MB and may use 100 MB" in text
    assert error.value.device == "disk"
    assert error.value.fixes[:2] == ('state="exact"', 'state="compact"')
    assert stream(costs, Tiers(0, Path("/spill"), 100 * MB), state="exact").streaming is not None
    with pytest.raises(BudgetError, match="cpu:0 is short by"):
        stream(costs, budget=10 * MB)


def test_what_streaming_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match="accumulate 3: .*raise microbatches instead: 12 of them"):
        stream(layers(4), accumulate=3)
    with pytest.raises(ValueError, match="would move nothing: there is no tier below cpu:0. Give one: disk=FOLDER"):
        stream(layers(4), Tiers(10**9))


# Several devices, which take the stages in turn


def stream_on(costs, flops, *, budget=1000 * MB, host=10**9, **settings):
    """Plan for GPUs of these speeds, with a host below them."""
    devices = tuple(device(f"cuda:{k}", budget) for k in range(len(flops)))
    speeds = tuple(Speed(each, 1e12, 1e12) for each in flops)
    machine = Machine((*devices, device("cpu:0", 10)), (*speeds, Speed(1e9, 1e12, 1e12)))
    options = {"residency": "streamed", "microbatches": 8, "activations": "keep", "recompute": True, **settings}
    return StreamingRequest(tuple(costs), LOSS, machine, Settings(**options), Tiers(host)).plan(rows=2, tokens=100)


def shares(plan: Plan) -> dict[str, int]:
    """The number of layers on each device."""
    found: dict[str, int] = {}
    for stage in plan.stages:
        found[stage.device] = found.get(stage.device, 0) + len(stage.layer_names)
    return found


def test_two_equal_devices_take_turns_and_halve_the_step():
    costs = layers(12, params=100_000, flops=10**10)
    one, two = stream_on(costs, [1e12]), stream_on(costs, [1e12, 1e12])
    assert two.devices == ("cuda:0", "cuda:1")
    assert [stage.device for stage in two.stages] == ["cuda:0", "cuda:1"] * (len(two.stages) // 2)
    assert shares(two) == {"cuda:0": 6, "cuda:1": 6}
    # Eight microbatches, one round of the devices at each turn of the order in which the other waits.
    assert 0.5 < two.predicted.step_s / one.predicted.step_s < 0.58
    assert one.streaming is not None
    assert two.streaming is not None
    assert two.streaming.tiers[-1] == one.streaming.tiers[-1]  # the host holds everything once
    assert two.streaming.seconds["compute"] == pytest.approx(one.streaming.seconds["compute"] / 2)
    # What crosses a link is the weights, gradients and inputs of its own stages.
    crossing = 2 * 8 * (len(two.stages) - 1) * 100_000
    assert two.streaming.link_out_bytes == pytest.approx(one.streaming.link_out_bytes + crossing)
    for k in range(2):
        assert two.predicted.peak_bytes[k] == two.streaming.devices[k].peak_bytes <= 1000 * MB
    timeline = two.timeline()
    assert timeline.makespan == pytest.approx(two.predicted.step_s, rel=0.05)
    assert len(timeline.spans) == 2 * 8 * len(two.stages)
    again = Plan.from_json(two.to_json())
    assert again == two
    assert "streamed through cuda:0 and cuda:1, in turn, from the host" in two.table()


def test_frozen_and_trained_weights_have_regions_of_their_own():
    """With adapters the disk took a page a stage more than was planned."""
    costs = layers(6, params=200_100)
    costs = [dataclasses.replace(cost, trained_count=100) for cost in costs]
    disk = stream(costs).streaming.tiers[1]
    assert disk.peak_bytes == 6 * (page(2 * 200_000) + page(2 * 100) + page(4 * 100) + page(12 * 100))


@pytest.mark.parametrize("residency", ["streamed", "offloaded"])
def test_a_tied_weight_waits_once_and_its_second_gradient_stays_on_the_device(residency):
    """It was counted twice on the disk, and its gradient from the later stage nowhere."""
    costs = layers(4, params=200_000)
    apart = stream(costs, residency=residency).streaming
    costs[-1] = dataclasses.replace(costs[-1], ties=((0, 100_000, 100_000),))
    tied = stream(costs, residency=residency).streaming
    assert (tied.slots, tied.state_slots) == (apart.slots, apart.state_slots)
    assert tied.tiers[1].peak_bytes == pytest.approx(apart.tiers[1].peak_bytes, abs=2 * 4096)
    in_a_slot = 2 * 100_000 if residency == "streamed" else 0
    more = tied.tiers[0].peak_bytes - apart.tiers[0].peak_bytes
    assert more == pytest.approx(4 * 100_000 + in_a_slot, abs=2 * 4096)


def test_a_faster_device_takes_more_layers():
    plan = stream_on(layers(24, params=100_000, flops=10**10), [3e12, 1e12])
    assert shares(plan) == {"cuda:0": 18, "cuda:1": 6}
    slow = stream_on(layers(12, params=100_000, flops=10**10), [1e12, 1e10])  # it would be waited for
    assert slow.devices == ("cuda:0",)


def test_layers_that_share_parameters_stay_on_one_device():
    costs = layers(8, params=100_000, flops=10**10)
    costs[-1] = dataclasses.replace(costs[-1], ties=((0, 50_000, 50_000),))
    assert stream_on(costs, [1e12, 1e12]).devices == ("cuda:0",)
    machine = Machine((device("cpu:0"), device("cpu:1")), (Speed(1e12, 1e12, 1e12),) * 2)
    for each, count in ((costs, 8), (layers(1), 1)):
        with pytest.raises(ValueError, match=rf"cannot share these {count} layers among 2 devices: .* Give one device"):
            StreamingRequest(tuple(each), LOSS, machine, Settings(residency="streamed", microbatches=4), DISK).plan()


def test_activations_of_several_devices_are_counted_by_stage():
    costs = layers(8, params=100_000, output=10 * MB)
    plan = stream_on(costs, [1e12, 1e12], activations="int4")
    assert plan.streaming is not None
    assert list(map(len, plan.streaming.parked_bytes)) == [
        len(stage.layer_names) - (k == 0) if k + 1 < len(plan.stages) else 0 for k, stage in enumerate(plan.stages)
    ]
    assert "activations below in int4" in plan.table()


def test_an_input_inside_a_stage_that_is_wider_than_those_between_stages_is_counted():
    """It comes back for its layer, and the next one beside it; two of those between stages were counted instead."""
    widths = [1, 1, *[50, 1] * 4]
    costs = [dataclasses.replace(layer(str(k), output=b * MB), input_bytes=a * MB)
             for k, (a, b) in enumerate(itertools.pairwise(widths))]  # fmt: skip
    costs[0] = dataclasses.replace(costs[0], param_count=2500, trained_count=2500)  # two others share a stage
    plan = stream_on(costs, [1e12], activations="exact", host=2 * 10**9)
    assert [stage.layers for stage in plan.stages][:3] == [(0, 1), (1, 3), (3, 5)]
    assert 2 * 50 * MB < plan.streaming.tiers[0].peak_bytes < 4 * 50 * MB
