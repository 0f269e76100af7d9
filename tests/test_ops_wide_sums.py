"""Gradients that torch's CPU kernels add up in 16 bits are summed in fp32, whatever op they come from.

A sum of ones in 16 bits stops at 256 (bf16) or 2048 (fp16), so thousands of rows show it. The bound is the error of
torch's own fp32 sum over the same 16-bit operands; ops that add in place round the sum once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_close_to_truth, assert_equal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import spu
from spu import LossScaler, MainGrads, ModelParallelTrainer
from spu.common.tensor_table import TensorTable
from spu.ops import sink
from spu.precision import GradScaler

ROWS = 6_000
IDS = torch.zeros(ROWS, dtype=torch.int64)
IDS[::4] = torch.arange(ROWS // 4) % 4
POINTS = (torch.rand(1, 60, ROWS // 60, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1).bfloat16()
HALVES = [torch.bfloat16, torch.float16]


def parameter(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) + 0.5


def bags(w: Tensor, **options: object) -> Tensor:
    return F.embedding_bag(IDS.view(-1, 4), w, **options)


# name -> (parameters, function of (x [ROWS, 4], parameters), roundings to 16 bits of the sum). layer_norm's statistics
# are rounded, and found again to a hundredth of that.
Case = tuple[list[Tensor], Callable[..., Tensor], float]
CASES: dict[str, Case] = {
    "layer_norm": ([parameter(4), parameter(4)], lambda x, w, b: F.layer_norm(x, (4,), w, b), 0.01),
    "layer_norm of 2 dimensions": (
        [parameter(2, 2), parameter(2, 2)],
        lambda x, w, b: F.layer_norm(x.view(-1, 3, 2, 2), (2, 2), w, b),
        0.01,
    ),
    "layer_norm without bias": ([parameter(4)], lambda x, w: F.layer_norm(x, (4,), w), 0.01),
    "embedding": ([parameter(4, 4)], lambda x, w: F.embedding(IDS, w), 0),
    "embedding, padding_idx": ([parameter(4, 4)], lambda x, w: F.embedding(IDS, w, padding_idx=1), 0),
    "embedding, scale_grad_by_freq": ([parameter(4, 4)], lambda x, w: F.embedding(IDS, w, scale_grad_by_freq=True), 0),
    "embedding of a product": ([parameter(4, 4)], lambda x, w: F.embedding(IDS, w * 2), 1),
    "embedding_bag, sum": ([parameter(4, 4)], lambda x, w: bags(w, mode="sum"), 0),
    "embedding_bag, mean": ([parameter(4, 4)], lambda x, w: bags(w, mode="mean"), 0),
    "embedding_bag, max": ([parameter(4, 4)], lambda x, w: bags(w, mode="max"), 0),
    "embedding_bag, padding_idx": ([parameter(4, 4)], lambda x, w: bags(w, mode="sum", padding_idx=2), 0),
    "embedding_bag, weights": (
        [parameter(4, 4), parameter(ROWS // 4, 4)],
        lambda x, w, s: bags(w, mode="sum", per_sample_weights=s),
        1,
    ),
    "w[ids]": ([parameter(4, 4)], lambda x, w: w[IDS], 1),
    "w[ids] of a vector": ([parameter(4)], lambda x, w: w[IDS], 1),
    "w[:, ids]": ([parameter(4, 4)], lambda x, w: w[:, IDS], 1),
    "w[ids, ids]": ([parameter(4, 4)], lambda x, w: w[IDS, IDS], 1),
    "take": ([parameter(4)], lambda x, w: w.take(IDS), 1),
    "index_select": ([parameter(4, 4)], lambda x, w: w.index_select(0, IDS), 1),
    "index_select of a vector": ([parameter(4)], lambda x, w: w.index_select(0, IDS), 1),
    "index_select in the middle": ([parameter(4, 4, 2)], lambda x, w: w.index_select(1, IDS), 1),
    "gather": ([parameter(4, 4)], lambda x, w: w.gather(0, IDS[:, None].expand(-1, 4)), 1),
    "conv1d": ([parameter(4, 1, 2), parameter(4)], lambda x, w, b: F.conv1d(x.view(ROWS, 1, 4), w, b), 1),
    "conv2d, dilated": (
        [parameter(2, 1, 2, 1), parameter(2)],
        lambda x, w, b: F.conv2d(x.view(-1, 1, 4, 1), w, b, dilation=2),
        1,
    ),
    "conv_transpose1d": (
        [parameter(1, 2, 1), parameter(2)],
        lambda x, w, b: F.conv_transpose1d(x.view(ROWS, 1, 4), w, b),
        1,
    ),
    "grid_sample": ([parameter(1, 2, 3, 3)], lambda x, w: F.grid_sample(w, POINTS.to(w.dtype), align_corners=False), 0),
    "replication pad": ([parameter(1, 2, 3)], lambda x, w: F.pad(w, (9000, 9000), mode="replicate"), 0),
    "replication pad of an image": (
        [parameter(1, 2, 3, 3)],
        lambda x, w: F.pad(w, (90, 90, 90, 90), mode="replicate"),
        0,
    ),
    "adaptive_avg_pool2d that enlarges": ([parameter(1, 2, 3, 3)], lambda x, w: F.adaptive_avg_pool2d(w, (90, 120)), 0),
    "interpolate by area": ([parameter(1, 2, 3, 3)], lambda x, w: F.interpolate(w, (90, 120), mode="area"), 0),
    "avg_pool1d": ([parameter(1, 2, 2000)], lambda x, w: F.avg_pool1d(w, 1500, 1), 1),
    "max_pool2d": ([parameter(1, 2, 60, 60)], lambda x, w: F.max_pool2d(w, 30, 1), 0),
    "Tensor.unfold": ([parameter(9000)], lambda x, w: w.unfold(0, 6000, 2), 0),
    "F.unfold": ([parameter(1, 1, 60, 60)], lambda x, w: F.unfold(w, 30), 0),
    "batch_norm": ([parameter(4), parameter(4)], lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), 0),
    "a product, 1,000 times": ([parameter(4)], lambda x, w: torch.cat([w * part for part in x.split(12)]), 1),
    "a stack": ([parameter(4)], lambda x, w: torch.stack([w] * 3000), 0),
    "a sum with a bias": ([parameter(4)], lambda x, b: x + b, 1),
    "expand": ([parameter(4)], lambda x, w: w.expand(ROWS, 4), 1),
}


def gradients(case: Case, dtype: torch.dtype, rounding: torch.dtype, scaled: bool = False) -> list[Tensor]:
    """The gradients of a case's parameters in ``dtype``, from operands and a gradient of the output in ``rounding``."""
    parameters, function, _ = case
    leaves = [nn.Parameter(p.to(rounding).to(dtype)) for p in parameters]
    main_grads = MainGrads(leaves if dtype == rounding else [])
    main_grads.begin_step()
    # Far from 0, where rounded statistics of rows have an error in common.
    x = (torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2)) + 3).to(rounding).to(dtype)
    y = function(x, *leaves)
    dy = (torch.rand(y.shape, generator=torch.Generator().manual_seed(3)) + 0.5).mul(0.1).to(rounding).to(dtype)
    if scaled:
        LossScaler(4.0).scale(y).backward(dy)
    else:
        y.backward(dy)
    main_grads.close()
    return [leaf.grad for leaf in leaves]


def check(name: str, dtype: torch.dtype, scaled: bool) -> None:
    case = CASES[name]
    ours = gradients(case, dtype, dtype, scaled)
    plain, truth = (gradients(case, wide, dtype) for wide in (torch.float32, torch.float64))
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.dtype == torch.float32
        eps = (case[2] * torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps) * float(c.abs().max())
        assert_close_to_truth(a, b, c, eps=eps, name=f"{name}, parameter {i}")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_16_bit_parameters_are_summed_in_fp32(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, scaled=True)


@pytest.mark.parametrize("name", ["layer_norm", "embedding", "embedding_bag, mean", "w[ids]"])
def test_main_gradients_without_a_loss_scale_are_summed_in_fp32_too(name: str) -> None:
    check(name, torch.bfloat16, scaled=False)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_layer_norm_with_fp32_parameters_on_16_bit_rows(dtype: torch.dtype) -> None:
    """As under autocast, through GradScaler: no parameter has a main gradient, the backward has a scale."""
    found = []
    for wide in (dtype, torch.float32, torch.float64):
        norm = nn.LayerNorm(4).to(torch.promote_types(wide, torch.float32))
        x = (torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(2)) + 3).to(dtype).to(wide)
        scaler = GradScaler("cpu", init_scale=4.0) if wide == dtype else torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(norm(x)).backward(torch.full_like(x, 0.125))
        found.append([norm.weight.grad, norm.bias.grad])
    for ours, plain, truth in zip(*found, strict=True):
        assert_close_to_truth(ours, plain, truth, eps=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_needs_no_such_sum_is_torchs_to_the_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of inputs; and all gradients of a backward that makes no main gradients."""
    # A parameter of an earlier test that is still alive may have a sink, and then this backward is summed in fp32 too.
    monkeypatch.setattr(sink, "_SINKS", TensorTable())
    inputs, biases = [], []
    for scale in (LossScaler(4.0).scale, lambda y: y * 4):
        torch.manual_seed(0)
        norm, conv = nn.LayerNorm(6).to(dtype), nn.Conv1d(3, 3, 2).to(dtype)
        x = torch.randn(3000, 3, 6).to(dtype).requires_grad_()
        scale(norm(x) + F.pad(conv(x), (0, 1))).backward(torch.ones_like(x))
        inputs.append(x.grad)
        biases.append(norm.bias.grad)
    assert_equal(*inputs)
    assert bool((biases[0] == 36_000).all() and (biases[1] < 36_000).all())
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    weight[torch.zeros(9000, dtype=torch.int64)].sum().backward()
    assert weight.grad < 9000  # plain torch, left alone
    assert_equal(
        torch.zeros(2, dtype=dtype).index_add_(0, IDS[:2] * 0, torch.ones(2, dtype=dtype))[:1], weight[:1].detach() * 2
    )


class Reader(nn.Module):
    """Uses its parameters by functions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.position = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(2, 8))
        self.gain, self.shift = nn.Parameter(torch.ones(8)), nn.Parameter(torch.zeros(8))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.table) + self.position[ids % 2]
        return F.layer_norm(x, (8,), self.gain, self.shift)


def readers() -> list[nn.Sequential]:
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4, bias=False))
    tied[4].weight = tied[0].weight
    return [tied, nn.Sequential(Reader(), nn.Linear(8, 4)), nn.Sequential(nn.EmbeddingBag(4, 8), nn.Linear(8, 4))]


@pytest.mark.parametrize(
    "options",
    [{}, {"recompute": True}, {"schedule": "zb"}, {"microbatches": 3}],
    ids=["plain", "recompute", "zb", "3 parts"],
)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("which", range(3), ids=["modules, tied", "functions", "bags"])
def test_a_trainers_gradients_equal_those_of_fp32(which: int, precision: str, options: dict[str, object]) -> None:
    model, truth = readers()[which], readers()[which]
    ids = IDS.view(-1, 4) if which == 2 else IDS
    targets = (torch.arange(len(ids)) % 7 == 0).long()
    settings = {"microbatches": 1, "devices": ["cpu:0", "cpu:1"]} | options
    with ModelParallelTrainer(model, precision=precision, **settings) as trainer:
        trainer.forward_backward(ids, targets)
        found = {name: p.grad for name, p in model.named_parameters()}
    F.cross_entropy(truth(ids), targets).backward()
    for name, p in truth.named_parameters():
        # The forward's roundings, which bf16 parameters make alike in all rows, are all that is left.
        error = (found[name] - p.grad).norm() / p.grad.norm()
        assert error < (0.03 if precision == "bf16" else 0.004), f"{name}: {error}"


@pytest.mark.parametrize("cast", [True, False], ids=["autocast", "16-bit parameters"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_through_accelerate_and_grad_scaler(dtype: torch.dtype, cast: bool) -> None:
    model, truth = (nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)) for _ in "ab")
    truth.load_state_dict(model.state_dict())
    spu.accelerate(model if cast else model.to(dtype))
    scaler, optimizer = spu.GradScaler("cpu", init_scale=1024.0), torch.optim.SGD(model.parameters(), lr=0.0)
    targets = (torch.arange(ROWS) % 7 == 0).long()
    for _ in range(2):  # in the first backward the scaler meets the parameters
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=cast):
            loss = F.cross_entropy(checkpoint(model, IDS, use_reentrant=False).float(), targets)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    F.cross_entropy(truth(IDS), targets).backward()
    for (name, p), q in zip(model.named_parameters(), truth.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / q.grad.norm()
        assert error < (0.03 if dtype == torch.bfloat16 else 0.004), f"{name}: {error}"
