"""The search: nearly as fast as the best hand-made plan, always within the budgets, honest where nothing fits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import search

from spu import schedules
from spu.devices.manager import Device
from spu.plan import BudgetError, Plan
from spu.plan.layer_cost import LayerCost
from spu.plan.machine import make_machine, read_speeds
from spu.plan.search import microbatch_counts
from spu.plan.show.curve import memory_curve
from spu.plan.show.explain import explain
from spu.plan.show.picture import draw_plan
from spu.settings import Settings

MB = 10**6


def device(name, budget=10_000 * MB):
    return Device(name, torch.device(name.split(":")[0]), (), 1, 10**12, budget, "made up")


def machine(*devices, speeds=""):
    return make_machine(devices, {}, read_speeds(speeds), "fp16")


def costs(flops, params=1000, own=MB):
    """Layers with these FLOPs per row, and a loss."""

    def costs_of(rows):
        def layer(name, work, count, kept):
            return LayerCost(
                name=name,
                param_count=count,
                trained_count=count,
                own_bytes=kept * rows,
                input_bytes=1000 * rows,
                output_bytes=1000 * rows,
                forward_flops=work * rows,
                backward_flops=2 * work * rows,
            )

        return [layer(f"layers.{k}", work, params, own) for k, work in enumerate(flops)], layer("loss", 0, 0, 100)

    return costs_of


def best_by_hand(work, speeds, microbatches):
    """The shortest pipeline over every order of devices and every boundary, under 1f1b and gpipe."""
    best = float("inf")
    for order in itertools.permutations(speeds):
        for cuts in itertools.combinations(range(1, len(work)), len(order) - 1):
            ends = [0, *cuts, len(work)]
            times = [sum(work[a:b]) / speed for (a, b), speed in zip(itertools.pairwise(ends), order)]
            for name in ("1f1b", "gpipe"):
                actions = schedules.get(name)(len(order), microbatches)
                best = min(best, schedules.simulate(actions, [(t, 2 * t) for t in times]).makespan)
    return best


@given(
    st.lists(st.integers(1, 9), min_size=4, max_size=9), st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=3)
)
@settings(max_examples=25, deadline=None)
def test_unequal_devices_come_within_8_percent_of_the_best_split_by_hand(work, ratios):
    devices = [device(f"cpu:{k}") for k in range(len(ratios))]
    text = ",".join(f"cpu:{k}={ratio}GFLOPS" for k, ratio in enumerate(ratios))
    wanted = {"batch": 8, "microbatches": 8, "schedule": "1f1b"}
    made = make_machine(devices, {}, read_speeds(text), "fp16")
    made = replace(made, speeds=tuple(replace(speed, update_rate=1e30) for speed in made.speeds))
    plan = search(costs([w * 10**9 for w in work]), made, **wanted)
    assert plan.timeline().makespan <= best_by_hand(work, ratios, 8) / 0.92


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_a_plan_keeps_every_budget_or_is_refused(data):
    count = data.draw(st.integers(3, 10))
    budgets = data.draw(st.lists(st.integers(20, 400), min_size=1, max_size=3))
    devices = [device(f"cuda:{k}", size * MB) for k, size in enumerate(budgets)]
    wanted = {"batch": data.draw(st.sampled_from([4, 8, 12])), "model": "m"}
    profile = costs([10**9] * count, params=data.draw(st.integers(0, 3)) * MB, own=data.draw(st.integers(0, 9)) * MB)
    plan, refusal = None, None
    try:
        plan = search(profile, machine(*devices), **wanted)
    except BudgetError as error:
        refusal = error
    if plan is None:
        assert "m does not fit" in str(refusal)
        assert "short by" in str(refusal)
        assert refusal.short_bytes > 0
        return
    limits = {d.name: d.budget_bytes for d in devices}
    for name, peak, curve in zip(plan.devices, plan.predicted.peak_bytes, memory_curve(plan)):
        assert max(held for _, held in curve) <= peak <= limits[name]
    assert plan.rows * plan.settings.microbatches == wanted["batch"]
    assert Plan.from_json(plan.to_json()) == plan


def test_a_slow_device_is_left_out_where_the_step_is_faster_without_it():
    fast, slow = device("cuda:0"), device("cpu:0")
    plan = search(costs([10**12] * 6), machine(fast, slow, speeds="cpu=1GFLOPS"), batch=8)
    assert plan.devices == ("cuda:0",)
    kept = search(costs([10**12] * 6), machine(fast, slow), batch=8, same_order=True)
    assert kept.devices == ("cuda:0", "cpu:0")


def test_recompute_is_only_as_much_as_the_budget_asks_for():
    tight = device("cuda:0", 65 * MB)
    plan = search(costs([10**9] * 10, params=1, own=10 * MB), machine(tight), batch=1, schedule="1f1b")
    assert 0 < len(plan.recomputed_layers) < 10


def test_transfers_are_packed_where_the_link_is_slow():
    gpus = [device("cuda:0", 100 * MB), device("cuda:1", 100 * MB)]
    wanted = {"batch": 8, "transfer": "auto", "schedule": "1f1b"}
    profile = costs([10**9] * 4, params=2 * MB)
    slow = make_machine(gpus, {}, {}, "fp16", links={(0, 1): 1e6, (1, 0): 1e6})
    fast = make_machine(gpus, {}, {}, "fp16", links={(0, 1): 1e13, (1, 0): 1e13})
    assert search(profile, slow, **wanted).codecs == ("int8",)
    assert search(profile, fast, **wanted).codecs == ("none",)


def test_the_plan_is_told_in_words_and_drawn(tmp_path):
    made = machine(device("cuda:0"), device("cpu:0"))
    plan = search(costs([10**9] * 6), made, batch=8, tokens=16, model="tiny", same_order=True)
    text = "\n".join(explain(plan, made, 10**9))
    assert "tiny (1.00B parameters) fits." in text
    assert "cuda:0: at most" in text
    assert "NOMINAL, half of what a rtx3070 publishes" in text
    assert "nominal" in plan.predicted.basis
    pytest.importorskip("matplotlib")
    draw_plan(plan, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"batch": 8, "accumulate": 3}, "a batch of 8 rows cannot be cut into 3 equal runs"),
        ({"batch": 8, "microbatches": 3}, "a batch of 8 rows cannot be cut into 3 equal microbatches"),
        ({"batch": 8, "schedule": "zigzag"}, "unknown schedule 'zigzag'"),
        ({"batch": 8, "recompute": "often"}, "unknown recompute 'often': give one of auto, on .True., off"),
    ],
)
def test_settings_that_make_no_sense_are_named(wanted, reason):
    with pytest.raises(ValueError, match=reason):
        search(costs([1] * 4), machine(device("cpu:0")), **wanted)


@pytest.mark.parametrize("text", ["cuda:0", "cuda:0=", "=fast"])
def test_speeds_that_cannot_be_read_are_named(text):
    with pytest.raises(ValueError, match="is not DEVICE=SPEED"):
        read_speeds(text)


def test_an_unknown_class_of_gpu_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"speed cuda:0=abacus: give a rate such as 20TFLOPS, or one of a100, "):
        machine(device("cuda:0"), speeds="cuda:0=abacus")


def test_what_is_wanted_without_recompute_is_refused_with_recompute_as_a_fix():
    """The refusal was worked out for another request, one that fits, and died of it."""
    profile = costs([10**9] * 12, params=MB, own=10 * MB)
    wanted = {"batch": 8, "recompute": False, "model": "m"}
    with pytest.raises(BudgetError) as error:
        search(profile, machine(device("cuda:0", 300 * MB)), **wanted)
    assert any(fix.startswith("recompute=True") for fix in error.value.fixes)
    assert search(profile, machine(device("cuda:0", 300 * MB)), batch=8, model="m").recompute


@pytest.mark.parametrize("schedule", ["interleaved", "zbv", "layer_outer"])
def test_stages_that_share_a_device_share_its_budget(schedule):
    """Refusals came, or died, where equal shares were too small for one stage and too large for another."""
    profile = costs([10**9] * 4, params=MB, own=10 * MB)
    wanted = {"batch": 4, "microbatches": 4, "schedule": schedule, "recompute": False, "same_order": True}

    def plan(budgets):
        return search(profile, machine(*(device(f"cuda:{k}", b) for k, b in enumerate(budgets))), **wanted)

    peaks = plan([10_000 * MB] * 2).predicted.peak_bytes
    assert len(plan([int(1.2 * peak) for peak in peaks]).stages) == 2 * schedules.stages_per_rank(schedule)
    with pytest.raises(BudgetError, match="short by"):
        plan([int(0.5 * peak) for peak in peaks])


def test_stages_on_each_device_and_layers_to_recompute_may_be_given():
    devices = [device("cuda:0"), device("cuda:1", 9000 * MB), device("cuda:2", 8000 * MB)]  # six orders to rank
    profile = costs([10**9] * 12)
    plan = search(profile, machine(*devices), batch=6, schedule="interleaved", virtual=4, recompute=[1, 2])
    assert plan.virtual == 4
    assert plan.recomputed_layers == {1, 2}
    with pytest.raises(ValueError, match="recompute names layer 12, but there are layers 0 to 11"):
        search(profile, machine(*devices), batch=6, recompute=[12])


def test_a_batch_of_any_size_is_cut_quickly():
    once, twice = Settings(microbatches="auto"), Settings(microbatches="auto", accumulate=2)
    assert microbatch_counts(once, 8) == [1, 2, 4, 8]
    assert microbatch_counts(twice, 12) == [1, 2, 3, 6]
    assert microbatch_counts(twice, 9) == []
    counts = microbatch_counts(once, 10**9)
    assert max(counts) == 1000
    assert all(10**9 % count == 0 for count in counts)
