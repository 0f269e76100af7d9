"""Gradient norm and codecs: memory-bound, so each is a share of the copy ceiling."""

from __future__ import annotations

import pytest
import torch
from conftest import Measure

import spu.ops  # noqa: F401  (defines torch.ops.spu)

pytest.importorskip("spu._C", reason="spu._C is not built here")

OPS = torch.ops.spu
PARAMETERS = 1 << 23
VALUES = 1 << 25  # 64 MB of fp16
INT8 = {"ceiling": 0.6, "torch": 50.0}


@pytest.mark.parametrize("peer", ["spu", "torch"])
def test_grad_sqnorm(measure: Measure, peer: str) -> None:
    grad = torch.randn(PARAMETERS)

    def ours() -> object:
        return OPS.grad_sqnorm.cpu([grad])

    def plain() -> object:
        return torch.linalg.vector_norm(grad)

    function = ours if peer == "spu" else plain
    measure("gradient norm", f"{PARAMETERS}", peer, function, bytes_=4 * PARAMETERS, intensity=0.5)


@pytest.mark.parametrize("peer", ["spu", "torch"])
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8_e4m3", "bf16"])
def test_pack(measure: Measure, codec: str, peer: str) -> None:
    x = torch.randn(VALUES).half()
    op = OPS.pack.cpu if peer == "spu" else OPS.pack.reference
    wire = OPS.pack.cpu(x, codec)
    measure(
        f"pack {codec}", f"{VALUES} fp16", peer, lambda: op(x, codec), bytes_=2 * VALUES + wire.numel(), intensity=1,
        targets=INT8 if codec == "int8" else None, slow=peer == "torch",
    )  # fmt: skip


@pytest.mark.parametrize("peer", ["spu", "torch"])
@pytest.mark.parametrize("codec", ["int8", "int4", "fp8_e4m3", "bf16"])
def test_unpack(measure: Measure, codec: str, peer: str) -> None:
    wire = OPS.pack.cpu(torch.randn(VALUES).half(), codec)
    op = OPS.unpack.cpu if peer == "spu" else OPS.unpack.reference

    def run() -> object:
        return op(wire, [VALUES], torch.float16, codec)

    measure(
        f"unpack {codec}", f"{VALUES} fp16", peer, run, bytes_=2 * VALUES + wire.numel(), intensity=0.5,
        targets=INT8 if codec == "int8" else None, slow=peer == "torch",
    )  # fmt: skip
