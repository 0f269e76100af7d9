"""What crosses a stage boundary."""

from __future__ import annotations

import pytest
import torch
from numeric import assert_equal

from spu import ops
from spu.transfer import Link

CPU = torch.device("cpu")


def test_nothing_is_copied_between_stages_of_one_device() -> None:
    x = torch.randn(3, 4, requires_grad=True) * 2
    link = Link(CPU)
    (received,) = link.receive(link.send((x,)))
    assert received.data_ptr() == x.data_ptr()
    assert not received.requires_grad
    assert link.sent_bytes == 48


@pytest.mark.parametrize("codec", ["int8", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_packed_tensors_arrive_as_the_codec_leaves_them(codec: str, dtype: torch.dtype) -> None:
    tree = {
        "x": torch.randn(5, 7).t().to(dtype),
        "ids": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "wide": torch.randn(2, dtype=torch.float64),
        "none": None,
    }
    link = Link(CPU, codec)
    received = link.receive(link.send(tree))
    assert_equal(received["x"], ops.unpack(ops.pack(tree["x"], codec), (7, 5), dtype, codec=codec))
    assert received["x"].shape == (7, 5)
    for name in ("ids", "mask", "wide"):
        assert_equal(received[name], tree[name], name)
    assert received["none"] is None
    assert link.sent_bytes == ops.wire_bytes((7, 5), dtype, codec) + 3 * 8 + 2 + 2 * 8


def test_an_overflow_is_still_seen_on_the_other_side() -> None:
    x = torch.ones(200)
    x[3], x[100] = torch.inf, torch.nan
    link = Link(CPU, "int8")
    received = link.receive(link.send(x))
    assert not torch.isfinite(received[3])
    assert not torch.isfinite(received[100])
    assert_equal(received[128:], torch.ones(72))
