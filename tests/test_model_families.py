"""Twenty steps of every family of decoders through a pipeline equal the plain model's, bit for bit, in fp32.

The batches have padding on either side, positions that skip it, and targets of -100; the plain model runs the same
microbatches whole, with torch's AdamW.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import BUILT, PLANNED, RECURRENT, VOCABULARY, make_decoder
from numeric import assert_equal
from pipelines import trainer

from spu.model.layers import Layer
from spu.plan.layer_cost import LayerCost
from spu.trainer import planner

pytestmark = pytest.mark.usefixtures("reference")
ROWS, TOKENS, STEPS = 4, 8, 20


@pytest.fixture(autouse=True)
def equal_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the layers' costs takes as long as the steps, and only decides where the cut is."""

    def count(layers: list[Layer], *_: Any, **__: Any) -> tuple[list[LayerCost], LayerCost]:
        sizes = [sum(p.numel() for p in layer.module.parameters()) for layer in layers]
        named = zip(layers, sizes, strict=True)
        costs = [
            LayerCost(name=y.name, param_count=n, trained_count=n, forward_flops=1, backward_flops=2) for y, n in named
        ]
        return costs, LayerCost(name="loss")

    monkeypatch.setattr(planner, "model_costs", count)


def make_batch(seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Ids, mask and positions of rows padded left, right, on both sides and not at all; shifted targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.randint(2, 10, (ROWS, 1), generator=generator) + torch.arange(TOKENS + 1)) % VOCABULARY
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    mask[2, 7:] = mask[2, :1] = 0
    targets = ids[:, 1:].masked_fill(mask == 0, -100)
    targets[3, :4] = -100
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids[:, :-1], "attention_mask": mask, "position_ids": positions}, targets


def plain_pass(model: Any, inputs: dict[str, torch.Tensor], targets: torch.Tensor, parts: int) -> torch.Tensor:
    """Forward and backward of every microbatch in turn by the whole model; the mean loss of the whole batch."""
    total, loss = (targets != -100).sum(), torch.zeros(())
    for part, expected in zip(range(parts), targets.tensor_split(parts), strict=True):
        given = {name: value.tensor_split(parts)[part] for name, value in inputs.items()}
        logits = model(**given, use_cache=False).logits
        mean = F.cross_entropy(logits.flatten(0, 1), expected.flatten())
        share = mean * ((expected != -100).sum().double() / total).float()
        share.backward()
        loss += share.detach()
    return loss


def assert_steps_equal(model: Any, parts: int, steps: int = STEPS, **settings: Any) -> None:
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, foreach=False)
    with trainer(model, microbatches=parts, lr=1e-2, **settings) as training:
        for step in range(steps):
            inputs, targets = make_batch(step)
            result = training.step(inputs, targets)
            optimizer.zero_grad()
            expected = plain_pass(plain, inputs, targets, parts)
            if step == 0:
                for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
                    assert_equal(ours.grad, theirs.grad, f"gradient of {name}")
            optimizer.step()
            assert result.loss == expected.item(), f"step {step}"
    assert result.loss < 4.0, "nothing was learnt"
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_equal(ours.detach(), theirs.detach(), name)


@pytest.mark.parametrize("family", PLANNED + BUILT)
def test_twenty_steps_equal_the_plain_models(family: str) -> None:
    parts = 2 if family in (*BUILT, "InternLM3", "Llama") else 1  # the others differ from Llama in their layers alone
    assert_steps_equal(make_decoder(family, num_hidden_layers=2, tie_word_embeddings=False), parts)


@pytest.mark.parametrize("family", RECURRENT)
def test_families_with_a_state_equal_the_plain_models(family: str) -> None:
    """Bamba's layers return two values, Falcon H1's head reads a factor of the base model, and Mamba 2's layers get no
    positions, which the whole model keeps to itself.
    """
    assert_steps_equal(make_decoder(family, num_hidden_layers=2, tie_word_embeddings=False), 2, steps=8)


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_tied_weights_of_one_microbatch_equal_the_plain_models(family: str) -> None:
    """With more of them a tied gradient is summed in another order: the plain model adds both uses in turn."""
    overrides = {"word_embed_proj_dim": 32} if family == "OPT" else {}
    model = make_decoder(family, num_hidden_layers=2, tie_word_embeddings=True, **overrides)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert_steps_equal(model, 1, steps=5)
