"""A mixture of experts as one op: what a training takes is what was planned, whatever its router chooses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_probe import measured_peaks
from torch import nn

import spu
from spu import ModelParallelTrainer
from spu.engine.counted import counted_bytes
from spu.nn.experts import FusedExperts
from spu.ops.dispatch import status_of

pytestmark = pytest.mark.skipif(not status_of("cpu").available, reason="spu._C is not built")

WAYS: dict[str, dict[str, Any]] = {
    "resident": {},
    "recompute": {"recompute": True},
    "streamed": {"residency": "streamed", "recompute": True},
    "split backward": {"devices": ["cpu:0", "cpu:1"], "schedule": "zb"},
}


def decoder(kind: str, **changes: Any) -> nn.Module:
    """Two layers whose activations take more than their experts' weights."""
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_experts_per_tok": 2, "intermediate_size": 96, "tie_word_embeddings": False,
        "max_position_embeddings": 512,
    }  # fmt: skip
    if kind == "Mixtral":
        config["num_local_experts"] = 4
    else:
        config |= {"num_experts": 4, "moe_intermediate_size": 96}
    if kind == "Qwen2Moe":
        config["shared_expert_intermediate_size"] = 128
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}Config")(**config | changes)
    return transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)


def to_the_first(model: nn.Module) -> nn.Module:
    """Send every token to the first experts."""

    def chosen(_: nn.Module, __: Any, out: Any) -> Any:
        logits, scores, ids = out
        return logits, scores, torch.arange(ids.shape[-1]).expand_as(ids).clone()

    routers = [m for m in model.modules() if type(m).__name__.endswith("Router")]
    assert routers
    for router in routers:
        router.register_forward_hook(chosen)
    return model


def taken(model: nn.Module, folder: Path, **options: Any) -> list[tuple[int, int]]:
    """(taken, planned) bytes of each device in a training's second step."""
    ids = torch.arange(8 * 257).view(8, 257) * 7 % 64
    how: dict[str, Any] = {"devices": "cpu:0", "microbatches": 4, **options}
    if how.get("residency") == "streamed":
        how["tiers"] = f"disk={folder}:1GB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ModelParallelTrainer(model, how.pop("devices"), **how) as trainer:
            found = measured_peaks(trainer, (ids[:, :-1], ids[:, 1:]))
            assert trainer.plan is not None
            assert trainer.plan.uncounted == ()
            assert any(isinstance(module, FusedExperts) for module in model.modules())
            planned = dict(zip(trainer.plan.devices, trainer.plan.predicted.peak_bytes, strict=True))
    return [(found[name], planned[name]) for name in planned]


def assert_counted(found: list[tuple[int, int]], least: float = 0.95) -> None:
    for took, planned in found:
        assert least * planned <= took <= planned, f"{took} bytes, {planned} were planned: {took / planned:.4f}"


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("way", WAYS)
def test_what_a_mixture_takes_is_what_was_planned(precision: str, way: str, tmp_path: Path) -> None:
    model = decoder("Qwen3Moe")
    if precision == "fp32":  # the trainer leaves it plain
        spu.accelerate(model)
    assert_counted(taken(model, tmp_path, precision=precision, **WAYS[way]))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen2Moe", "Olmoe"])
@pytest.mark.parametrize("way", ["resident", "recompute", "streamed"])
def test_other_mixtures_with_shared_experts_too(kind: str, way: str, tmp_path: Path) -> None:
    assert_counted(taken(decoder(kind), tmp_path, precision="fp16", **WAYS[way]))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("way", ["resident", "recompute"])
def test_every_token_may_go_to_the_same_experts(kind: str, way: str, tmp_path: Path) -> None:
    assert_counted(taken(to_the_first(decoder(kind)), tmp_path, precision="bf16", **WAYS[way]))


@pytest.mark.parametrize("trained", ["router", "down projections", "attention"])
def test_frozen_parts_take_what_was_planned(trained: str, tmp_path: Path) -> None:
    model = decoder("Qwen3Moe")
    name = {"router": "gate.weight", "down projections": "down_proj", "attention": "self_attn"}[trained]
    for full, parameter in model.named_parameters():
        parameter.requires_grad_(name in full)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert_counted(taken(model, tmp_path, precision="fp16"))


def test_an_evaluation_takes_no_more_than_a_step_was_planned_to(tmp_path: Path) -> None:
    model, ids = to_the_first(decoder("Qwen3Moe")), torch.arange(8 * 257).view(8, 257) * 7 % 64
    with ModelParallelTrainer(model, "cpu:0", precision="fp16", microbatches=4) as trainer:
        trainer.step(ids[:, :-1], ids[:, 1:])
        assert trainer.plan is not None
        with counted_bytes(trainer._runner) as peaks:
            trainer.evaluate(ids[:, :-1], ids[:, 1:])
        assert 0 < peaks["cpu:0"] <= trainer.plan.predicted.peak_bytes[0]
