"""A boundary's buffer brings back what was written into it, every bit of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from spu.common.torch_private import pytree
from spu.distributed.packed_stage import PackedStage
from spu.distributed.wire import Leaf, Wire
from spu.engine.crossing import arrive, depart
from spu.ops import pack, unpack


def sent(tree: object, codec: str | None = None) -> object:
    """The output in the next stage."""
    message = depart(tree, (), lambda: ())
    wire = Wire([Leaf(tuple(t.shape), t.dtype, t.requires_grad) for t in message[0]], codec, 0)
    buffer = wire.write(message)
    assert buffer.shape == wire.example(train=True).shape
    assert buffer.dtype == torch.float32
    return arrive(wire.read(buffer.clone()), train=True).tree


def test_tensors_arrive_with_every_bit_and_their_strides() -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    odd.view(torch.int32)[0] = 0x7FC0BEEF  # a NaN with a payload
    tree = {
        "x": odd.requires_grad_(),
        "transposed": torch.randn(3, 4).t(),
        "holes": torch.randn(4, 6)[:, ::2],
        "mask": (torch.tensor([True, False]), None, 3, "text"),
        "halves": torch.randn(5, 7).half().requires_grad_(),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "one": torch.arange(8.0)[::4][:1],
    }
    found = sent(tree)
    assert isinstance(found, dict)
    assert torch.equal(found["x"].view(torch.int32), odd.view(torch.int32))
    assert found["x"].requires_grad
    assert found["transposed"].stride() == (1, 4)
    for name in ("transposed", "holes", "halves", "empty", "scalar", "one"):
        assert torch.equal(found[name], tree[name])
        assert found[name].dtype == tree[name].dtype
    assert torch.equal(found["mask"][0], tree["mask"][0])
    assert found["mask"][1:] == (None, 3, "text")


def test_a_message_without_tensors_leaves_from_the_stages_device() -> None:
    """A stage whose input wants no gradient sends the one before it a message of nothing, which NCCL refused on the
    host.
    """
    wire, spans = Wire([Leaf((2, 3), torch.float32, False)], None, 0), list[Any]()
    card = SimpleNamespace(name="cuda:0", torch_device=torch.device("meta"))
    gone = SimpleNamespace(index=1, device=card, backward=lambda *_, **__: [None])
    stage = PackedStage(cast(Any, gone), wire, None, spans, defer=False)
    stage.work = cast(Any, SimpleNamespace(scopes={1: None}, run_seed=0, step=0, first_microbatch=0))
    sent = stage.backward(0, None)
    assert sent is not None
    assert (sent.device, sent.shape) == (torch.device("meta"), wire.example(train=True).shape)


def test_a_view_arrives_as_one() -> None:
    x = torch.randn(4, 6, requires_grad=True) * 1.0
    found = sent((x, x[1:3], x))
    assert isinstance(found, tuple)
    assert found[2] is found[0]
    assert found[1].data_ptr() == found[0][1].data_ptr()
    (found[0].sum() + found[1].sum()).backward()


def test_what_has_a_gradient_is_packed() -> None:
    x, mask = torch.randn(8, 64, requires_grad=True), torch.full((8, 64), float("-inf"))
    found = sent((x, mask), "int8")
    assert isinstance(found, tuple)
    assert torch.equal(found[0], unpack(pack(x.detach(), "int8"), x.shape, x.dtype))
    assert torch.equal(found[1], mask)


def test_what_has_too_many_dimensions_for_a_codec_crosses_as_it_is() -> None:
    x = torch.randn(2, 1, 3, 1, 2, 2, requires_grad=True)
    found = sent(x, "int8")
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, x)


def test_gradients_come_back_in_their_places() -> None:
    wire = Wire([Leaf((3, 5), torch.bfloat16, True), Leaf((2,), torch.int64, False)], None, 0)
    gradient = torch.randn(3, 5).bfloat16()
    first, second, third = wire.read_gradients(wire.write_gradients([gradient, None, None]))
    assert first is not None
    assert torch.equal(first, gradient)
    assert second is None
    assert third is None


def test_a_description_that_is_kept_is_that_of_its_message() -> None:
    wire = Wire([Leaf((6, 5), torch.float32, True)] * 2, None, 0)
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(3, 5)
    trees = [(x, 1), (x, True), (x, 1.0), x, x.detach(), (x, y), (x, y), (y, x), [x, y], (x, x[1:]), (x, x[2:]), x]
    for tree in trees:
        found = arrive(wire.read(wire.write(depart(tree, (), lambda: ()))), train=True).tree
        for own, there in zip(*(pytree.tree_leaves(each) for each in (tree, found)), strict=True):
            assert type(own) is type(there)
            assert torch.equal(own, there) if isinstance(own, torch.Tensor) else own == there
        assert pytree.tree_structure(found) == pytree.tree_structure(tree)


def test_what_was_not_counted_is_refused() -> None:
    wire = Wire([Leaf((4,), torch.float32, True)], None, 2)
    with pytest.raises(ValueError, match="what stage 2 hands on takes .* bytes"):
        wire.write_gradients([torch.zeros(10_000)])
    with pytest.raises(TypeError, match="hands a complex to the next stage"):
        wire.write(depart((torch.zeros(4), 1j), (), lambda: ()))


@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_buffer_may_be_a_part_of_a_larger_memory(codec: str | None) -> None:
    x = torch.randn(4, 64, requires_grad=True)
    wire = Wire([Leaf((4, 64), torch.float32, True)], codec, 0)
    buffer = wire.write(depart(x, (), lambda: ()))
    memory = torch.full((3 * buffer.numel(),), float("nan"))
    part = memory[buffer.numel() : 2 * buffer.numel()].copy_(buffer)
    found = arrive(wire.read(part), train=True).tree
    assert torch.equal(found, x if codec is None else unpack(pack(x.detach(), codec), x.shape, x.dtype))
