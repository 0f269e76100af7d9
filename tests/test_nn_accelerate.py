"""spu.nn.Linear, accelerate and restore: the same module to everyone who looks."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backend_params import every_backend
from numeric import assert_close_to_truth, assert_equal
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

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


def watched(model: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """The names of the ops of spu that a call runs, and its result."""
    names: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "spu":
                place = {"linear": 3, "mlp": 5}.get(func._opname)  # of the activation
                names.append(func._opname if place is None else f"{func._opname}:{args[place]}")
            return func(*args, **(kwargs or {}))

    with Watch(), torch.no_grad():
        y = model(x)
    return names, y


@pytest.mark.parametrize(
    ("activation", "name"),
    [(nn.ReLU(inplace=True), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.SiLU(), "silu")],
)
def test_a_linear_and_the_activation_after_it_become_one_op(activation: nn.Module, name: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), activation, nn.LayerNorm(8), nn.Linear(8, 4), nn.Dropout(0.0), nn.Tanh())
    x = torch.randn(5, 6)
    expected = model(x)
    keys = list(accelerate(model).state_dict())
    assert isinstance(model, nn.Sequential)
    assert [type(layer).__name__ for layer in model] == ["Linear", type(activation).__name__, "LayerNorm", "Linear",
                                                         "Dropout", "Tanh"]  # fmt: skip
    names, y = watched(model, x)
    assert names == [f"linear:{name}", "linear:none"]
    torch.testing.assert_close(y, expected.detach())
    seen: list[nn.Module] = []
    handle = model[1].register_forward_hook(lambda module, *_: seen.append(module))
    assert watched(model, x)[0] == ["linear:none", "linear:none"]
    assert seen == [activation]
    handle.remove()
    assert watched(model[:2], x)[0] == [f"linear:{name}"]
    assert type(restore(model)) is nn.Sequential
    assert watched(model, x)[0] == []
    assert list(model.state_dict()) == keys


def test_a_linear_layer_after_the_activation_joins_them() -> None:
    def chain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4, bias=False), nn.LayerNorm(4)
        )

    model, plain, x = accelerate(chain()), chain(), torch.randn(5, 6)
    names, y = watched(model, x)
    assert names == ["linear:relu", "mlp:gelu"], "a linear layer goes with the activation after it first"
    torch.testing.assert_close(y, plain(x).detach())
    for module in (model, plain):
        module(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    seen: list[nn.Module] = []
    handle = model[4].register_forward_hook(lambda module, *_: seen.append(module))
    assert watched(model, x)[0] == ["linear:relu", "linear:gelu", "linear:none"], "its hook is run"
    assert seen == [model[4]]
    handle.remove()
    model[2].spu_dtype = torch.bfloat16  # another precision than the layer after it
    assert watched(model, x)[0] == ["linear:relu", "linear:gelu", "linear:none"]
    model[2].spu_dtype = None
    model[4] = nn.Linear(8, 4, bias=False).requires_grad_(False)  # not accelerated: an ordinary layer may be part
    assert watched(model, x)[0] == ["linear:relu", "mlp:gelu"]


FAMILIES = {  # configuration, and the ops of one MLP block
    "Llama": ("gated_mlp", {}),
    "InternLM3": ("gated_mlp", {}),
    "Qwen2": ("gated_mlp", {}),
    "Qwen3": ("gated_mlp", {}),
    "Mistral": ("gated_mlp", {"sliding_window": 8}),
    "Gemma": ("gated_mlp", {"head_dim": 8}),
    "GPT2": ("mlp:gelu_tanh", {}),
    "GPTNeoX": ("mlp:gelu", {}),
    "Bert": ("linear:gelu", {}),
    "Roberta": ("linear:gelu", {}),
}


def hugging_face(family: str) -> tuple[nn.Module, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    config_class = getattr(transformers, f"{family}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family}Config")
    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **FAMILIES[family][1],
    )  # fmt: skip
    model_class = transformers.AutoModel if family in ("Bert", "Roberta") else transformers.AutoModelForCausalLM
    return model_class.from_config(config).eval(), torch.randint(5, 64, (2, 9))


def outputs(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None])[0]


def outputs_and_gradients(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    y = outputs(model, ids)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_hugging_face(family: str) -> None:
    model, ids = hugging_face(family)
    expected = outputs_and_gradients(model, ids)
    keys, parameters, classes = list(model.state_dict()), list(model.parameters()), [type(m) for m in model.modules()]
    assert accelerate(model) is model
    names, _ = watched(lambda given: outputs(model, given), ids)
    assert names.count(FAMILIES[family][0]) == 2, names
    for a, b in zip(outputs_and_gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(issubclass(type(m), cls) for m, cls in zip(model.modules(), classes, strict=True))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert [type(m) for m in restore(other).modules()] == classes
    assert [type(m) for m in restore(model).modules()] == classes
    for a, b in zip(outputs_and_gradients(model, ids), expected, strict=True):
        assert_equal(a, b)


@pytest.mark.parametrize("family", ["Llama", "Bert"])
def test_attention_of_16_bit_models(family: str) -> None:
    """Fused on the CPU, as exact as torch's; restore gives torch's back."""
    model, ids = hugging_face(family)
    truth = outputs(model.double(), ids).detach()
    model.half()
    plain = outputs(model, ids).detach()
    accelerate(model)
    names, y = watched(lambda given: outputs(model, given), ids)
    if importlib.util.find_spec("spu._C") is not None:
        assert names.count("attention") == 2, names
    assert_close_to_truth(y, plain, truth, name=family)
    assert_equal(outputs(restore(model), ids).detach(), plain)


def test_copies_in_another_process_know_their_attention() -> None:
    made = [hugging_face(family) for family in ("Llama", "Bert")]
    copies = pickle.dumps([(accelerate(model.half()), ids) for model, ids in made])
    # A new process, in which nothing has imported transformers before the models come.
    done = subprocess.run([sys.executable, "-c", RUN_COPIES], input=copies, capture_output=True, timeout=200)
    assert done.stdout.split() == [b"False", b"2"], done.stderr.decode()


RUN_COPIES = """
import pickle, sys, torch, spu
print("transformers" in sys.modules, flush=True)
print(len([model(input_ids=ids) for model, ids in pickle.loads(sys.stdin.buffer.read())]))
"""


def test_parts_that_were_replaced_or_are_watched_run_one_by_one() -> None:
    mlp = accelerate(hugging_face("Llama")[0]).model.layers[0].mlp
    x = torch.randn(3, 32)
    expected = mlp(x)
    seen: list[torch.Tensor] = []
    handle = mlp.up_proj.register_forward_hook(lambda module, args, y: seen.append(y))
    names, y = watched(mlp, x)
    assert "gated_mlp" not in names
    assert len(seen) == 1
    torch.testing.assert_close(y, expected.detach())
    handle.remove()
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Identity())  # an adapter
    names, y = watched(mlp, x)
    assert "gated_mlp" not in names
    torch.testing.assert_close(y, expected.detach())


def test_a_class_of_the_same_name_elsewhere_is_left_alone() -> None:
    class LlamaMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4, bias=False) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gate_proj(x)

    assert type(accelerate(LlamaMLP())) is LlamaMLP


def test_precision_chooses_what_is_computed_in() -> None:
    model, x = net(), torch.randn(3, 6)
    keys = list(model.state_dict())
    halved = accelerate(copy.deepcopy(model), precision="bf16")
    y = halved(x)
    assert y.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model[:2](x)
    assert_equal(halved[:2](x).detach(), first.detach().float(), "the first two layers")
    y.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in halved.parameters())
    assert list(halved.state_dict()) == keys
    wide = accelerate(copy.deepcopy(model), precision="fp32")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = wide[0](x)
    assert_equal(y.detach(), accelerate(model)[0](x).detach(), "fp32 inside autocast")
    assert "spu_dtype" not in restore(halved)[0].__dict__
    with pytest.raises(ValueError, match="unknown precision 'int8': use one of 'fp16', 'bf16', 'fp32'"):
        accelerate(model, precision="int8")
    with pytest.raises(
        TypeError, match=r"accelerate takes a module, got <class.*: give the model, such as Linear\(...\)"
    ):
        accelerate(nn.Linear)  # type: ignore[type-var]


@pytest.mark.leaks_threads  # the compiler's
def test_accelerated_blocks_compile_whole() -> None:
    model, _ = hugging_face("Llama")
    mlp, sequential = accelerate(model).model.layers[0].mlp, accelerate(nn.Sequential(nn.Linear(32, 8), nn.GELU()))
    x = torch.randn(3, 32)
    for module in (mlp, sequential):
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x), module(x))


def test_precision_holds_for_linears_of_the_users_own() -> None:
    model = accelerate(nn.Sequential(Linear(3, 4, activation="relu"), nn.Linear(4, 2)), "fp16")
    assert [layer.spu_dtype for layer in model] == [torch.float16, torch.float16]
    restore(model)
    assert [type(layer) for layer in model] == [Linear, nn.Linear]
    assert model[0].spu_dtype is None


def test_restore_names_a_class_that_changed_since_and_changes_nothing() -> None:
    model = accelerate(net())
    torch.nn.utils.parametrizations.weight_norm(model[2][0])
    with pytest.raises(ValueError, match=r"module '2.0' was accelerated and is a ParametrizedLinear since"):
        restore(model)
    assert type(model[0]) is Linear
    torch.nn.utils.parametrize.remove_parametrizations(model[2][0], "weight")
    restore(model)
    assert type(model[0]) is type(model[2][0]) is nn.Linear
