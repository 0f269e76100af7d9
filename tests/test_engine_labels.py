"""Labels beside the inputs, and shifted as transformers shifts them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from spu import ModelParallelTrainer  # noqa: E402
from spu.engine.labels import labelled, shifted  # noqa: E402


def test_targets_are_the_next_labels() -> None:
    labels = torch.tensor([[1, 2, -100, 4], [5, -100, -100, 8]])
    assert shifted(labels).tolist() == [[2, -100, 4, -100], [-100, -100, 8, -100]]
    assert shifted(labels[:, :1]).tolist() == [[-100], [-100]]


def test_labels_are_taken_out_of_the_inputs_where_no_targets_are_given() -> None:
    ids, labels = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    inputs, targets = labelled(transformers.BatchEncoding({"input_ids": ids, "labels": labels}), None, shift=False)
    assert type(inputs) is dict
    assert inputs.keys() == {"input_ids"}
    assert targets is labels
    given, own = labelled({"input_ids": ids, "labels": labels}, ids, shift=False)
    assert own is ids  # targets that are given count
    assert given.keys() == {"input_ids", "labels"}
    with pytest.raises(ValueError, match=r"no targets: give them beside the inputs, or as 'labels'"):
        labelled(ids, None, shift=True)


@pytest.mark.parametrize("targets", [torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), [torch.zeros(2, 3)]])
def test_what_is_no_label_is_not_shifted(targets: Any) -> None:
    with pytest.raises(ValueError, match=r"shift=True takes labels as integers \[batch, tokens\].*got a"):
        labelled(torch.zeros(2, 3), targets, shift=True)


def test_the_loss_is_the_models_own() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).train()
    plain = copy.deepcopy(model)
    ids = torch.randint(32, (3, 7))
    labels = ids.clone()
    labels[1, :5] = -100
    own = plain(input_ids=ids, labels=labels).loss
    own.backward()
    with ModelParallelTrainer(model, ["cpu"], precision="fp32", microbatches=1, lr=0.1, shift=True) as trainer:
        assert trainer.evaluate(ids, labels) == own.item()
        loss, _ = trainer.forward_backward({"input_ids": ids, "labels": labels})
        assert loss.item() == own.item()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert ours.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7, msg=name)
        assert trainer.step(ids, labels).targets == (labels[:, 1:] != -100).sum()


def test_labels_of_a_classifier_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    expected = nn.functional.cross_entropy(model(x), y).item()
    with ModelParallelTrainer(model, ["cpu"], precision="fp32", microbatches=1, lr=0.0) as trainer:
        assert trainer.step(x, y).loss == pytest.approx(expected)
        with pytest.raises(ValueError, match="no targets"):
            trainer.step(x)
