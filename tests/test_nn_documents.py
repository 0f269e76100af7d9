"""Attention of rows with several documents, or with padding: what a mask makes of them, without the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from spu.nn import attention, documents
from spu.nn.documents import document_lengths, document_mask

transformers = pytest.importorskip("transformers")

LENGTHS = [[5, 1, 90, 64, 96], [256], [128, 127, 1], [200], [255], [1]]  # in three rows padding follows
TOKENS, SIZE = 256, 128  # large enough for calls of their own


def mask_of(lengths: list[list[int]], tokens: int = TOKENS) -> Tensor:
    rows = []
    for own in lengths:
        row = torch.block_diag(*(torch.ones(n, n).tril() for n in own))
        padding = tokens - sum(own)
        rows.append(torch.nn.functional.pad(row, (0, padding, 0, padding)))
        rows[-1][sum(own) :, : sum(own)] = 1
    return torch.stack(rows)[:, None].bool()


def module(groups: int) -> nn.Module:
    made = nn.Module()
    made.num_key_value_groups, made.is_causal = groups, True  # type: ignore[assignment]
    return made


def test_lengths_are_read_from_the_mask_and_once() -> None:
    mask = mask_of(LENGTHS)
    found = document_lengths(mask, SIZE)
    assert found == LENGTHS
    assert document_lengths(mask, SIZE) is found
    mask[1, 0, 100:, :100] = False  # in place
    assert document_lengths(mask, SIZE) == [LENGTHS[0], [100, 156], *LENGTHS[2:]]


def test_a_mask_that_is_made_of_lengths_is_known_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = document_mask(LENGTHS, TOKENS, torch.device("cpu"))
    assert torch.equal(mask, mask_of(LENGTHS))
    with monkeypatch.context() as changed:
        changed.setattr(documents._lengths, "_find", lambda _: pytest.fail("looked at"))
        assert document_lengths(mask, SIZE) == LENGTHS
    mask[0, 0, 7, 6] = False
    assert document_lengths(mask, SIZE) is None


def others() -> dict[str, Tensor]:
    whole = mask_of([[100, 156]])
    window = whole.clone()
    window[0, 0] &= torch.ones(TOKENS, TOKENS).tril().bool() & ~torch.ones(TOKENS, TOKENS).tril(-8).bool()
    left, seen, later = whole.clone(), whole.clone(), whole.clone()
    left[..., :10] = False  # padding on the left: queries that see nothing
    padded = mask_of([[200]])
    padded[..., 230, 229] = True  # padding that sees padding
    inside = whole.clone()
    inside[..., 50] = False  # padding inside a document
    seen[0, 0, 200, 30] = True  # of another document
    later[0, 0, 20, 21] = True
    ahead = torch.ones(TOKENS, TOKENS).triu(1).bool()[None, None]
    gap = whole.clone()
    gap[0, 0, 90, 50] = False
    return {
        "a window": window,
        "padding": left,
        "padding that is seen": padded,
        "padding inside": inside,
        "padding behind several documents": mask_of([[100, 100]]),
        "padding alone": torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool),
        "a key of another document": seen,
        "a later key": later,
        "later keys alone": ahead,
        "a key that is hidden": gap,
        "not bool": whole.float(),
        "of heads": whole.expand(1, 4, TOKENS, TOKENS),
        "more keys than queries": whole[:, :, 1:],
        "documents too short for a call each": mask_of([[2] * 128]),
        "rows too short": mask_of([[8, 8]], 16),
    }


@pytest.mark.parametrize("name", others())
def test_other_masks_are_left_to_torch(name: str) -> None:
    assert document_lengths(others()[name], SIZE) is None


def without_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where an attention is called with a mask."""
    from transformers.integrations import sdpa_attention

    inner = sdpa_attention.sdpa_attention_forward

    def unmasked(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **named: Any) -> Any:
        return inner(module, q, k, v, mask, **named) if mask is None else pytest.fail("by the mask")

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", unmasked)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("groups", [1, 2])
def test_documents_by_themselves_are_what_their_mask_makes(
    dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, mask = 4, mask_of(LENGTHS)
    shapes = [(len(LENGTHS), heads, TOKENS, 32), *[(len(LENGTHS), heads // groups, TOKENS, 32)] * 2]
    given = [torch.randn(shape).to(dtype) for shape in shapes]
    dy = torch.randn(len(LENGTHS), TOKENS, heads, 32).to(dtype)

    def run(function: Any, wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in given]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, dy.to(wide))]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.sdpa_attention(module(groups), q, k, v, mask, scaling=0.3, dropout=0.0)[0]

    without_masks(monkeypatch)
    for mine, plain, truth in zip(run(ours, dtype), run(torchs, dtype), run(torchs, torch.float64), strict=True):
        assert_close_to_truth(mine, plain, truth)


def test_dropout_and_what_is_unknown_go_by_the_mask() -> None:
    mask, q = mask_of([[100, 156]]), torch.randn(1, 4, TOKENS, 32).half()
    assert attention._apart(module(1), q, q, q, mask, {"dropout": 0.1}) is None
    assert attention._apart(module(1), q[:, :, -1:], q, q, mask, {}) is None
    plain = module(1)
    plain.is_causal = False
    assert attention._apart(plain, q, q, q, mask, {}) is None
    with torch.inference_mode():
        assert document_lengths(mask_of([[100, 156]]), SIZE) is None
    assert document_lengths(mask.to("meta"), SIZE) is None
    with FakeTensorMode():
        assert document_lengths(torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool), SIZE) is None
    assert document_lengths(torch.ones(0, 1, TOKENS, TOKENS, dtype=torch.bool), SIZE) is None


def llama(dtype: torch.dtype) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_models_packed_rows_are_its_documents(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes one mask for all layers, which fp32 copies of took 64 MB a layer at 4,096 tokens."""
    model = llama(dtype)
    attention.use_attention(model)
    ids = torch.randint(64, (1, TOKENS))
    lengths = [100, 156]
    places = torch.cat([torch.arange(n) for n in lengths])[None]
    without_masks(monkeypatch)
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
    assert_equal(packed, torch.cat(alone, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_models_padded_rows_are_its_documents(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(dtype)
    ids, seen = torch.randint(64, (2, TOKENS)), torch.ones(2, TOKENS, dtype=torch.long)
    seen[0, 200:] = 0
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
        truth = model.double()(input_ids=ids, attention_mask=seen, use_cache=False).logits
        model.to(dtype)
        attention.use_attention(model)
        without_masks(monkeypatch)
        ours = model(input_ids=ids, attention_mask=seen, use_cache=False).logits
    assert_close_to_truth(ours, plain, truth)
