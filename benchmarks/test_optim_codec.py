"""AdamW, gradient norm and codecs: memory-bound, so each is a share of the copy ceiling."""

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


def test_adamw_fp16(measure: Measure) -> None:
    """Unscaled main gradient in; clip, step and 16-bit copy-out in one pass: 4 reads, 3 fp32 writes and one of fp16."""
    master = torch.randn(PARAMETERS)
    param, grad = master.half(), torch.randn(PARAMETERS)
    m, v, one = torch.zeros_like(grad), torch.zeros_like(grad), torch.ones(1)
    found = torch.zeros(1)
    lists = [[tensor] for tensor in (param, grad, master, m, v, one)]

    def step() -> None:
        OPS.adamw_.cpu(*lists, one, found, 1e-3, 0.9, 0.999, 1e-8, 0.01)

    measure(
        "AdamW step", f"{PARAMETERS} fp16", "spu fp16", step, bytes_=30 * PARAMETERS, intensity=16 / 30,
        targets={"ceiling": 0.85, "torch fused": 1.5},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_adamw_torch(measure: Measure, kind: str) -> None:
    """The same work on fp32 masters: GradScaler's unscaling and check, clip_grad_norm_, the step, the copy."""
    master = torch.nn.Parameter(torch.randn(PARAMETERS))
    param = master.detach().half()
    master.grad = torch.randn(PARAMETERS)
    optimizer = torch.optim.AdamW([master], lr=1e-3, fused=kind == "fused", foreach=kind == "foreach")
    one, found = torch.ones(1), torch.zeros(1)

    def step() -> None:
        torch._amp_foreach_non_finite_check_and_unscale_([master.grad], found, one)
        torch.nn.utils.clip_grad_norm_([master], 1e9)
        optimizer.step()
        param.copy_(master.detach())

    measure("AdamW step", f"{PARAMETERS} fp16", f"torch {kind}", step, bytes_=30 * PARAMETERS)


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
