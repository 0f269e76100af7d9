"""The nodes of fused ops: tensors that a transform has left behind, and backwards that are asked for some results."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from op_calls import Ops
from torch import Tensor, nn

import spu
from spu.ops.sink import BackwardScope, open_scope
from spu.precision.main_grads import MainGrads

transformers = pytest.importorskip("transformers")
if dist.is_available():
    from torch.distributed import pipelining


def fused() -> nn.Module:
    torch.manual_seed(0)
    return spu.accelerate(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))


def test_a_tensor_that_has_left_a_transform_is_a_plain_one_again() -> None:
    left: list[Tensor] = []

    def keeping(x: Tensor) -> Tensor:
        left.append((x * 2).detach())
        return x.sum()

    x = torch.randn(4, 8)
    torch.func.grad(keeping)(x)
    assert torch._C._functorch.is_functorch_wrapped_tensor(left[0])
    found = []
    for given in (left[0], x * 2):
        ours = fused()
        y = ours(given)
        y.square().sum().backward()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(y)
        found.append([y, *(p.grad for p in ours.parameters() if p.grad is not None)])
    assert len(found[0]) == 6
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("whole", [False, True])
def test_a_scope_of_a_whole_backward_gives_the_same_main_gradients(whole: bool) -> None:
    ours = fused()
    grads = MainGrads(list(ours.parameters()))
    grads.begin_step()
    one = torch.ones(1)
    scope = BackwardScope(one, one.clone(), torch.zeros(1), whole=whole)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    open_scope(ours(x).square().sum(), scope).backward()
    other = fused()
    other(x).square().sum().backward()
    for mine, expected in zip(ours.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert expected.grad is not None
        torch.testing.assert_close(mine.grad, expected.grad)


def test_a_scope_that_is_not_leaves_gradients_that_were_asked_for_to_who_asks() -> None:
    ours = fused()
    grads = MainGrads(list(ours.parameters()))
    grads.begin_step()
    one = torch.ones(1)
    scope = BackwardScope(one, one.clone(), torch.zeros(1))
    loss = open_scope(ours(torch.randn(4, 8)).square().sum(), scope)
    first, *others = ours.parameters()
    (gradient,) = torch.autograd.grad(loss, [first])
    assert gradient.abs().sum() > 0
    assert all(parameter.grad is None for parameter in (first, *others))


def every_kind() -> list[tuple[str, nn.Module, Tensor]]:
    """A module for each autograd function with weights, and its input."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
    )
    llama = transformers.LlamaModel(config)
    return [
        ("linear", nn.Linear(8, 8), x),
        ("mlp", nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), x),
        ("mlp without biases", nn.Sequential(nn.Linear(8, 16, False), nn.GELU(), nn.Linear(16, 8, False)), x),
        ("mlp with the second bias", nn.Sequential(nn.Linear(8, 16, False), nn.GELU(), nn.Linear(16, 8)), x),
        ("mlp with the first bias", nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, False)), x),
        ("gated", llama.layers[0].mlp, x),
        ("layer norm", nn.LayerNorm(8), x),
        ("layer norm without a bias", nn.LayerNorm(8, bias=False), x),
        ("rms norm", nn.RMSNorm(8), x),
        ("decoder", Decoder(llama), x),
    ]


class Decoder(nn.Module):
    """A decoder layer with its positions."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.layer, self.positions = llama.layers[0], llama.rotary_emb

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])[None]
        out = self.layer(x, position_embeddings=self.positions(x, places), attention_mask=None, position_ids=places)
        return out if isinstance(out, Tensor) else out[0]


KINDS = [name for name, _, _ in every_kind()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_several_backwards_add_up_whichever_weights_there_are(kind: str, precision: str | None) -> None:
    """A place among a node's edges is not one among the op's arguments: what was given as None has no edge."""
    plain, x = next((module, x) for name, module, x in every_kind() if name == kind)
    ours = spu.accelerate(copy.deepcopy(plain), precision=precision)
    scaler = spu.GradScaler("cpu", init_scale=2.0**14, enabled=precision is not None)
    optimizer = spu.optim.AdamW(ours.parameters(), lr=1.0)
    for _ in range(3):
        scaler.scale(ours(x).float().square().mean()).backward()
        plain(x).square().mean().backward()
    scaler.unscale_(optimizer)
    bound = 1e-5 if precision is None else 2e-2
    for mine, want in zip(ours.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        assert want.grad is not None
        assert (mine.grad - want.grad).norm() <= bound * want.grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_computes_what_it_is_asked_for(kind: str) -> None:
    module, x = next((module, x) for name, module, x in every_kind() if name == kind)
    ours, x = spu.accelerate(module, precision="bf16"), x.requires_grad_()
    weights, loss = list(ours.parameters()), ours(x).square().mean()
    with Ops() as of_all:
        dx, *dws = torch.autograd.grad(loss, [x, *weights], retain_graph=True)
    with Ops() as of_x:
        (only_dx,) = torch.autograd.grad(loss, x, retain_graph=True)
    with Ops() as of_weights:
        only_dws = torch.autograd.grad(loss, weights, retain_graph=True)
    with Ops() as of_last:
        (last,) = torch.autograd.grad(loss, weights[-1], retain_graph=True)
    loss.backward()
    assert torch.equal(only_dx, dx)
    assert torch.equal(last, dws[-1])
    for only, dw, p in zip(only_dws, dws, weights, strict=True):
        assert torch.equal(only, dw)
        assert p.grad is not None
        assert torch.equal(p.grad, dw)
    if "norm" not in kind:  # whose one op has both
        weight_ops = {name for name in of_all.names if "dw" in name or name == "linear_db"}
        assert weight_ops
        assert not weight_ops & set(of_x.names)
        assert len(of_weights.names) < len(of_all.names)
        assert len(of_last.names) < len(of_weights.names) or len(weights) == 1
    assert torch.equal(x.grad, dx)


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_torchs_split_backward_computes_each_gradient_once() -> None:
    weight_ops: list[list[str]] = []
    grads = []
    with one_process():
        for schedule in (pipelining.ScheduleInterleaved1F1B, pipelining.ScheduleInterleavedZeroBubble):
            torch.manual_seed(0)
            parts = [spu.accelerate(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))) for _ in range(3)]
            stages = [pipelining.PipelineStage(part, k, 3, torch.device("cpu")) for k, part in enumerate(parts)]
            steps = schedule(stages, 4, loss_fn=nn.functional.mse_loss)
            x, y = torch.randn(8, 8), torch.randn(8, 8)
            steps.step(x, target=y, return_outputs=False)  # asks for shapes, once
            for part in parts:
                part.zero_grad()
            with Ops() as ops:
                steps.step(x, target=y, return_outputs=False)
            weight_ops.append([name.rstrip("_") for name in ops.names if name.startswith(("linear_dw", "linear_dx"))])
            grads.append([p.grad for part in parts for p in part.parameters()])
    assert sorted(weight_ops[0]) == sorted(weight_ops[1])
    for one, split in zip(*grads, strict=True):
        torch.testing.assert_close(one, split)


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_a_leaf_or_two_of_four_get_what_torch_gives_them() -> None:
    """The first two leaves that autograd.grad returns speak for those after them."""
    torch.manual_seed(0)
    given = [torch.randn(shape, requires_grad=True) for shape in ((3, 8), (12, 8), (12, 8), (8, 12))]

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    for count in (1, 2, 3, 4):
        for wanted in itertools.combinations(given, count):
            found, right = (torch.autograd.grad(f(*given).sum(), wanted) for f in (spu.ops.gated_mlp, plain))
            torch.testing.assert_close(found, right)
    assert all(leaf.grad is None for leaf in given)
