"""The experts of transformers' mixtures as one op: which, their results and gradients, and when torch's own serve."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_decoder
from numeric import assert_close_to_truth, assert_equal
from op_checks import nodes
from torch import Tensor, nn

import spu
from spu.nn.experts import FusedExperts, experts_block
from spu.nn.table import ExpertsBlock
from spu.ops import backends, use_backend

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="spu._C is not built")
IDS = torch.arange(38).view(2, 19) * 7 % 64
SIZES: dict[str, dict[str, Any]] = {
    "Qwen3Moe": {},
    "Mixtral": {},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Olmoe": {"num_experts": 4},
    "PhiMoE": {},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
}


def decoder(family: str = "Qwen3Moe", **options: Any) -> Any:
    sizes = {"num_hidden_layers": 2, "use_cache": False, "experts_implementation": "eager", "num_experts_per_tok": 2}
    return make_decoder(family, **sizes | SIZES.get(family, {}) | options)


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


def mixtures(loss: Tensor) -> int:
    """Return how many mixtures of a graph are one node."""
    return len(nodes(loss, "_ExpertsBackward"))


def loss_of(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss  # type: ignore[no-any-return]


def trained(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = loss_of(model)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral", "Qwen2Moe", "Olmoe"])
def test_experts_that_are_known(family: str) -> None:
    experts = experts_of(decoder(family))[0]
    plain = type(experts)
    assert experts_block(experts) == ExpertsBlock()
    assert type(spu.accelerate(experts)).__mro__[1] is FusedExperts
    assert type(pickle.loads(pickle.dumps(experts))) is type(experts)
    assert type(spu.restore(experts)) is plain


def test_experts_that_compute_something_else() -> None:
    assert experts_block(experts_of(decoder("GptOss"))[0]) is None  # biases, clamps, another layout
    experts = experts_of(decoder())[0]
    for name in ("has_bias", "is_transposed", "has_post_expert_norm"):
        other = copy.deepcopy(experts)
        setattr(other, name, True)
        assert experts_block(other) is None
    plain = type(experts)

    class Clamped(plain):  # type: ignore[misc, valid-type]
        __module__ = plain.__module__

        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            gate, up = gate_up.chunk(2, dim=-1)
            return self.act_fn(gate.clamp(max=7.0)) * up  # type: ignore[no-any-return]

    experts.__class__ = Clamped
    assert experts_block(experts) is None
    assert experts_block(nn.Linear(3, 3)) is None


def test_looking_at_experts_draws_no_random_numbers() -> None:
    model = decoder()
    before, values = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    assert experts_block(experts_of(model)[0])
    assert_equal(torch.get_rng_state(), before)
    for name, value in model.state_dict().items():
        assert_equal(value, values[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_a_model_has_gradients_as_close_to_the_truth_as_torchs(family: str, dtype: Any) -> None:
    torch.manual_seed(2)
    plain = decoder(family)
    plain.to(dtype)
    fused = spu.accelerate(copy.deepcopy(plain))
    others = spu.accelerate(copy.deepcopy(plain))
    for module in experts_of(others):
        module.act_fn.register_forward_hook(lambda *_: None)  # somebody looks
    assert mixtures(loss_of(fused)) == 2
    assert mixtures(loss_of(others)) == 0
    loss, grads = trained(fused)
    expected, expected_grads = trained(others)
    assert loss == pytest.approx(expected.item(), rel=4 * torch.finfo(dtype).eps)
    truth = trained(copy.deepcopy(plain).double())[1]
    for name, grad in grads.items():
        if "experts" in name or "gate.weight" in name:
            size = float(truth[name].abs().max())
            assert_close_to_truth(
                grad, expected_grads[name], truth[name], eps=4 * torch.finfo(dtype).eps * size, name=name
            )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_experts_with_fp32_parameters_are_computed_in_the_precision_asked_for(precision: str) -> None:
    plain = experts_of(decoder())[0]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2)
    fused = spu.accelerate(copy.deepcopy(plain), precision)
    x, scores = torch.randn(9, 32), torch.rand(9, 2)
    ids = torch.rand(9, 4).topk(2).indices
    with torch.no_grad():
        y, expected = fused(x, ids, scores), plain(x, ids, scores)
        with torch.autocast("cpu", dtype=torch.bfloat16 if precision == "bf16" else torch.float16):
            cast = spu.accelerate(copy.deepcopy(plain))(x, ids, scores)
    assert_equal(cast, y)
    assert y.dtype == torch.float32
    assert 0 < (y - expected).abs().max() < 0.05 * expected.abs().max()


def hooked(experts: Any) -> None:
    experts.act_fn.register_forward_hook(lambda *_: None)


def relu(experts: Any) -> None:
    experts.act_fn = nn.ReLU()


def chosen(experts: Any) -> None:
    experts.config._experts_implementation = "mine"


def parallel(experts: Any) -> None:
    experts._is_expert_parallel = True


@pytest.mark.parametrize("change", [hooked, relu, chosen, parallel], ids=lambda f: f.__name__)
def test_torchs_own_serve_where_the_op_does_not(change: Callable[[Any], None]) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    plain = experts_of(decoder())[0].half()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(std=0.2)
    fused = spu.accelerate(copy.deepcopy(plain))
    plain.config, fused.config = copy.copy(plain.config), copy.copy(plain.config)
    ALL_EXPERTS_FUNCTIONS["mine"] = lambda self, x, ids, scores: x * 2
    x, scores = torch.randn(9, 32).half(), torch.rand(9, 2).half().requires_grad_()
    ids = torch.rand(9, 4).topk(2).indices
    assert mixtures(fused(x, ids, scores)) == 1
    try:
        for module in (plain, fused):
            change(module)
        y = fused(x, ids, scores)
        assert mixtures(y) == 0
        assert_equal(y, plain(x, ids, scores))
    finally:
        del ALL_EXPERTS_FUNCTIONS["mine"]


def test_the_reference_backend_leaves_them_to_torch() -> None:
    model = spu.accelerate(decoder())
    with use_backend("reference"):
        assert mixtures(loss_of(model)) == 0
    assert mixtures(loss_of(model)) == 2


def test_frozen_experts_and_a_router_that_alone_is_trained() -> None:
    model = spu.accelerate(decoder().bfloat16())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate." in name)
    _, grads = trained(model)
    assert mixtures(loss_of(model)) == 2
    for name, grad in grads.items():
        assert (grad is not None) == ("mlp.gate." in name)
        assert grad is None or grad.abs().max() > 0


def test_adapters_on_experts_train_as_in_plain_torch() -> None:
    peft = pytest.importorskip("peft")
    results = []
    for fused in (True, False):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
        model = peft.get_peft_model(decoder(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
        if fused:
            spu.accelerate(model)
        loss, grads = trained(model)
        results.append((loss, {name: grad for name, grad in grads.items() if grad is not None}))
    (loss, grads), (expected, expected_grads) = results
    torch.testing.assert_close(loss, expected)
    assert grads.keys() == expected_grads.keys()
    assert any("lora_A" in name for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_trainer_plans_them_by_counting_and_gives_them_back(precision: str, recompute: bool) -> None:
    model = decoder()
    plain = [type(module) for module in experts_of(model)]
    with torch.no_grad():
        expected = loss_of(model).item()
    options: dict[str, Any] = {"precision": precision, "microbatches": 2, "recompute": recompute}
    with spu.ModelParallelTrainer(model, "cpu:0", **options) as trainer:
        result = trainer.step(IDS[:, :-1], IDS[:, 1:])
        assert trainer.plan.uncounted == ()
        found = experts_of(model)
        assert all(isinstance(module, FusedExperts) for module in found)
        assert result.loss == pytest.approx(expected, rel=0.02)
        again = trainer.step(IDS[:, :-1], IDS[:, 1:])
        assert again.loss < result.loss
    spu.restore(model)
    assert [type(module) for module in experts_of(model)] == plain


def losses_and_weights(**options: Any) -> tuple[list[float], list[Tensor]]:
    model = decoder(num_hidden_layers=3)
    ids = torch.arange(4 * 38).view(8, 19) * 7 % 64
    how: dict[str, Any] = {"devices": "cpu:0", "precision": "fp16", "microbatches": 2, "lr": 1e-2} | options
    with spu.ModelParallelTrainer(model, how.pop("devices"), **how) as trainer:
        losses = [float(trainer.step(ids[:, :-1], ids[:, 1:]).loss) for _ in range(3)]
        assert all(isinstance(module, FusedExperts) for module in experts_of(model))
    return losses, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("how", ["recompute", "two stages", "split backward", "streamed"])
def test_every_way_to_train_has_the_same_bits(how: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "recompute": {"recompute": True},
        "two stages": {"devices": ["cpu:0", "cpu:1"]},
        "split backward": {"devices": ["cpu:0", "cpu:1"], "schedule": "zb"},
        "streamed": {"residency": "streamed", "tiers": f"disk={tmp_path}:1GB", "recompute": True},
    }[how]
    losses, weights = losses_and_weights(**options)
    expected, expected_weights = losses_and_weights()
    assert losses == expected
    for mine, other in zip(weights, expected_weights, strict=True):
        assert_equal(mine, other)
