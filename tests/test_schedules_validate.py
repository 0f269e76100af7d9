"""The validator accepts what can be run and marks the first bad action of what cannot."""

from __future__ import annotations

import graphlib

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spu.schedules import Action, ScheduleError, forward_only, gpipe, one_f_one_b, parse_grid, validate

SIZES = {"stages": st.integers(1, 5), "microbatches": st.integers(1, 6), "make": st.sampled_from([gpipe, one_f_one_b])}


def marked(actions, stages, microbatches, **options):
    """The line that the validator marks, without the position in front."""
    with pytest.raises(ScheduleError) as error:
        validate(actions, stages, microbatches, **options)
    lines = [line for line in str(error.value).splitlines() if "<-- ERROR HERE" in line]
    assert len(lines) == 1, str(error.value)
    return lines[0]


def runnable(actions, stages):
    """An oracle of another kind: the graph of all dependencies has no cycle (graphlib)."""
    graph = {}
    for row in actions:
        for before, action in zip([None, *row], row, strict=False):
            needs = {before} if before else set()
            if action.kind == "F" and action.stage:
                needs.add(Action(action.stage - 1, "F", action.microbatch))
            if action.kind == "B" and action.stage < stages - 1:
                needs.add(Action(action.stage + 1, "B", action.microbatch))
            graph[action] = needs
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        return False
    return True


@given(st.data(), *SIZES.values())
@settings(max_examples=60)
def test_a_dropped_action_is_found(data, stages, microbatches, make):
    actions = make(stages, microbatches)
    row = data.draw(st.integers(0, stages - 1))
    gone = actions[row].pop(data.draw(st.integers(0, len(actions[row]) - 1)))
    with pytest.raises(ScheduleError) as error:
        validate(actions, stages, microbatches)
    assert str(error.value).startswith(f"invalid schedule, rank {row}, ")
    assert str(gone) in str(error.value)


@given(st.data(), *SIZES.values())
@settings(max_examples=60)
def test_a_doubled_action_is_marked_where_it_comes_again(data, stages, microbatches, make):
    actions = make(stages, microbatches)
    row = data.draw(st.integers(0, stages - 1))
    at = data.draw(st.integers(0, len(actions[row]) - 1))
    again = actions[row][at]
    where = data.draw(st.integers(at + 1, len(actions[row])))
    actions[row].insert(where, again)
    line = marked(actions, stages, microbatches)
    assert line.startswith(str(where)) or line.lstrip().startswith(f"{where} ")
    assert f"[{again}]" in line
    assert f"{again} is done twice, first at position {at}" in line


@given(st.data(), *SIZES.values())
@settings(max_examples=60)
def test_an_action_of_another_stage_is_marked(data, stages, microbatches, make):
    assume(stages > 1)
    actions = make(stages, microbatches)
    row = data.draw(st.integers(0, stages - 1))
    at = data.draw(st.integers(0, len(actions[row]) - 1))
    stranger = actions[row][at]._replace(stage=(row + 1) % stages)
    actions[row][at] = stranger
    assert f"[{stranger}]" in marked(actions, stages, microbatches)


@given(st.data(), *SIZES.values())
@settings(max_examples=150)
def test_swapped_actions_are_accepted_exactly_when_they_can_be_run_in_order(data, stages, microbatches, make):
    actions = make(stages, microbatches)
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.integers(0, stages - 1))
        at = data.draw(st.integers(0, len(actions[row]) - 2))
        actions[row][at : at + 2] = reversed(actions[row][at : at + 2])
    ascending = all(
        [a.microbatch for a in row if a.kind == kind] == list(range(microbatches)) for row in actions for kind in "FB"
    )
    forward_first = all(
        row.index((s, "F", i)) < row.index((s, "B", i)) for s, row in enumerate(actions) for i in range(microbatches)
    )
    if ascending and forward_first and runnable(actions, stages):
        validate(actions, stages, microbatches)
    else:
        marked(actions, stages, microbatches)


def test_the_first_bad_action_is_the_one_marked():
    actions = parse_grid("""
        0F0 0F1 0B1 0B0
        1F0 1B0 1B1 1F1
    """)
    assert marked(actions, 2, 2) == "2  0B1   [1B1]  <-- ERROR HERE: 1B1 comes before 1F1"
    actions[1] = parse_grid("1F0 1B0 1F1 1B1")[0]
    assert "[0B0]   1B1  <-- ERROR HERE: 0B0 comes after microbatch 1" in marked(actions, 2, 2)


def test_a_deadlock_says_who_waits_for_whom():
    actions = parse_grid("""
        0F0 0B0 0F1 0B1
        1F0 1F1 1B0 1B1
    """)
    line = marked(actions, 2, 2)
    assert line.startswith("1 [0B0]")
    assert "deadlock: 0B0 waits for 1B0, 1F1 waits for 0F1" in line


def test_a_missing_action_is_marked_behind_the_end():
    line = marked(parse_grid("0F0 0B0\n1F0"), 2, 1)
    assert "[]" in line
    assert "1B0 is missing" in line


def test_a_split_backward_is_accepted_and_its_faults_are_found():
    validate(parse_grid("0F0 0F1 0I0 0I1 0W0 0W1\n1F0 1B0 1F1 1B1"), 2, 2)
    assert "0W0 comes before 0I0" in marked(parse_grid("0F0 0W0 0I0"), 1, 1)
    assert "0W0 is missing" in marked(parse_grid("0F0 0I0"), 1, 1)
    assert "0B0 repeats a backward that 0I0 has done" in marked(parse_grid("0F0 0I0 0B0"), 1, 1)
    assert "0W0 comes after microbatch 1" in marked(parse_grid("0F0 0F1 0I0 0I1 0W1 0W0"), 1, 2)


def test_unknown_kinds_and_microbatches_are_named():
    assert "'X' is no kind of action" in marked([[Action(0, "X", 0)]], 1, 1)
    assert "0F2 names microbatch 2, but there are 2 (0 to 1)" in marked(parse_grid("0F0 0F2"), 1, 2)


def test_forward_only_schedules_are_checked_as_such():
    validate(forward_only(3, 2), 3, 2, forward_only=True)
    assert "0B0 is missing" in marked(forward_only(1, 1), 1, 1)
    assert "0B0 is not a forward" in marked(gpipe(1, 1), 1, 1, forward_only=True)


def test_the_number_of_lists_is_the_number_of_ranks():
    with pytest.raises(ScheduleError, match="2 lists of actions for 3 ranks"):
        validate(gpipe(2, 2), 3, 2)
