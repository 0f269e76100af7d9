"""What layers cost: counted on fake tensors in the form that training gives them."""

from __future__ import annotations

from spu.cost.layer_cost import LayerCost

__all__ = ["LayerCost"]
