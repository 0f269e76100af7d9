"""fp32 layers on CPUs: torch's own ops serve where they are faster, and fused ones where something needs them."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from op_calls import Ops
from torch import Tensor, nn

import spu
from spu import ops
from spu.precision.main_grads import MainGrads

pytestmark = pytest.mark.skipif(not ops.backends()["cpu"].available, reason="spu._C is not built")

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "pair": lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.GELU()),
    "mlp": lambda: nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)),
    "embedding": lambda: nn.Embedding(8, 8, padding_idx=1),
}


@pytest.fixture(params=LAYERS)
def twins(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """A layer, the same one accelerated, and an input."""
    torch.manual_seed(0)
    plain = LAYERS[request.param]()
    x = torch.randint(8, (4, 5)) if request.param == "embedding" else torch.randn(4, 5, 8)
    return plain, spu.accelerate(copy.deepcopy(plain)), x


def gated() -> nn.Module:
    """A gated MLP of a class that accelerate knows."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    return llama.LlamaMLP(llama.LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))  # type: ignore[no-any-return]


def ours_of(model: nn.Module, x: Tensor) -> list[str]:
    """Return the ops of spu that a forward and its backward call."""
    with Ops() as called:
        model(x).square().sum().backward()
    return [name for name in called.full if name.startswith("spu::")]


def test_the_bits_are_torchs(twins: tuple[nn.Module, nn.Module, Tensor]) -> None:
    plain, ours, x = twins
    for _ in range(2):
        plain(x).square().sum().backward()
        assert ours_of(ours, x) == []
    for mine, want in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert torch.equal(mine.grad, want.grad)


def test_fused_ops_serve_what_needs_them(twins: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, ours, x = twins
    if not x.is_floating_point():
        pytest.skip("an embedding has an op of its own in a scope alone")
    with ops.use_backend("cpu"):
        assert ours_of(ours, x)
    scaler = spu.GradScaler("cpu")
    assert ours_of(ours, x)  # its gradients are at true scale
    del scaler
    gc.collect()
    assert ours_of(ours, x) == []
    spu.GradScaler("cpu", enabled=False)
    assert ours_of(ours, x) == []
    with torch.autocast("cpu", torch.bfloat16):
        assert ours_of(ours, x)
    with torch.no_grad(), Ops() as called:
        ours(x)
    assert any(name.startswith("spu::") for name in called.full)
    for parameter in ours.parameters():
        parameter.grad = None
    with MainGrads(list(ours.parameters())) as held:
        held.begin_step()
        assert ours_of(ours, x)
    assert ours_of(ours, x) == []


def test_large_work_is_fused() -> None:
    x = torch.randn(512, 1024)
    assert "spu::mlp" in ours_of(spu.accelerate(nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 8))), x)
    wide = spu.accelerate(nn.Linear(1024, 1024))
    few = torch.randn(4, 1024)
    assert ours_of(wide, few) == []
    assert "spu::linear_dw_" in ours_of(wide, few)  # it adds to the gradient that is there


def test_a_parametrized_weight_is_computed_once() -> None:
    layer = nn.utils.parametrizations.weight_norm(spu.accelerate(nn.Sequential(nn.Linear(4, 4)))[0])
    with Ops() as called:
        layer(torch.randn(2, 4))
    assert called.names.count("_weight_norm_interface") == 1


def test_second_derivatives_are_torchs() -> None:
    found = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
        if accelerated:
            spu.accelerate(model)
        x = torch.randn(3, 4, requires_grad=True)
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([p.grad for p in model.parameters()][:3])
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("name", ["linear", "pair", "mlp", "gated"])
def test_a_precision_of_fp32_holds_under_autocast(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]() if name in LAYERS else gated()
    model, x = spu.accelerate(layer, precision="fp32"), torch.randn(4, 8)
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want)
