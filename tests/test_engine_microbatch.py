"""Splitting batches and weighing their parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from numeric import assert_equal

from spu.engine import microbatch
from spu.engine.microbatch import count_each, count_targets, move, shares_of, split_batch, target_weights


@given(rows=st.integers(1, 40), parts=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_parts_join_to_the_whole_and_differ_by_one_row_at_most(rows: int, parts: int) -> None:
    batch = {"a": torch.arange(rows), "b": (torch.randn(rows, 2), "text")}
    if rows < parts:
        with pytest.raises(ValueError, match=f"{rows} rows.*{parts} microbatches"):
            split_batch(batch, parts)
        return
    pieces = split_batch(batch, parts)
    assert len(pieces) == parts
    assert_equal(torch.cat([p["a"] for p in pieces]), batch["a"])
    assert_equal(torch.cat([p["b"][0] for p in pieces]), batch["b"][0])
    assert all(p["b"][1] == "text" for p in pieces)
    sizes = [len(p["a"]) for p in pieces]
    assert max(sizes) - min(sizes) <= 1


@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_weighted_means_add_up_to_the_mean_of_the_whole(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets, logits = [], []
    for count in counts:
        target = torch.full((6,), -100)
        target[:count] = torch.randint(5, (count,), generator=generator)
        targets.append(target)
        logits.append(torch.randn(6, 5, generator=generator))
    weights = target_weights(targets)
    assert sum(weights).item() == pytest.approx(1.0)
    total = sum(w * F.cross_entropy(x, y) for w, x, y, count in zip(weights, logits, targets, counts) if count)
    whole = F.cross_entropy(torch.cat(logits), torch.cat(targets))
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)


def test_an_object_that_hides_tensors_is_named() -> None:
    """It went to every microbatch as a whole."""

    class Masked:
        def __init__(self) -> None:
            self.mask = torch.ones(4)

    with pytest.raises(TypeError, match="inputs hold a Masked with tensors.*torch.utils._pytree"):
        split_batch({"x": torch.ones(4), "mask": Masked()}, 2)


def test_microbatches_have_version_counters_of_their_own() -> None:
    x = torch.zeros(4, 2)
    first, second = split_batch(x, 2)
    second += 1
    assert (first._version, second._version) == (0, 1)
    assert_equal(x, torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))


def test_what_counts() -> None:
    assert count_targets(torch.tensor([1, -100, 3])) == 2
    assert count_targets(torch.tensor([1, 0, 3]), ignore_index=0) == 2
    assert count_targets(torch.randn(3, 4)) == 12
    assert count_targets({"a": torch.tensor([1]), "b": torch.randn(2)}) == 3
    with pytest.raises(ValueError, match="no target"):
        target_weights([torch.tensor([-100])])
    with pytest.raises(ValueError, match="no tensor"):
        split_batch("text", 2)
    custom = target_weights([torch.zeros(2), torch.zeros(2)], loss_weight=lambda part: 3.0)
    assert [w.item() for w in custom] == [0.5, 0.5]


def test_a_card_reads_no_memory_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked inputs that were filled with the next batch after a step were read then, by the step before."""
    read: list[tuple[torch.Tensor, bool]] = []
    staged: list[torch.Tensor] = []

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        read.append((tensor, non_blocking))
        return tensor

    monkeypatch.setattr(microbatch, "in_page_locked_memory", lambda t: staged.append(t.clone()) or staged[-1])
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch = {"ids": torch.arange(6).view(2, 3), "mask": (torch.ones(3), "text")}
    wanted = torch.ones(2, requires_grad=True)
    move(batch, torch.device("cuda:0"))
    assert [given is own and later for (given, later), own in zip(read, staged, strict=True)] == [True, True]
    assert_equal(staged[0], batch["ids"])
    move(wanted, torch.device("cuda:0"))  # whose gradient comes back
    move(batch, torch.device("cpu"))
    assert [given is own for (given, _), own in zip(read[2:], [wanted, batch["ids"], batch["mask"][0]])] == [True] * 3
    assert [later for _, later in read[2:]] == [True, False, False]


def test_targets_counted_together_are_those_counted_one_by_one() -> None:
    draws = torch.Generator().manual_seed(0)
    whole = torch.randint(-1, 3, (10, 7), generator=draws)
    for parts in (split_batch(whole, 5), split_batch(whole[:, 0], 2), split_batch(whole.to(torch.uint8), 10)):
        counts = count_each(parts, ignore_index=-1)
        assert counts == [int(count_targets(part, ignore_index=-1)) for part in parts]
        assert counts is not None
        assert shares_of(counts, -1) == target_weights(parts, ignore_index=-1)
    with pytest.raises(ValueError, match="no target of the batch counts.*ignore_index -1"):
        shares_of([0, 0], -1)
    assert count_each(split_batch(whole, 4)) is None  # of two sizes
    for others in ([whole.float()], [whole > 0], [whole, None], [(whole, whole)], [whole.to("meta")], []):
        assert count_each(others) is None
