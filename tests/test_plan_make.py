"""Plans that keep their budgets, predict by the simulator, and refuse with what would fit."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan as make_plan

from spu.devices.manager import Device
from spu.plan import BudgetError, Plan
from spu.plan.layer_cost import LayerCost
from spu.plan.memory import ITEM_BYTES

MB = 10**6


def device(name, budget=1000 * MB):
    kind = name.split(":")[0]
    return Device(name, torch.device(kind), (), 1, 10**12, budget, "made up")


def layer(name, params=1000, saved=MB, output=100_000, flops=10**9):
    return LayerCost(
        name=name,
        param_count=params,
        trained_count=params,
        own_bytes=saved,
        input_bytes=output,
        output_bytes=output,
        forward_flops=flops,
        backward_flops=2 * flops,
        deferred_flops=flops,
    )


def layers(count, **numbers):
    return [layer(f"layers.{k}", **numbers) for k in range(count)]


def seconds(count, forward_s, backward_s, devices=2):
    """As measured: of equal layers and of a loss that takes no time, on equal devices."""
    return [[*[(forward_s, backward_s)] * count, (0.0, 0.0)]] * devices


CPUS = [device("cpu:0"), device("cpu:1")]


def test_measured_layers_are_balanced_and_predicted_by_the_closed_form():
    times = seconds(6, 0.01, 0.02)
    plan = make_plan(layers(6), CPUS, times=times, recompute=False, model="tiny", accumulate=2)
    assert [stage.layers for stage in plan.stages] == [(0, 3), (3, 6)]
    assert plan.stages[1].layer_names == ("layers.3", "layers.4", "layers.5")
    assert plan.stages[0].forward_s == pytest.approx(0.03)
    assert plan.stages[0].backward_s == pytest.approx(0.06)
    assert plan.predicted.basis == "measured"
    assert plan.predicted.step_s == pytest.approx(2 * (8 + 1) * 0.09)
    assert plan.predicted.idle_share == pytest.approx(1 / 9)
    assert plan.timeline().idle_share == plan.predicted.idle_share


def test_recompute_adds_the_forward_to_the_backward():
    plan = make_plan(layers(2), CPUS, times=seconds(2, 0.01, 0.02), recompute=True)
    assert plan.stages[0].backward_s == pytest.approx(0.03)


def test_transfers_take_wire_bytes_over_link_speed():
    plan = make_plan(layers(2), CPUS, transfer="int8", link=1e6)
    elements = 50_000
    blocks = -(-elements // 64)
    assert plan.predicted.transfer_s == ((64 + -(-4 * blocks // 64) * 64 + -(-elements // 64) * 64) / 1e6,)
    assert plan.codecs == ("int8",)


def test_unequal_speeds_shift_the_boundary_and_scale_the_times():
    plan = make_plan(layers(9), CPUS, speeds=[2e10, 1e10], recompute=False)
    assert [stage.layers for stage in plan.stages] == [(0, 6), (6, 9)]
    assert plan.predicted.basis == "estimated"
    assert plan.stages[0].forward_s == pytest.approx(6e9 / 2e10)
    assert plan.stages[1].backward_s == pytest.approx(2 * 3e9 / 1e10)


def test_without_times_or_speeds_the_plan_says_nominal():
    plan = make_plan(layers(4), CPUS)
    assert plan.predicted.basis == "nominal"
    assert "made-up speed" in plan.table()


def test_the_first_stages_activations_count_by_what_is_in_flight():
    # 1f1b holds two microbatches on stage 0 and one on stage 1: under equal budgets stage 0 gets fewer layers.
    costs = layers(6, saved=10 * MB, output=2, params=0)
    tight = [device("cpu:0", 45 * MB), device("cpu:1", 45 * MB)]
    plan = make_plan(costs, tight, recompute=False)
    assert [stage.layers for stage in plan.stages] == [(0, 2), (2, 6)]


def test_auto_recomputes_only_where_it_must():
    costs = layers(4, saved=100 * MB)
    roomy, tight = ([device("cpu:0", budget * MB), device("cpu:1", budget * MB)] for budget in (500, 150))
    assert make_plan(costs, roomy).recompute is False
    assert make_plan(costs, tight).recompute is True
    with pytest.raises(BudgetError):
        make_plan(costs, tight, recompute=False)


def test_given_boundaries_are_kept_and_checked():
    costs = layers(4)
    plan = make_plan(costs, CPUS, layers=[(0, 1), (1, 4)])
    assert [stage.layers for stage in plan.stages] == [(0, 1), (1, 4)]
    with pytest.raises(
        ValueError, match=r"layers must be 2 consecutive .* pairs from 0 to 4, got \[\(0, 1\), \(2, 4\)\]"
    ):
        make_plan(costs, CPUS, layers=[(0, 1), (2, 4)])
    with pytest.raises(BudgetError, match="the given layers do not fit the budgets"):
        make_plan(costs, [device("cpu:0", 100), device("cpu:1")], layers=[(0, 3), (3, 4)])


def test_more_stages_than_layers_is_refused():
    with pytest.raises(ValueError, match="2 stages need at least 2 layers, got 1: use 1 or fewer stages"):
        make_plan(layers(1), CPUS)


def test_a_refusal_names_the_budget_and_only_fixes_that_fit():
    costs = layers(8, saved=12 * MB, params=800_000)
    tight = [device("cpu:0", 120 * MB), device("cuda:0", 120 * MB)]
    with pytest.raises(BudgetError) as error:
        make_plan(costs, tight, recompute=False)
    text = str(error.value)
    assert "no plan fits the budgets (1f1b, 8 microbatches, fp16, activations kept)" in text
    assert f"{error.value.device} (stage {error.value.stage}) needs" in text
    assert "short by" in text
    assert error.value.short_bytes == error.value.needed_bytes - error.value.budget_bytes > 0
    labels = [fix.split(":")[0].split(" (")[0] for fix in error.value.fixes]
    assert labels == [
        *("recompute=True", "microbatches=16", "1 more device like cuda", "a budget of 134 MB for cuda"),
        *("a budget of 155 MB for cpu", "budgets of 133 MB for cuda"),
    ]
    # What it says would fit, does.
    make_plan(costs, tight, recompute=True)
    finer = [replace(cost, own_bytes=6 * MB, input_bytes=50_000, output_bytes=50_000) for cost in costs]
    make_plan(finer, tight, recompute=False, microbatches=16)
    make_plan(costs, [*tight, device("cuda:1", 120 * MB)], recompute=False)
    make_plan(costs, [tight[0], device("cuda:0", 133 * MB)], recompute=False)


def test_a_refusal_limits_microbatches_to_what_the_batch_allows():
    costs = layers(8, saved=12 * MB, params=800_000)
    tight = [device("cpu:0", 120 * MB), device("cpu:1", 120 * MB)]
    with pytest.raises(BudgetError) as error:
        make_plan(costs, tight, recompute=False, max_microbatches=8)
    assert not any("microbatches=" in fix for fix in error.value.fixes)
    assert not any("more device" in fix for fix in error.value.fixes)  # CPUs share one memory


def test_a_refusal_combines_fixes_where_no_single_one_is_enough():
    costs = layers(8, saved=40 * MB, output=4 * MB, params=1000)
    tight = [device("cpu:0", 45 * MB), device("cpu:1", 45 * MB)]
    with pytest.raises(BudgetError) as error:
        make_plan(costs, tight, schedule="gpipe", recompute=False, microbatches=2)
    assert error.value.fixes[0].startswith('schedule="1f1b" and microbatches=16 ')


def test_where_nothing_helps_only_larger_budgets_are_named():
    with pytest.raises(BudgetError) as error:
        make_plan(layers(4, params=10**9), CPUS)
    assert all("budget" in fix for fix in error.value.fixes)


@given(
    st.data(), st.integers(1, 3), st.sampled_from(["gpipe", "1f1b"]), st.sampled_from(["fp16", "fp32"]), st.booleans()
)
@settings(max_examples=80, deadline=None)
def test_plans_equal_brute_force_under_budgets(data, stages, schedule, precision, recompute):
    count = data.draw(st.integers(stages, 6))
    numbers = st.integers(0, 40)
    costs = [layer(f"l{k}", data.draw(numbers), data.draw(numbers), data.draw(numbers)) for k in range(count)]
    costs = [replace(cost, input_bytes=before.output_bytes) for cost, before in zip(costs, [costs[0], *costs])]
    times = [[*((data.draw(numbers), data.draw(numbers)) for _ in costs), (0.0, 0.0)]] * stages
    devices = [device(f"cpu:{k}", data.draw(st.integers(0, 6000))) for k in range(stages)]
    options = {"schedule": schedule, "precision": precision, "recompute": recompute, "microbatches": 3, "times": times}

    def attempt(parts):
        """The slowest stage of a given placement, or None if it is refused."""
        try:
            plan = make_plan(costs, devices, layers=parts, **options)
        except BudgetError:
            return None
        return max(stage.forward_s + stage.backward_s for stage in plan.stages)

    slowest = []
    for cuts in itertools.combinations(range(1, count), stages - 1):
        slowest.append(attempt(list(itertools.pairwise([0, *cuts, count]))))
    possible = [seconds for seconds in slowest if seconds is not None]
    try:
        plan = make_plan(costs, devices, **options)
    except BudgetError:
        assert not possible
        return
    assert max(stage.forward_s + stage.backward_s for stage in plan.stages) == min(possible)
    assert Plan.from_json(plan.to_json()) == plan
    for stage in plan.stages:
        assert stage.total_bytes <= stage.budget_bytes
        params = sum(cost.param_count for cost in costs[slice(*stage.layers)])
        assert stage.param_bytes == params * ITEM_BYTES[precision]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"schedule": "2f2b"}, "unknown schedule '2f2b': give one of gpipe, 1f1b"),
        ({"schedule": "gpipe", "virtual": 2}, "schedule 'gpipe' has 1 stage on each rank"),
        ({"microbatches": 0}, "microbatches 0 must be a whole number of at least 1"),
        ({"accumulate": 0}, "accumulate 0 must be a whole number of at least 1"),
        ({"precision": "fp8"}, "unknown precision 'fp8': give one of fp16, bf16, fp32"),
        ({"transfer": "zip"}, "unknown transfer 'zip': give one of auto, none, fp16, bf16"),
        ({"codecs": ["zip"]}, "codecs must be of 'none', 'fp16', 'bf16', .*, got 'zip'"),
        ({"codecs": ["int8", "int8"]}, "codecs must have one name per boundary, 1, got 2"),
        ({"recompute": "maybe"}, "unknown recompute 'maybe': give one of auto, on .True., off .False., or a list"),
        ({"recompute": [1, 4]}, "recompute names layer 4, but there are layers 0 to 3"),
        ({"schedule": "auto"}, "a plan is made for a schedule and a number of microbatches"),
    ],
)
def test_settings_that_make_no_sense_are_named(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        make_plan(layers(4), CPUS, **arguments)
