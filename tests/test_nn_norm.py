"""Norms and embeddings in accelerated models: which classes change, that results are torch's, and their gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor, nn

from spu import nn as spu_nn
from spu.nn.norm import FusedNorm, norm_block
from spu.nn.table import NormBlock
from spu.ops import backends, use_backend
from spu.precision import LossScaler, MainGrads

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
needs_kernels = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")


class TheirRMSNorm(nn.Module):
    """As in transformers, but for its home."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


@pytest.mark.parametrize(
    ("family", "block"),
    [
        ("llama", NormBlock("variance_epsilon", 0.0, True)),
        ("qwen3", NormBlock("variance_epsilon", 0.0, True)),
        ("gpt_oss", NormBlock("variance_epsilon", 0.0, False)),
        ("gemma2", NormBlock("eps", 1.0, False)),
    ],
)
def test_transformers_norms_are_known_by_what_they_compute(family: str, block: NormBlock) -> None:
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    cls = next(v for n, v in vars(modeling).items() if n.lower() == f"{family.replace('_', '')}rmsnorm")
    module = cls(40, eps=1e-6)
    assert norm_block(module) == block
    with torch.no_grad():
        module.weight.copy_(torch.randn(40) / 4 + 1)
    plain = copy.deepcopy(module)
    assert isinstance(spu_nn.accelerate(module), FusedNorm)
    for dtype in DTYPES:
        x = (torch.randn(9, 40) * 3).to(dtype)
        for one in (module, plain):
            one.to(dtype)
        exact = copy.deepcopy(plain).double()
        exact.to(torch.float64)
        truth = _in_fp64(exact, x, block)
        assert_close_to_truth(module(x), plain(x), truth)
        assert_equal(module(hidden_states=x) if family != "gemma2" else module(x=x), plain(x))
    assert type(spu_nn.restore(module)) is cls


def _in_fp64(module: nn.Module, x: Tensor, block: NormBlock) -> Tensor:
    v = x.double()
    return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6) * (module.weight.detach() + block.offset)


def test_other_norms_are_left_alone() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")

    class Doubled(modeling.LlamaRMSNorm):  # a subclass of the user's
        def forward(self, hidden_states: Tensor) -> Tensor:
            return 2 * super().forward(hidden_states)

    assert norm_block(TheirRMSNorm(8)) is None  # defined elsewhere
    assert norm_block(Doubled(8)) is None
    Doubled.__module__ = modeling.__name__  # not even where its home would do: its values tell
    assert norm_block(Doubled(8)) is None
    extended = modeling.LlamaRMSNorm(8)
    extended.bias = nn.Parameter(torch.zeros(8))
    assert norm_block(extended) is None

    class Own(nn.LayerNorm):
        pass

    model = spu_nn.accelerate(nn.Sequential(Own(8), nn.GroupNorm(2, 8)))
    assert [type(part) for part in model] == [Own, nn.GroupNorm]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accelerated_modules_compute_what_torchs_do(backend: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Embedding(11, 24, padding_idx=3), nn.LayerNorm(24), nn.RMSNorm(24, eps=1e-5)).to(dtype)
    ids = torch.randint(0, 11, (4, 6))
    plain, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    spu_nn.accelerate(model)
    assert [type(part) for part in model] == [spu_nn.Embedding, spu_nn.LayerNorm, spu_nn.RMSNorm]
    results, weights = [], torch.randn(4, 6, 24)
    for one in (model, plain, truth):
        with use_backend(backend if one is model else None):
            y = one(ids)
            (y * weights.to(y.dtype)).sum().backward()
        results.append([y, *(p.grad for p in one.parameters())])
    for ours, theirs, exact in zip(*results, strict=True):
        eps = 6 * torch.finfo(dtype).eps * float(exact.abs().max())
        assert_close_to_truth(ours, theirs, exact, eps=eps)
    assert_equal(results[0][1][3], torch.zeros(24, dtype=dtype))


@needs_kernels
def test_sinks_take_the_gradients_of_an_accelerated_model() -> None:
    model = nn.Sequential(nn.Embedding(7, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.RMSNorm(16)).half()
    truth = copy.deepcopy(model).double()
    spu_nn.accelerate(model)
    ids = torch.randint(0, 7, (3, 5))
    scaler = LossScaler(init_scale=4096.0)
    weights = torch.randn(3, 5, 16)
    with MainGrads(model.parameters()) as main:
        main.begin_step()
        scaler.scale((model(ids).float() * weights).mean()).backward()
    (truth(ids) * weights.double()).mean().backward()
    for ours, exact in zip(model.parameters(), truth.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=2e-2, atol=2e-3 * float(exact.grad.abs().max()))


@needs_kernels
def test_what_the_ops_do_not_know_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an op of ours was called")

    monkeypatch.setattr("spu.nn.norm.fused_rms_norm", refuse)
    monkeypatch.setattr("spu.nn.norm.fused_layer_norm", refuse)
    monkeypatch.setattr("spu.nn.embedding.embedding", refuse)
    x = torch.randn(2, 3, 4)
    for module, given in (
        (nn.LayerNorm((3, 4)), x),
        (nn.LayerNorm(4).double(), x.double()),
        (nn.RMSNorm((3, 4)), x),
        (nn.Embedding(5, 4, max_norm=1.0), torch.tensor([1, 2])),
        (nn.Embedding(5, 4, scale_grad_by_freq=True), torch.tensor([1, 1])),
        (nn.Embedding(5, 4, sparse=True), torch.tensor([1, 2])),
    ):
        plain = copy.deepcopy(module)
        assert_equal(spu_nn.accelerate(module)(given), plain(given))
        assert type(spu_nn.restore(module)) is type(plain)


def test_copies_pickles_scripts_and_states() -> None:
    model = spu_nn.accelerate(nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.RMSNorm(8)))
    ids = torch.tensor([1, 4])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.jit.script(model)):
        torch.testing.assert_close(other(ids), model(ids))
    plain = nn.Sequential(nn.Embedding(5, 8), nn.LayerNorm(8), nn.RMSNorm(8))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(ids), model(ids))


def test_modules_of_our_own_have_torchs_arguments() -> None:
    layer = spu_nn.LayerNorm(8, eps=1e-3, bias=False)
    assert layer.bias is None
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x), nn.functional.layer_norm(x, (8,), layer.weight, None, 1e-3))
    assert type(spu_nn.restore(nn.Sequential(layer))[0]) is spu_nn.LayerNorm
    embedding = spu_nn.Embedding(5, 3, padding_idx=0)
    assert embedding(torch.tensor([0])).eq(0).all()
