"""embedding: torch's values; gradients straight into the rows of the main gradient, in one order."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from backend_params import every_backend
from numeric import assert_equal
from torch import Tensor, nn

import spu
from spu import ops
from spu.ops import schema
from spu.precision import LossScaler, MainGrads

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def scattered(dy: Tensor, ids: Tensor, entries: int, padding_idx: int = -1) -> Tensor:
    """The sum, in fp32 and in the tokens' order, by a loop."""
    out = torch.zeros(entries, dy.shape[-1])
    for row, i in zip(dy.reshape(-1, dy.shape[-1]).float(), ids.reshape(-1).tolist()):
        if i != padding_idx:
            out[i] += row
    return out


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 24, 70])
def test_rows_are_added_in_the_tokens_order(backend: str, dtype: torch.dtype, width: int) -> None:
    ids = torch.randint(0, 11, (3, 50)) * 2 % 13
    dy = torch.randn(3, 50, width).to(dtype)
    main, found, inv = torch.full((13, width), float("nan")), torch.zeros(1), torch.tensor([0.25])
    op = schema.overload("embedding_dw_", backend)
    op(dy, ids, -1, main, inv, found, False)
    assert_equal(main, scattered(dy, ids, 13) * 0.25, "stored")
    op(dy, ids, 4, main, inv, found, True)
    expected = scattered(dy, ids, 13) * 0.25
    assert_equal(main, expected + scattered(dy, ids, 13, 4) * 0.25, "added, without entry 4")
    assert found.item() == 0


@every_backend
def test_no_tokens_and_one_entry_for_all(backend: str) -> None:
    op = schema.overload("embedding_dw_", backend)
    main, found, one = torch.ones(4, 6), torch.zeros(1), torch.ones(1)
    op(torch.empty(0, 6), torch.empty(0, dtype=torch.int64), -1, main, one, found, True)
    assert_equal(main, torch.ones(4, 6))
    op(torch.empty(0, 6), torch.empty(0, dtype=torch.int64), -1, main, one, found, False)
    assert_equal(main, torch.zeros(4, 6))
    dy = torch.randn(300, 6)
    op(dy.t().contiguous().t(), torch.full((300,), 3), -1, main, one, found, True)
    assert_equal(main, scattered(dy, torch.full((300,), 3), 4))


@every_backend
def test_what_is_not_finite_raises_found_inf_but_for_padding(backend: str) -> None:
    dy = torch.ones(5, 20).half()
    dy[2, 19] = float("inf")
    ids = torch.tensor([0, 1, 2, 1, 0])
    op = schema.overload("embedding_dw_", backend)
    for padding_idx, expected in ((2, 0), (-1, 1)):
        main, found = torch.zeros(3, 20), torch.zeros(1)
        op(dy, ids, padding_idx, main, torch.ones(1), found, True)
        assert found.item() == expected
        assert main[1].eq(2).all()


@every_backend
def test_a_sink_takes_the_gradient_of_several_microbatches_and_of_a_tied_head(backend: str) -> None:
    weight = nn.Parameter(torch.randn(9, 8).half())
    ids = torch.randint(0, 9, (2, 3, 7))
    scaler, seen = LossScaler(init_scale=256.0), []
    with ops.use_backend(backend), MainGrads([weight]) as main:
        for _ in range(2):  # the second step reuses the first one's memory
            main.begin_step()
            for part in ids:
                hidden = ops.embedding(part, weight, padding_idx=2)
                scaler.scale(ops.linear_act(hidden, weight).float().pow(2).mean()).backward()
            seen.append(weight.grad.clone())
    assert weight.grad.dtype == torch.float32
    assert_equal(seen[0], seen[1])
    truth = weight.detach().double().requires_grad_()
    for part in ids:
        F.linear(F.embedding(part, truth, padding_idx=2), truth).pow(2).mean().backward()
    torch.testing.assert_close(seen[0].double(), truth.grad, rtol=5e-3, atol=5e-4)
    assert scaler.found_inf().item() == 0


def test_two_thousand_uses_of_one_entry_are_summed_in_fp32() -> None:
    weight = nn.Parameter(torch.ones(3, 4).half())
    scaler = LossScaler(init_scale=1.0)
    with MainGrads([weight]) as main:
        main.begin_step()
        scaler.scale(ops.embedding(torch.ones(5000, dtype=torch.int64), weight).float().sum()).backward()
    assert weight.grad[1].eq(5000).all()
    assert weight.grad[[0, 2]].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_scope_it_is_torchs(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5).to(dtype).requires_grad_()
    ids, dy = torch.randint(0, 7, (4, 6), dtype=torch.int32), torch.randn(4, 6, 5).to(dtype)
    y = ops.embedding(ids, weight, -3)
    (ours,) = torch.autograd.grad(y, weight, dy)
    (theirs,) = torch.autograd.grad(F.embedding(ids, weight, -3), weight, dy)
    assert_equal(y, F.embedding(ids, weight))
    assert_equal(ours, theirs)


def test_bad_input_is_refused() -> None:
    weight = nn.Parameter(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"padding_idx 4 is not in \[-4, 4\)"):
        ops.embedding(torch.zeros(2, dtype=torch.int64), weight, 4)
    with pytest.raises(IndexError):
        ops.embedding(torch.tensor([5]), weight)
    y = ops.embedding(torch.tensor([1]), weight)
    if ops.choose_backend(weight) != "reference":
        with pytest.raises(RuntimeError, match="embedding has no second derivative"):
            torch.autograd.grad(y.sum(), weight, create_graph=True)


@pytest.mark.skipif(not ops.backends()["cpu"].available, reason="spu._C is not built")
def test_the_cpu_kernel_reads_and_writes_nothing_outside() -> None:
    op, one = torch.ops.spu.embedding_dw_.cpu, torch.ones(1)
    with pytest.raises(ValueError, match=r"ids has 4, which is not in \[0, 4\)"):
        op(torch.ones(2, 3), torch.tensor([0, 4]), -1, torch.zeros(4, 3), one, torch.zeros(1), True)
    with pytest.raises(ValueError, match="does not fit ids"):
        op(torch.ones(2, 3), torch.tensor([0, 1, 2]), -1, torch.zeros(4, 3), one, torch.zeros(1), True)
    with pytest.raises(ValueError, match="main_grad must be contiguous"):
        op(torch.ones(2, 3), torch.tensor([0, 1]), -1, torch.zeros(3, 4).t(), one, torch.zeros(1), True)


class _Positions(nn.Module):
    """What many decoders of one's own do with an embedding's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(13, 8), nn.Embedding(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x *= 8**0.5
        x += self.places(torch.arange(ids.shape[-1]) if ids.dim() else ids.clamp(max=3))
        return x


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (0, 4)])
def test_rows_may_be_changed_in_place(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The rows of ids of two dimensions were a view made in a custom function, which autograd refuses to change."""
    torch.manual_seed(0)
    plain = _Positions().to(dtype)
    model = spu.accelerate(copy.deepcopy(plain))
    ids, weights = torch.randint(0, 13, shape), torch.randn(*shape, 8).to(dtype)
    with spu.use_backend(backend):
        for module in (plain, model):
            (module(ids) * weights).sum().backward()
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=2e-2, atol=1e-2, msg=name)


def test_a_trainer_in_16_bits_changes_rows_in_place() -> None:
    """fp16 is the default, so that such a model did not train."""
    torch.manual_seed(0)
    model = nn.Sequential(_Positions(), nn.Linear(8, 5))
    with spu.ModelParallelTrainer(model, ["cpu:0"], microbatches=2, precision="fp16") as trainer:
        first, *_, last = [
            trainer.step(torch.arange(12).view(3, 4) % 7, torch.arange(12).view(3, 4) % 5).loss for _ in range(30)
        ]
    assert last < first
