"""spu.nn.Linear, accelerate and restore: the same module to everyone who looks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from torch import nn

from spu.nn import Linear, accelerate, restore
from spu.ops import use_backend


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8)))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accelerate_changes_the_kernels_only(backend: str, dtype: torch.dtype) -> None:
    model = net().to(dtype).eval()
    plain, truth, x = copy.deepcopy(model), copy.deepcopy(model).double(), torch.randn(3, 6).to(dtype)
    before, keys = list(model.parameters()), list(model.state_dict())
    seen: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, *_: seen.append(module))
    assert accelerate(model) is model
    assert type(model[0]) is type(model[2][0]) is Linear
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert list(model.state_dict()) == keys
    assert not model[0].training
    with use_backend(backend):
        y = model(x)
    # Three roundings of intermediate results in 16 bits.
    assert_close_to_truth(y, plain(x), truth(x.double()), eps=4 * torch.finfo(dtype).eps * 3)
    assert seen == [model[0]]
    assert restore(model) is model
    assert type(model[0]) is nn.Linear
    assert "_spu_accelerated" not in model[0].__dict__
    assert_equal(model(x).detach(), plain(x).detach(), "y")


def test_accelerated_models_copy_pickle_and_load() -> None:
    model = accelerate(net())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is Linear
        assert type(restore(other)[0]) is nn.Linear
    plain = net()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), plain(x))


def test_subclasses_and_own_linears_are_left_alone() -> None:
    class Special(nn.Linear):
        pass

    own = Linear(3, 4, activation="silu")
    model = accelerate(nn.Sequential(Special(3, 3), own))
    assert type(model[0]) is Special
    assert type(restore(model)[1]) is Linear


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_linear_with_an_activation(activation: str) -> None:
    functions = {"none": nn.Identity(), "relu": nn.ReLU(), "gelu": nn.GELU(), "silu": nn.SiLU()}
    function = functions.get(activation, nn.GELU("tanh"))
    layer, x = Linear(5, 7, activation=activation), torch.randn(2, 3, 5)
    torch.testing.assert_close(layer(x), function(nn.functional.linear(x, layer.weight, layer.bias)))
    assert f"activation={activation}" in repr(layer)


def test_an_unknown_activation_is_named_at_construction() -> None:
    with pytest.raises(ValueError, match="unknown activation 'swish': use one of 'none', 'relu'"):
        Linear(3, 4, activation="swish")
