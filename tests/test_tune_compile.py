"""What is compiled ahead of a measurement: the launches around a product by a library, without the product."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spu.common.torch_private import TorchDispatchMode

ahead = pytest.importorskip("spu.kernels.ahead", reason="needs triton")

from spu.kernels.arith import INTERPRET  # noqa: E402
from spu.tune import compile as tuned  # noqa: E402
from spu.tune.calls import candidates  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")


class Products(TorchDispatchMode):
    """Counts the matrix products that torch makes."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("op", "launches"), [("linear", 1), ("linear_dx", 0), ("linear_dw", 2)])
def test_products_by_libraries_are_not_made(op: str, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    monkeypatch.setattr(ahead, "build", lambda launch, arch, listing: built.append(launch))
    monkeypatch.setattr(tuned, "REPRESENTATIVE", {"large": (64, 32, 48)})
    found = candidates(op, torch.float16, "large", 90)
    assert [one.kind for one in found[:4]] == ["torch", "cublaslt", "cublaslt", "cublaslt"]
    for index, made in ((0, launches), (1, launches), (2, 0), (3, 0)):
        with Products() as products:
            assert tuned.compile_row((op, "fp16", "large"), 90, 132, index) == made, found[index]
        assert products.count == 0, "minutes on one core, for a shape of the tuner's"
    assert len(built) == 2 * launches
