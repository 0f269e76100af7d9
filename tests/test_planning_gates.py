"""What cannot be run on fake tensors is planned all the same, by real tensors or by a bound, and trained as it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spu
from spu import ModelParallelTrainer
from spu.cost.count import model_costs
from spu.engine.engine import StageError
from spu.model.layers import Layer
from spu.plan import Plan


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def batch():
    g = torch.Generator().manual_seed(1)
    return torch.randn(8, 8, generator=g), torch.arange(8) % 3


def model(middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), middle, nn.Linear(8, 3))


def routed(h):
    out = torch.zeros_like(h)
    for side in (h.sum(-1) > 0, h.sum(-1) <= 0):
        rows = side.nonzero().flatten()
        out = out.index_add(0, rows, h[rows] * 2)
    return out


LAYERS = {
    "item": lambda h: h * 2 if h.sum().item() > 0 else h,
    "any": lambda h: h / 2 if torch.isnan(h).any() else h * 3,
    "boolean indexing": lambda h: h * h[h > 0].sum(),
    "nonzero": routed,
    "numpy": lambda h: h + torch.from_numpy(h.detach().float().numpy().copy()).to(h.dtype),
    "validation": lambda h: torch.distributions.Normal(h, h.exp(), validate_args=True).log_prob(h.detach()) * h,
    "unique": lambda h: h * min(len(torch.unique(h.detach())), 2),
    "positive input": lambda h: h * 2 if bool((h > -10).all()) else 1 / 0,
}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_reads_values_is_measured_and_trained(name, precision):
    inputs, targets = batch()
    net = model(Calls(LAYERS[name]))
    plain = copy.deepcopy(net)
    with ModelParallelTrainer(net, ["cpu:0", "cpu:1"], precision=precision, microbatches=2) as trainer:
        loss, _ = trainer.forward_backward(inputs, targets)
        assert trainer.plan.uncounted == (("1", "measured"),)
        assert "1 (measured on real ones)" in trainer.plan.table()
        assert Plan.from_json(trainer.plan.to_json()) == trainer.plan
    expected = torch.stack([F.cross_entropy(plain(x), t) for x, t in zip(inputs.chunk(2), targets.chunk(2))]).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6 if precision == "fp32" else 2e-2, atol=0.0)


def readings(seen):
    def logged(outputs, targets):
        loss = F.cross_entropy(outputs.float(), targets)
        seen.append(loss.item())
        return loss

    return logged


LOSSES = {
    "indexing": lambda o, t: F.cross_entropy(o[t >= 0], t[t >= 0]),
    "log": readings([]),
    "check": lambda o, t: F.cross_entropy(o, t) if not torch.isnan(o).any() else 1 / 0,
    "numpy": lambda o, t: F.cross_entropy(o, torch.from_numpy(t.numpy().copy())),
}


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_reads_values_is_measured_and_trained(name, schedule):
    inputs, targets = batch()
    net = model(nn.Tanh())
    plain = copy.deepcopy(net)
    settings = {"precision": "fp32", "microbatches": 2, "schedule": schedule}
    with ModelParallelTrainer(net, ["cpu:0", "cpu:1"], loss_fn=LOSSES[name], **settings) as trainer:
        loss, _ = trainer.forward_backward(inputs, targets)
        assert trainer.plan.uncounted == (("loss", "measured"),)
    torch.testing.assert_close(loss, F.cross_entropy(plain(inputs), targets).detach(), rtol=1e-6, atol=0.0)


def test_what_was_logged_in_planning_is_not_in_the_log():
    seen, (inputs, targets) = [], batch()
    with ModelParallelTrainer(
        model(nn.Tanh()), ["cpu:0"], loss_fn=readings(seen), precision="fp32", microbatches=2
    ) as trainer:
        trainer.prepare(inputs, targets)
        assert not seen
        trainer.step(inputs, targets)
        assert len(seen) == 2


class Both(nn.Linear):
    def forward(self, h):
        return h, self.weight


def test_the_fused_loss_is_a_trainers_loss():
    inputs, targets = batch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), Both(8, 3, bias=False))
    plain = copy.deepcopy(net)
    expected = F.cross_entropy(F.linear(*plain(inputs)), targets)

    def loss_fn(outputs, wanted):
        return spu.ops.linear_cross_entropy(*outputs, wanted)

    for precision, rtol in (("fp32", 1e-6), ("fp16", 1e-2)):
        with ModelParallelTrainer(
            copy.deepcopy(net), ["cpu:0", "cpu:1"], loss_fn=loss_fn, precision=precision, microbatches=2
        ) as trainer:
            loss, _ = trainer.forward_backward(inputs, targets)
        torch.testing.assert_close(loss, expected.detach(), rtol=rtol, atol=0.0)


@pytest.mark.parametrize("draw", ["exponential_", "cauchy_", "geometric_", "log_normal_"])
def test_draws_whose_fake_form_takes_no_generator_are_counted(draw):
    def noisy(h):
        made = getattr(torch.empty_like(h), draw)(*([0.5] if draw == "geometric_" else []))
        return h * made.clamp(-1, 1)

    with ModelParallelTrainer(model(Calls(noisy)), ["cpu:0"], precision="fp32", microbatches=2) as trainer:
        assert math.isfinite(trainer.step(*batch()).loss)
        assert trainer.plan.uncounted == ()


def test_a_layer_that_fails_is_an_error_of_the_step_and_keeps_its_own_text():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(5, 3))
    with ModelParallelTrainer(net, ["cpu:0"], precision="fp32", microbatches=2) as trainer:
        assert trainer.prepare(*batch()).uncounted == (("1", "bound"),)
        assert "1 (a bound from its sizes)" in trainer.plan.table()
        with pytest.raises(StageError, match="shapes cannot be multiplied"):
            trainer.step(*batch())


def test_on_the_meta_device_a_layer_that_fails_is_an_error():
    layer = Calls(lambda h: h if h.sum().item() else -h)
    with pytest.raises(ValueError, match="'peek' could not be run on fake tensors"):
        model_costs([Layer("peek", layer)], torch.empty(2, 2, device="meta"), torch.float32)


def test_a_layer_that_is_too_large_to_be_run_is_bounded():
    layer = Calls(lambda h: h if h.sum().item() else -h)
    layer.weight = nn.Parameter(torch.empty(1).expand(1 << 20, 1 << 20), requires_grad=False)
    (cost,), _ = model_costs([Layer("large", layer)], torch.ones(2, 2), torch.float32)
    assert (cost.basis, cost.param_count, cost.input_bytes) == ("bound", 1 << 40, 16)


def test_layers_that_are_no_plain_modules_are_trained():
    inputs, targets = batch()
    makers = {
        "fx": torch.fx.symbolic_trace,
        "script": torch.jit.script,
        "compiled": lambda module: torch.compile(module, backend="eager"),
    }
    for name, make in makers.items():
        torch.manual_seed(0)
        first, last = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 3)
        plain = copy.deepcopy(nn.Sequential(first, last))
        for measure in (False, True):
            net = nn.Sequential(make(copy.deepcopy(first)), copy.deepcopy(last))
            with ModelParallelTrainer(
                net, ["cpu:0", "cpu:1"], precision="fp32", microbatches=2, measure=measure
            ) as trainer:
                loss, _ = trainer.forward_backward(inputs, targets)
            expected = F.cross_entropy(plain(inputs), targets).detach()
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0, msg=name)
        with ModelParallelTrainer(net, ["cpu:0", "cpu:1"], precision="fp16", microbatches=2) as trainer:
            loss, _ = trainer.forward_backward(inputs, targets)
            assert trainer.plan.uncounted == ((("0", "measured"),) if name == "script" else ())
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0.0, msg=name)


@pytest.mark.parametrize("given", [False, True])
def test_a_lazy_layer_is_refused_by_name(given):
    inputs, targets = batch()
    plan = None
    if given:
        with ModelParallelTrainer(nn.Sequential(nn.Linear(8, 3)), ["cpu:0"], microbatches=2) as trainer:
            plan = trainer.prepare(inputs, targets)
    with (
        ModelParallelTrainer(nn.Sequential(nn.LazyLinear(3)), ["cpu:0"], microbatches=2, plan=plan) as trainer,
        pytest.raises(ValueError, match="layer '0' has a parameter without a shape yet, 'weight' of a LazyLinear"),
    ):
        trainer.prepare(inputs, targets)


def test_planning_may_begin_under_inference_mode():
    inputs, targets = batch()
    with ModelParallelTrainer(model(nn.Tanh()), ["cpu:0"], precision="fp16", microbatches=2) as trainer:
        with torch.inference_mode():
            plan = trainer.prepare(inputs, targets)
        assert plan.uncounted == ()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_a_mixture_of_experts_is_planned_and_trained(family, precision, experts):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "head_dim": 8, "num_experts_per_tok": 2}
    sizes |= {"num_experts": 4, "moe_intermediate_size": 32} if family == "Qwen3Moe" else {"num_local_experts": 4}
    config = getattr(transformers, f"{family}Config")(**sizes, experts_implementation=experts)
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    ids, following = ids[:, :-1], ids[:, 1:]
    with torch.no_grad():
        expected = F.cross_entropy(net(ids).logits.flatten(0, 1), following.flatten())
    with ModelParallelTrainer(net, ["cpu:0", "cpu:1"], precision=precision, microbatches=2) as trainer:
        loss = trainer.step(ids, following).loss
        how = {how for _, how in trainer.plan.uncounted}
    ours = family != "GptOss" and precision != "fp32" and spu.ops.backends()["cpu"].available
    assert how == (set() if experts == "grouped_mm" or ours else {"measured"})
    assert loss == pytest.approx(expected.item(), rel=1e-5 if precision == "fp32" else 1e-2)
