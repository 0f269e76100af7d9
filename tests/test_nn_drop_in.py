"""Accelerated modules against the same modules in plain torch: every kind of input, weight, wrapper and transform.

What the fused ops do not know is torch's own, so the two agree in every case that torch takes.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

import spu
from spu.ops import use_backend

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's, on its prototypes and on what it will drop

WIDTH = 8
Module = Callable[[Tensor], Tensor]


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Sequential(nn.Linear(16, WIDTH))
    )


def gated() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=WIDTH, intermediate_size=12, num_attention_heads=2)
    return transformers.models.llama.modeling_llama.LlamaMLP(config)  # type: ignore[no-any-return]


def pair() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=WIDTH, resid_pdrop=0.0)
    return transformers.models.gpt2.modeling_gpt2.GPT2MLP(12, config)  # type: ignore[no-any-return]


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "sequential": sequential,
    "gated": gated,
    "pair": pair,
    "norms": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-6)),
}


def twins(name: str, precision: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A module in plain torch and its accelerated copy."""
    module = MODULES[name]().eval()
    return module, spu.accelerate(copy.deepcopy(module), precision)


def dense(y: Tensor) -> Tensor:
    if y.is_nested:
        return torch.cat([part.flatten() for part in y.unbind()])
    return y if y.layout is torch.strided else y.to_dense()


def assert_same(ours: Any, plain: Any, tolerance: float = 1e-5) -> None:
    pairs = zip(ours, plain, strict=True) if isinstance(plain, tuple | list) else [(ours, plain)]
    for a, b in pairs:
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        torch.testing.assert_close(dense(a), dense(b), rtol=tolerance, atol=tolerance)


class Marked(Tensor):
    """A subclass that torch's ops keep."""


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, WIDTH), torch.randn(3, WIDTH)], layout=layout)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(3, WIDTH),
    "one row": lambda: torch.randn(WIDTH),
    "batches": lambda: torch.randn(2, 3, WIDTH),
    "no rows": lambda: torch.randn(0, WIDTH),
    "strided": lambda: torch.randn(WIDTH, 3).t(),
    "negative view": lambda: torch.complex(torch.randn(3, WIDTH), torch.randn(3, WIDTH)).conj().imag,
    "jagged": lambda: nested(torch.jagged),
    "nested": lambda: nested(torch.strided),
    "sparse": lambda: torch.randn(3, WIDTH).to_sparse(),
    "csr": lambda: torch.randn(3, WIDTH).to_sparse_csr(),
    "mkldnn": lambda: torch.randn(3, WIDTH).to_mkldnn(),
    "subclass": lambda: torch.randn(3, WIDTH).as_subclass(Marked),
    "meta": lambda: torch.randn(3, WIDTH, device="meta"),
}


def dual(module: Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level(), torch.no_grad():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def gradients(module: Module, x: Tensor) -> tuple[Tensor, ...]:
    assert isinstance(module, nn.Module)
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x).square().sum(), [x, *(p for p in module.parameters() if p.requires_grad)])


def autocast(module: Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(x).float()


def traced(module: Module, x: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, (x,)), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)(x)  # type: ignore[no-any-return]


def exported(module: Module, x: Tensor) -> Tensor:
    program = torch.export.export(module, (x,))  # type: ignore[arg-type]
    assert not [node for node in program.graph.nodes if "spu" in str(node.target)]
    return program.module()(x)  # type: ignore[no-any-return]


def other_parameters(module: Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Module)
    changed = {name: p.detach() * 2 for name, p in module.named_parameters()}
    return torch.func.functional_call(module, changed, (x,))  # type: ignore[no-any-return]


def many_parameters(module: Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Module)
    stacked = {name: torch.stack([p.detach(), p.detach() * 2]) for name, p in module.named_parameters()}
    return torch.vmap(lambda p: torch.func.functional_call(module, p, (x,)))(stacked)


RUNS: dict[str, Callable[[Module, Tensor], Any]] = {
    "gradients": gradients,
    "dual": dual,
    "vmap": lambda m, x: torch.vmap(m)(x),
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "hessian": lambda m, x: torch.func.hessian(lambda v: m(v).sum())(x),
    "jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "functional_call": other_parameters,
    "vmap of parameters": many_parameters,
    "autocast": autocast,
    "jit.trace": traced,
    "export": exported,
    "gradients of export": lambda m, x: gradients(torch.export.export(m, (x,)).module(), x),
    "fx": lambda m, x: torch.fx.symbolic_trace(m)(x),
    "checkpoint": lambda m, x: torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False),
    "inference": lambda m, x: torch.inference_mode()(m)(x).clone(),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_every_kind(name: str, kind: str) -> None:
    plain, ours = twins(name)
    if kind == "meta":
        plain, ours = plain.to("meta"), ours.to("meta")
    x = INPUTS[kind]()
    with torch.set_grad_enabled(kind != "mkldnn"):
        try:
            expected = plain(x)
        except (RuntimeError, NotImplementedError) as error:
            with pytest.raises(type(error)):
                ours(x)
            return
        y = ours(x)
    assert type(y) is type(expected)
    assert y.layout is expected.layout
    if kind == "meta":
        assert y.shape == expected.shape
    else:
        assert_same(y, expected)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("run", RUNS)
def test_transforms_and_recorders(name: str, run: str) -> None:
    plain, ours = twins(name)
    x = torch.randn(3, WIDTH)
    assert_same(RUNS[run](ours, x), RUNS[run](plain, x), 2e-2 if run == "autocast" else 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(MODULES)),
    kind=st.sampled_from(["rows", "batches", "strided", "no rows", "jagged"]),
    run=st.sampled_from(sorted(RUNS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    precision=st.sampled_from([None, "fp32", "bf16"]),
    wrapper=st.sampled_from(["none", "weight_norm", "prune", "hook", "frozen", "other backend"]),
)
def test_any_combination_equals_plain_torch_where_it_runs(
    name: str, kind: str, run: str, dtype: torch.dtype, precision: str | None, wrapper: str
) -> None:
    assume(precision is None or (kind, run) != ("jagged", "vmap"))  # functorch cannot convert a nested tensor
    plain, ours = twins(name, precision)
    for module in (plain, ours):
        wrap(module, wrapper)
    plain, ours, x = plain.to(dtype), ours.to(dtype), INPUTS[kind]().to(dtype)
    tolerance = 0.1 if torch.bfloat16 in (dtype,) or precision == "bf16" or run == "autocast" else 1e-4
    with use_backend("reference" if wrapper == "other backend" else None):
        try:
            expected = RUNS[run](plain, x)
        except Exception:  # ours may go further: a jagged input in autocast, the Hessian of no rows
            return
        ours_run = RUNS[run](ours, x)
    if tolerance < 0.1:
        assert_same(ours_run, expected, tolerance)
        return
    # In 16 bits a ReLU's input near zero may change its sign, and one element of a gradient by much: in the norm.
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (ours_run, expected)), strict=True):
        a, b = dense(a).double(), dense(b).double()
        assert a.shape == b.shape
        assert (a - b).norm() <= 0.6 * b.norm() + 0.1


def wrap(module: nn.Module, wrapper: str) -> None:
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    if wrapper == "frozen":
        for p in list(module.parameters())[1:]:
            p.requires_grad_(False)
    if not linears:
        return
    if wrapper == "weight_norm":
        parametrizations.weight_norm(linears[0])
    elif wrapper == "prune":
        prune.l1_unstructured(linears[0], "weight", amount=0.5)
    elif wrapper == "hook":
        linears[0].register_forward_hook(lambda module, args, y: y * 2)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", PARAMETRIZATIONS)
def test_parametrizations_before_and_after(name: str, first: bool) -> None:
    models = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
        if accelerated and not first:
            spu.accelerate(model)
        torch.manual_seed(1)
        PARAMETRIZATIONS[name](model[0])
        models.append(spu.accelerate(model) if accelerated else model)
    x = torch.randn(3, WIDTH)
    y, expected = models[1](x), models[0](x)
    assert_same(y, expected)
    for out in (expected, y):
        out.sum().backward()
    for a, b in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert_same(a.grad, b.grad)
    if parametrize.is_parametrized(models[1][0]):
        parametrize.remove_parametrizations(models[1][0], "weight")
        assert_same(models[1](x), expected)


def test_slices_and_sparse_weights() -> None:
    whole, x = torch.randn(20, 30, requires_grad=True), torch.randn(3, WIDTH)
    layer = spu.accelerate(nn.Linear(WIDTH, 4))
    del layer.weight
    layer.weight = whole[3:7, 2 : 2 + WIDTH]
    (grad,) = torch.autograd.grad(layer(x).sum(), whole)
    (expected,) = torch.autograd.grad(F.linear(x, whole[3:7, 2 : 2 + WIDTH]).sum(), whole)
    assert_same(grad, expected)
    plain, ours = twins("linear")
    for module in (plain, ours):
        module.weight = nn.Parameter(module.weight.detach().to_sparse_csr())
    assert_same(ours(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.float64, torch.complex128])
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_layers_of_other_dtypes(dtype: torch.dtype, precision: str | None) -> None:
    plain = nn.Linear(WIDTH, 4)
    for name, p in list(plain.named_parameters()):
        setattr(plain, name, nn.Parameter((p.detach() * 10).to(dtype), requires_grad=False))
    x = (torch.randn(3, WIDTH) * 10).to(dtype)
    ours = spu.accelerate(copy.deepcopy(plain), precision)
    assert_same(ours(x), plain(x), 0.5 if precision and dtype == torch.float64 else 1e-5)


def test_embeddings_and_norms_are_recorded_by_fx() -> None:
    plain = nn.Sequential(nn.Embedding(5, WIDTH, padding_idx=1), nn.LayerNorm((2, WIDTH)), nn.RMSNorm(WIDTH))
    ids = torch.tensor([[0, 1], [4, 2]])
    recorded = torch.fx.symbolic_trace(spu.accelerate(copy.deepcopy(plain)))
    assert_same(recorded(ids), plain(ids))


def test_no_features_in_or_out() -> None:
    plain = nn.Sequential(nn.Linear(0, 4), nn.GELU(), nn.Linear(4, 0))
    for rows in (3, 0):
        assert_same(spu.accelerate(copy.deepcopy(plain))(torch.ones(rows, 0)), plain(torch.ones(rows, 0)))


@pytest.mark.parametrize("precision", [None, "bf16"])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_scripts(precision: str | None, activation: str) -> None:
    """A scripted copy runs torch's own ops; the model itself stays accelerated."""
    plain, ours = twins("sequential", precision)
    x = torch.randn(3, WIDTH)
    assert_same(torch.jit.script(ours)(x), plain(x))
    assert type(ours[0]) is spu.nn.Linear
    own = spu.nn.Linear(WIDTH, 4, activation=activation)
    assert_same(torch.jit.script(own)(x), own(x))


@pytest.mark.leaks_threads  # the compiler's
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_and_scripted_modules() -> None:
    """Compiled whole as before; inside transforms torch's ops serve there too (a tangent was silently zero)."""
    plain, ours = twins("sequential")
    x = torch.randn(3, WIDTH)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), plain(x))
    inner = torch.compile(lambda v: torch.func.jvp(ours, (v,), (v,))[1], fullgraph=True, backend="aot_eager")
    assert_same(inner(x), torch.func.jvp(plain, (x,), (x,))[1])
    later = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    later(x)
    assert_same(spu.accelerate(later)(x), plain(x))
    scripted = nn.Sequential(torch.jit.script(plain), nn.Linear(WIDTH, 4), nn.ReLU())
    expected = scripted(x)
    assert_same(spu.accelerate(scripted)(x), expected)


def test_what_cannot_be_differentiated_is_refused() -> None:
    _, ours = twins("sequential")
    spu.accelerate(ours, precision="bf16")
    x = torch.randn(3, WIDTH, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"linear_act has no second derivative.*spu\.restore\(model\)"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    y = ours(x)
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="linear_act has no forward-mode derivative of its backward"):
            torch.autograd.grad(y, x, grad)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_quantised_weights(first: bool, precision: str | None) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    plain, ours = (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        if model is ours and not first:
            spu.accelerate(model, precision)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    spu.accelerate(ours, precision)
    x = torch.randn(3, 32)
    assert_same(ours(x), plain(x))
    empty = spu.accelerate(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 4)), precision)
    empty.load_state_dict(ours.state_dict(), assign=True)
    assert_same(empty(x), plain(x))
    assert_same(copy.deepcopy(ours)(x), plain(x))


@pytest.mark.parametrize("first", [True, False])
def test_lora(first: bool) -> None:
    peft = pytest.importorskip("peft")
    models = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 4))
        if accelerated and first:
            spu.accelerate(model)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
        models.append(spu.accelerate(model) if accelerated else model)
    x = torch.randn(3, WIDTH)
    for model in models:
        model(x).square().sum().backward()
    assert_same(models[1](x), models[0](x))
    for a, b in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if b.grad is not None:
            assert_same(a.grad, b.grad)
    expected = models[0](x)
    assert_same(models[1].merge_and_unload()(x), expected)
