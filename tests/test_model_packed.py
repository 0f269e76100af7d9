"""Documents packed in a row do not see each other in the split decoder: in every precision, also beside a mask."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import BUILT, PLANNED, RECURRENT, make_decoder

from spu.model import hf_context, packed
from spu.model.hf_context import Context, same
from spu.model.huggingface import decoder_layers

LENGTHS = (7, 1, 12, 4)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
# transformers makes their masks without a look at position_ids, or takes none; a state goes on from one document to the
# next, in Falcon H1 beside an attention whose mask keeps them apart
NEVER_APART = ("Bloom", "OPT", "Mpt", "RecurrentGemma", *RECURRENT)


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


@pytest.mark.parametrize("family", [*PLANNED, *BUILT, *RECURRENT, "Mpt", "RecurrentGemma"])
def test_every_family_keeps_documents_apart_or_is_refused(family: str) -> None:
    model = make_decoder(family, num_hidden_layers=2)
    parts = decoder_layers(model)
    ids = torch.randint(2, 64, (1, sum(LENGTHS)))
    inputs = {"input_ids": ids, "position_ids": POSITIONS[None]}
    if family in NEVER_APART:
        with pytest.raises((ValueError, TypeError), match="packed in a row see each other|position_ids"):
            logits_of(parts, inputs)
        return
    alone = logits_of(parts, ids[:, 8:20])
    assert torch.allclose(logits_of(parts, inputs)[:, 8:20], alone, rtol=0, atol=1e-5)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no derivative")


def test_layers_without_a_derivative_are_not_taken_for_such_that_keep_documents_apart() -> None:
    model = make_decoder("FalconH1", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.mamba.out_proj.register_forward_hook(lambda _, args, out: _Doubled.apply(out))
    parts = decoder_layers(model)
    ids = torch.randint(2, 64, (1, sum(LENGTHS)))
    logits_of(parts, ids)
    with pytest.raises(ValueError, match="layer 0 of this model would let documents"):
        logits_of(parts, {"input_ids": ids, "position_ids": POSITIONS[None]})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_come_later_tell_nothing_of_documents(value: float, dtype: torch.dtype) -> None:
    """A derivative of weights without values yet is no number or 0, whatever the mask hides."""
    ids = torch.randint(2, 64, (1, sum(LENGTHS)))
    for family in ("Llama", "FalconH1"):
        model = make_decoder(family, num_hidden_layers=2).to(dtype)
        weights = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
        parts = decoder_layers(model)
        assert all(bool((p == value).all() or p.isnan().all()) for p in model.parameters())
        model.load_state_dict(weights)
        if family == "Llama":
            assert logits_of(parts, {"input_ids": ids, "position_ids": POSITIONS[None]}).isfinite().all()
            continue
        with pytest.raises(ValueError, match="layer 0 of this model would let documents"):
            logits_of(parts, {"input_ids": ids, "position_ids": POSITIONS[None]})


def test_masks_of_long_rows_are_looked_at_when_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof of the split has rows of six tokens, in which a longer row's mask need not be like it."""
    parts = decoder_layers(make_decoder("Llama"))
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(hf_context, "check_apart", lambda calls, place, mixing: seen.append(place))
    ids = torch.randint(2, 64, (2, sum(LENGTHS)))
    for _ in range(2):
        logits_of(parts, {"input_ids": ids, "position_ids": POSITIONS.expand(2, -1).clone()})
    assert seen == [(0, LENGTHS[0])]


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


def positions_of(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def context_of(family: str, **options: Any) -> Context:
    found: Context = decoder_layers(make_decoder(family, **options))[1][1]._context  # type: ignore[assignment]
    return found


OTHER_MASKS = ("Mistral", "Gemma2", "Gemma3Text", "Falcon")  # a window that is shorter than a row; of floats


@pytest.mark.parametrize("family", [family for family in (*PLANNED, *BUILT) if family not in NEVER_APART])
def test_layers_get_what_transformers_gives_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of a length are compared with transformers' own masks; of later ones these are not made, unless a
    document that fills a row would get another."""
    context, ours = context_of(family), []
    inner = hf_context.document_mask
    monkeypatch.setattr(hf_context, "document_mask", lambda *given: ours.append(1) or inner(*given))
    hidden = torch.zeros(2, 24, 32)
    for rows in (((5, 3, 8, 8), (1, 7, 8, 8)), ((23, 1), (12, 12)), ((24,), (4, 20))):
        ours.clear()
        inputs = {"input_ids": torch.zeros(2, 24, dtype=torch.long), "position_ids": positions_of(*rows)}
        calls = context.layer_calls(hidden, inputs)
        assert bool(ours) == (rows[0][0] == 5 or family not in OTHER_MASKS)
        assert same(calls, context.run(hidden, inputs)[1])


@pytest.mark.parametrize("family", [*PLANNED, *BUILT])
def test_layers_get_what_transformers_gives_them_for_padded_rows(family: str) -> None:
    context, hidden = context_of(family), torch.zeros(3, 24, 32)
    for lengths in ((5, 3, 8), (23, 24, 1), (24, 24, 24), (24, 0, 2), (24, 24, 24), (9, 9, 9)):
        mask = (torch.arange(24) < torch.tensor(lengths)[:, None]).long()
        for given in (mask, mask.flip(1), mask.roll(1, 1)):
            inputs = {"input_ids": torch.zeros(3, 24, dtype=torch.long), "attention_mask": given}
            assert same(context.layer_calls(hidden, inputs), context.run(hidden, inputs)[1])


def test_a_mask_that_hides_nothing_is_no_input_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    context, hidden = context_of("Llama"), torch.zeros(2, 24, 32)
    ids = torch.zeros(2, 24, dtype=torch.long)
    first = context.layer_calls(hidden, {"input_ids": ids, "attention_mask": torch.ones(2, 24)})
    monkeypatch.setattr(context, "run", lambda *_: pytest.fail("run again"))
    assert context.layer_calls(hidden, {"input_ids": ids, "attention_mask": torch.ones(2, 24)}) is first
    assert context.layer_calls(hidden, ids) is first


def test_a_base_model_that_takes_no_mask_of_ours_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of("Llama")
    monkeypatch.setattr(hf_context, "document_mask", lambda *_: torch.ones(3, 3, 3))
    inputs = {"input_ids": torch.zeros(1, 24, dtype=torch.long), "position_ids": POSITIONS[None]}
    for _ in range(2):
        calls = context.layer_calls(torch.zeros(1, 24, 32), inputs)
        assert same(calls, context.run(torch.zeros(1, 24, 32), inputs)[1])
        inputs = {key: value.clone() for key, value in inputs.items()}


def test_what_rows_hold_is_found_on_the_host_and_goes_with_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"input_ids": torch.zeros(1, 24), "position_ids": POSITIONS[None], "attention_mask": torch.ones(1, 24)}
    given["position_ids"] = given["position_ids"].clone()
    copies = {name: value.clone() for name, value in given.items()}
    packed.carry(given, copies)
    with monkeypatch.context() as changed:
        for known in (packed._lengths, packed._kept):
            changed.setattr(known, "_find", lambda _: pytest.fail("a card would be waited for"))
        assert packed.row_lengths(copies) == [list(LENGTHS)]
        assert packed.holds_several(copies) == (0, 7)
        assert set(packed.parting_documents(copies)) == {"input_ids", "position_ids"}
    copies["position_ids"][:, 7:] += 7  # changed in place: looked at anew
    assert packed.holds_several(copies) is None
    with torch.inference_mode():
        there = {name: value.clone() for name, value in given.items()}
        packed.carry(given, there)
        assert packed.holds_several(there) == (0, 7)
    packed.carry(torch.zeros(2), torch.zeros(2))
    packed.carry({"position_ids": 3}, {"position_ids": 3})
    packed.carry({"position_ids": torch.zeros(2)}, {"position_ids": torch.zeros(2)})
