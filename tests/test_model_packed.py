"""Documents packed in a row do not see each other in the split decoder: in every precision, also beside a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import BUILT, PLANNED, make_decoder

from spu.model.huggingface import decoder_layers

LENGTHS = (7, 1, 12, 4)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
# transformers makes their masks without a look at position_ids, or takes none
NEVER_APART = ("Bloom", "OPT")


def logits_of(parts: list[tuple[str, torch.nn.Module]], inputs: Any) -> torch.Tensor:
    x = inputs
    for _, part in parts:
        x = part(x, inputs)
    return x


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", [False, True], ids=["no mask", "all ones"])
def test_a_document_changes_nothing_of_another(family: str, dtype: torch.dtype, mask: bool) -> None:
    """Beside a mask of all ones, transformers lets them see each other."""
    model = make_decoder(family).to(dtype)
    parts = decoder_layers(model)
    ids = torch.randint(64, (2, sum(LENGTHS)))
    inputs = {"input_ids": ids, "position_ids": POSITIONS.expand(2, -1)}
    if mask:
        inputs["attention_mask"] = torch.ones_like(ids)
    other = {**inputs, "input_ids": ids.clone()}
    other["input_ids"][:, 8:20] = torch.randint(64, (2, 12))  # the third document
    kept = torch.cat((torch.arange(8), torch.arange(20, 24)))
    rows = []
    for given in (inputs, other):
        model.zero_grad()
        logits = logits_of(parts, given)[:, kept]
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, kept].flatten()).backward()
        rows.append([logits.detach(), *(p.grad for p in model.parameters())])
    embedding = model.get_input_embeddings().weight.grad  # -0 or 0 where the other document has a token
    assert embedding is not None
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    alone = logits_of(parts, ids[:, 8:20])
    error = (logits_of(parts, inputs)[:, 8:20] - alone).abs().max().item()
    # As by itself, but for products and sums of other sizes, which round elsewhere: a few roundings of logits below 1
    assert error <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("family", [*PLANNED, *BUILT])
def test_every_family_keeps_documents_apart_or_is_refused(family: str) -> None:
    model = make_decoder(family)
    parts = decoder_layers(model)
    ids = torch.randint(2, 64, (1, sum(LENGTHS)))
    inputs = {"input_ids": ids, "position_ids": POSITIONS[None]}
    if family in NEVER_APART:
        with pytest.raises((ValueError, TypeError), match="packed in a row see each other|position_ids"):
            logits_of(parts, inputs)
        return
    alone = logits_of(parts, ids[:, 8:20])
    assert torch.allclose(logits_of(parts, inputs)[:, 8:20], alone, rtol=0, atol=1e-5)


def test_a_mask_that_hides_something_of_packed_rows_is_refused() -> None:
    parts = decoder_layers(make_decoder("Llama"))
    ids = torch.randint(64, (1, 6))
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}
    packed["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="position_ids begin again.*leave attention_mask out"):
        logits_of(parts, packed)
    left = {"input_ids": ids, "position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]])}  # as transformers pads on the left
    left["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert torch.isfinite(logits_of(parts, left)[:, 2:]).all()
