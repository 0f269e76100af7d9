"""The pages of a process whose plan fills its budget: what was planned, and little more."""

from __future__ import annotations

import sys

import pytest

from spu.ops.dispatch import status_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does"),
    pytest.mark.skipif(not status_of("cpu").available, reason="spu._C is not built"),
]

FILLED = """
import dataclasses, sys, torch, transformers, spu
from spu.common.heap import give_back

def held():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) * 1024

def decoder(width, layers):
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=256, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4,
        head_dim=width // 4, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=width, intermediate_size=width,
        tie_word_embeddings=False, max_position_embeddings=256)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)

def train(model, steps, budget):
    ids = torch.randint(256, (8, 257))
    device = spu.DeviceManager().get_devices("cpu:0")[0]
    device = dataclasses.replace(device, budget_bytes=budget or device.budget_bytes)
    with spu.ModelParallelTrainer(model, [device], precision="fp16", microbatches=4) as trainer:
        planned = sum(trainer.prepare(ids[:, :-1], ids[:, 1:]).predicted.peak_bytes)
        for _ in range(steps):
            trainer.step(ids[:, :-1], ids[:, 1:])
    return planned

train(decoder(256, 1), 2, None)  # libraries, and the room of products of these sizes
give_back()
before = held()
model = decoder(256, 6)
print(before, train(model, 4, int(sys.argv[1])))
"""


def test_a_mixture_that_fills_its_budget_takes_what_was_planned() -> None:
    """It took 30 MB more: the heap kept what lay between activations, and what had been freed before the first step."""
    from hard_limit import run_limited  # which other systems cannot import

    pytest.importorskip("transformers")
    budget = 250 * 10**6
    run = run_limited(FILLED, arguments=[str(budget)])
    assert run.code == 0, run.errors
    before, planned = map(int, run.output.split()[-2:])
    assert 0.9 * budget < planned <= budget
    beside = run.peaks["RssAnon"] - before - planned
    assert -0.02 * planned < beside < 18 * 10**6  # 10: libraries' own objects, rooms of products
