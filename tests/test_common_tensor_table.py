"""A table by tensors' identity: it keeps none alive, and finds a parameter that only a graph holds."""

from __future__ import annotations

import gc

import torch
from torch import nn

from spu.common.tensor_table import TensorTable


def test_entries_are_by_identity() -> None:
    table: TensorTable[str] = TensorTable()
    one, other = torch.ones(2), torch.ones(2)
    table[one] = "one"
    assert (table.get(one), table.get(other), len(table)) == ("one", None, 1)
    table[one] = "again"
    assert (table.pop(one), table.pop(one), len(table)) == ("again", None, 0)
    table[one] = table[other] = "more"
    table.clear()
    assert (table.get(one), len(table)) == (None, 0)


def test_an_entry_goes_with_its_tensor() -> None:
    table: TensorTable[int] = TensorTable()
    for i in range(100):  # many have the same place in memory, one after the other
        tensor = torch.ones(1)
        assert table.get(tensor) is None
        table[tensor] = i
        assert table.get(tensor) == i
    del tensor
    gc.collect()
    assert len(table) == 0


def test_a_parameter_that_only_a_graph_holds_keeps_its_entry() -> None:
    table: TensorTable[str] = TensorTable()
    parameter = nn.Parameter(torch.ones(2))
    table[parameter] = "kept"
    loss = (parameter * 2).sum()
    del parameter
    gc.collect()
    node = loss.grad_fn
    assert node is not None
    leaf = node.next_functions[0][0].next_functions[0][0].variable  # type: ignore[union-attr]
    assert table.get(leaf) == "kept"
    del leaf, node, loss
    gc.collect()
    assert len(table) == 0
