"""Recording the lease's launches: what computes on large tensors is left out, what shapes depend on is not."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
GPU = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import carry  # noqa: E402

from spu import kernels  # noqa: E402
from spu.kernels import ahead  # noqa: E402
from spu.kernels.arith import INTERPRET  # noqa: E402


def test_large_results_have_shape_and_strides_and_no_values() -> None:
    with carry.Idle():
        x = torch.randn(1 << 20, 4096)  # 16 GB, never touched
        y = F.linear(x, torch.randn(4096, 4096)).t().half()
        assert x.add_(1) is x
        assert y[:, 3:].storage_offset() == 3 * y.stride(1)
        picked = torch.randint(0, 5, (1 << 17,))
        small = torch.full((4,), 2.0) * 3
    assert (y.shape, y.dtype, y.stride()) == ((4096, 1 << 20), torch.float16, (1, 4096))
    assert int(picked.max()) < 5, "indices are real"
    assert small.tolist() == [6.0] * 4, "and small values"


def test_gradients_flow_without_values() -> None:
    with carry.Idle():
        w = torch.zeros(2048, 2048, requires_grad=True)
        F.gelu(torch.randn(4096, 2048) @ w).sum().backward()
    assert w.grad is not None
    assert w.grad.shape == w.shape


@pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")
def test_a_launch_goes_to_another_process_whole() -> None:
    with ahead.recording(90, 132) as kept:
        kernels.linear_dz(torch.empty(64, 64).half(), torch.empty(64, 64).half(), "gelu")
    (launch,) = kept
    again = pickle.loads(pickle.dumps(launch))
    assert again == launch
    assert again.kernel is launch.kernel
    assert (again.signature, again.constexprs, again.attrs) == (launch.signature, launch.constexprs, launch.attrs)


def test_code_for_a_card_finds_the_cpu() -> None:
    with carry.OnCpu():
        assert torch.zeros(3, device="cuda").cuda().device.type == "cpu"
        assert torch.randn(2).to("cuda:0", torch.float16).dtype == torch.float16
