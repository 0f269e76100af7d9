"""The batches of one update as one: nothing is lost, and what is added counts nothing."""

from __future__ import annotations

import pytest
import torch

from spu.integrations.hf_batches import joined


def test_batches_of_one_length_are_put_below_each_other() -> None:
    a, b = torch.arange(6).view(2, 3), torch.arange(3).view(1, 3)
    out = joined([{"input_ids": a, "flag": True}, {"input_ids": b, "flag": True}])
    assert torch.equal(out["input_ids"], torch.cat([a, b]))
    assert out["flag"] is True
    assert joined([{"input_ids": a}])["input_ids"] is a


def test_shorter_ones_are_padded_on_the_right_with_what_counts_nothing() -> None:
    def batch(tokens: int) -> dict[str, torch.Tensor]:
        ids = torch.full((1, tokens), 7)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "weights": torch.ones(1)}

    out = joined([batch(2), batch(4)])
    assert out["input_ids"].tolist() == [[7, 7, 0, 0], [7, 7, 7, 7]]
    assert out["labels"].tolist() == [[7, 7, -100, -100], [7, 7, 7, 7]]
    assert out["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert out["weights"].tolist() == [1, 1]


def test_what_has_no_known_padding_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'pixels' has shapes \(1, 2\), \(1, 3\) in one update"):
        joined([{"pixels": torch.zeros(1, 2)}, {"pixels": torch.zeros(1, 3)}])
    with pytest.raises(ValueError, match=r"'attention_mask' has shapes \(1, 1, 2, 2\), \(1, 1, 3, 3\) in one update"):
        joined([{"attention_mask": torch.ones(1, 1, tokens, tokens)} for tokens in (2, 3)])
    with pytest.raises(ValueError, match="have different keys: a, b"):
        joined([{"a": torch.zeros(1)}, {"b": torch.zeros(1)}])
    with pytest.raises(ValueError, match="'n' is no tensor and differs"):
        joined([{"n": 1}, {"n": 2}])
