"""Every op's products are counted: a plan's seconds are made of them."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from spu.common.flops import flop_formulas
from spu.ops.schema import SCHEMAS, overload

NO_PRODUCT = {
    "linear_dz", "linear_db", "linear_db_", "unscale_", "pack", "unpack", "pack_", "unpack_", "copy_in_", "adamw_",
    "grad_sqnorm", "gated_dz", "embedding_dw_", "rms_norm", "rms_norm_to", "rms_norm_backward", "layer_norm",
    "layer_norm_backward", "rotary", "experts_order", "rows_sum", "rows_dot",
}  # fmt: skip


def test_every_op_has_a_formula_or_no_product() -> None:
    known = {packet.__name__ for packet in flop_formulas()}
    assert {name for name in SCHEMAS if name not in known} == NO_PRODUCT


def counted(name: str, *arguments: object) -> int:
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        overload(name, "reference")(*arguments)
    return counter.get_total_flops()


def test_products_of_one_x_count_as_each_does() -> None:
    x, one = torch.ones(5, 8), torch.ones(1)
    weights, dzs = [torch.ones(n, 8) for n in (3, 6)], [torch.ones(5, n) for n in (3, 6)]
    assert counted("linear_each", x, weights, []) == sum(2 * 5 * 8 * n for n in (3, 6))
    grads = [torch.zeros(n, 8) for n in (3, 6)]
    assert counted("linear_dw_each_", dzs, x, grads, one, torch.zeros(1), True) == sum(2 * 5 * 8 * n for n in (3, 6))
    assert counted("linear_add", x, weights[0], None, torch.ones(5, 3)) == 2 * 5 * 8 * 3
    gate, down = torch.ones(6, 8), torch.ones(8, 6)
    both = (x, gate, gate, down, "silu")
    assert counted("gated_mlp_add", *both, x) == counted("gated_mlp", *both, True) == 3 * 2 * 5 * 8 * 6
