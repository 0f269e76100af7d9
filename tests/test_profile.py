"""What layers cost: estimates against counting by hand and against real runs; measuring leaves no trace."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn

from spu import profile
from spu.devices import DeviceManager
from spu.ops import linear_act
from spu.profile import LayerCost, estimate_layers, measure_layers

SAVING = [
    nn.Linear(16, 32),
    nn.ReLU(),
    nn.Linear(32, 16, bias=False),
    nn.GELU(),
    nn.LayerNorm(16),
    nn.Dropout(0.5),
    nn.TransformerEncoderLayer(16, 4, 32, batch_first=True),
    nn.Softmax(-1),
]


def really_saved(layers: list[nn.Module], x: Any) -> list[int]:
    """Bytes of distinct storages that a real forward of each layer saves, parameters left out."""
    result = []
    for layer in layers:
        own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}
        saved: dict[int, torch.Tensor] = {}

        def pack(t: torch.Tensor, own: set[int] = own, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in own:
                saved[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = layer(x)
        result.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
        x = out.detach().requires_grad_(out.requires_grad)
    return result


def test_a_linear_layer_is_counted_as_by_hand() -> None:
    (cost,) = estimate_layers([nn.Linear(64, 128)], torch.randn(2, 10, 64))
    assert cost == LayerCost(
        name="0.Linear",
        forward_flops=2 * 20 * 64 * 128,
        param_bytes=4 * (64 * 128 + 128),
        param_count=64 * 128 + 128,
        saved_bytes=20 * 64 * 4,
        output_bytes=20 * 128 * 4,
        saved_by_dtype=(("float32", 20 * 64 * 4),),
        input_bytes=20 * 64 * 4,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_our_linear_op_is_counted_like_torchs(dtype: torch.dtype) -> None:
    class Fused(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear_act(x, self.weight, self.bias, "none")

    x = torch.randn(3, 7, 16, dtype=dtype)
    (ours,) = estimate_layers([("l", Fused(16, 24, dtype=dtype))], x)
    (theirs,) = estimate_layers([("l", nn.Linear(16, 24, dtype=dtype))], x)
    assert ours == theirs
    assert ours.forward_flops == 2 * 21 * 16 * 24
    assert ours.param_bytes == (16 * 24 + 24) * dtype.itemsize


def test_costs_in_another_dtype_are_those_of_the_converted_layers() -> None:
    x = torch.randn(2, 10, 16, requires_grad=True)
    costs = estimate_layers(SAVING, x, dtype=torch.float16)
    converted = [copy.deepcopy(layer).half() for layer in SAVING]
    assert costs == estimate_layers(converted, x.detach().half().requires_grad_())
    assert costs[0].param_bytes == 2 * (16 * 32 + 32)
    assert all(p.dtype == torch.float32 for layer in SAVING for p in layer.parameters())


def test_attention_and_convolution_are_counted() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    (attention,) = estimate_layers([Attention()], torch.randn(2, 4, 32, 8))
    assert attention.forward_flops == 2 * (2 * 4 * 32 * 32 * 8 * 2)
    (convolution,) = estimate_layers([nn.Conv2d(3, 8, 3, padding=1)], torch.randn(2, 3, 10, 10))
    assert convolution.forward_flops == 2 * 2 * 8 * 3 * 9 * 100


def test_saved_bytes_are_those_of_a_real_forward() -> None:
    x = torch.randn(2, 10, 16, requires_grad=True)
    real = really_saved(SAVING, x)
    for cost, expected in zip(estimate_layers(SAVING, x), real, strict=True):
        assert cost.saved_bytes == expected, f"{cost.name}: {cost.saved_bytes}, a real forward saves {expected}"


def test_what_an_earlier_layer_keeps_already_is_told() -> None:
    first, relu, second = estimate_layers([nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)], torch.randn(3, 4))
    # The activation is saved by the ReLU, as its result, and by the layer after it, as its input.
    assert (first.shared_bytes, relu.shared_bytes, second.shared_bytes) == (0, 0, 3 * 8 * 4)
    assert (relu.saved_bytes, second.saved_bytes) == (3 * 8 * 4, 3 * 8 * 4)


def test_indices_outputs_and_a_layer_without_parameters() -> None:
    embedding, flat = estimate_layers([nn.Embedding(50, 8), nn.Flatten(0, 1)], torch.zeros(2, 5, dtype=torch.int64))
    assert (embedding.param_count, embedding.saved_bytes, embedding.output_bytes) == (400, 2 * 5 * 8, 2 * 5 * 8 * 4)
    assert (flat.param_count, flat.saved_bytes, flat.output_bytes) == (0, 0, 2 * 5 * 8 * 4)


def test_a_parameter_shared_within_a_layer_counts_once() -> None:
    block = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    block[1].weight = block[0].weight
    (cost,) = estimate_layers([block], torch.randn(2, 8))
    assert (cost.param_count, cost.forward_flops) == (64, 2 * (2 * 2 * 8 * 8))


def test_structures_pass_from_layer_to_layer() -> None:
    class Split(nn.Module):
        def forward(self, x: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            return x["a"] * 2, x["b"].half()

    class Join(nn.Module):
        def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.cat(pair)

    costs = estimate_layers([Split(), Join()], {"a": torch.zeros(3), "b": torch.zeros(5)})
    assert [c.output_bytes for c in costs] == [3 * 4 + 5 * 2, 8 * 4]


def test_context_comes_by_call_and_a_sequential_is_a_list_of_layers() -> None:
    bias = torch.randn(2, 8)  # real, and treated as fake
    layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    seen = []

    def call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(layer)
        return layer(x) + bias

    costs = estimate_layers(layers, torch.randn(2, 8), call)
    assert seen == list(layers)
    assert [c.name for c in costs] == ["0.Linear", "1.Linear"]
    assert [c.name for c in estimate_layers([("embed", layers[0])], torch.randn(2, 8))] == ["embed"]


def test_twenty_billion_parameters_are_costed_without_their_memory() -> None:
    with torch.device("meta"):
        layers = [nn.TransformerEncoderLayer(6144, 48, 16384, batch_first=True) for _ in range(4)] * 14
    start = time.perf_counter()
    costs = estimate_layers(layers, torch.empty(1, 2048, 6144, device="meta"))
    assert sum(c.param_count for c in costs) > 19 * 10**9
    assert len({c.saved_bytes for c in costs}) == 1
    assert time.perf_counter() - start < 30


def test_estimating_changes_nothing() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    layer[2].eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    x = torch.randn(3, 4)
    rng = torch.get_rng_state()
    estimate_layers([layer], x)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (layer[0].training, layer[2].training) == (True, False)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert type(value) is torch.Tensor
    assert all(type(p) is nn.Parameter and p.grad is None for p in layer.parameters())


@pytest.mark.parametrize(
    ("layers", "message"),
    [([], "no layers"), ([nn.Linear(4, 4), nn.Linear(5, 4)], r"layer '1.Linear' could not be run on fake tensors")],
)
def test_what_cannot_be_costed_is_named(layers: list[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_layers(layers, torch.randn(2, 4))


def test_a_layer_that_reads_values_is_named() -> None:
    class Peeking(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(ValueError, match=r"'peek' could not be run on fake tensors.*does not read values"):
        estimate_layers([("peek", Peeking())], torch.randn(2, 4))


# Measuring.


class Slow(nn.Module):
    """Takes a known time forward, and another backward."""

    def __init__(self, forward_s: float, backward_s: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.forward_s, self.backward_s = forward_s, backward_s

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.forward_s)
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(lambda g: time.sleep(self.backward_s))
        return y


@pytest.mark.parametrize("pinned", [False, True])
def test_forward_and_backward_seconds_are_real_medians(monkeypatch: pytest.MonkeyPatch, pinned: bool) -> None:
    estimates = [LayerCost("a", 1, 2, 3, 4, 5), LayerCost("b", 1, 2, 3, 4, 5)]
    monkeypatch.setattr(profile, "estimate_layers", lambda *args: estimates)
    device = DeviceManager().get_devices("cpu,cpu")[1] if pinned else None
    costs = measure_layers([Slow(0.01, 0.03), Slow(0.04, 0.0)], torch.randn(4), device=device)
    assert [c.name for c in costs] == ["a", "b"]
    measured = [(c.forward_s, c.backward_s) for c in costs]
    for (forward_s, backward_s), (least_f, least_b) in zip(measured, [(0.01, 0.03), (0.04, 0.0)], strict=True):
        assert forward_s is not None
        assert backward_s is not None
        assert least_f <= forward_s < least_f + 0.5
        assert least_b <= backward_s < least_b + 0.5


def test_measuring_leaves_gradients_buffers_randomness_and_modes_alone() -> None:
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)]
    layers[3].eval()
    kept = torch.randn(4, 4)
    layers[0].weight.grad = kept
    hooked = []
    layers[3].weight.register_post_accumulate_grad_hook(hooked.append)
    before = [{n: v.clone() for n, v in layer.state_dict().items()} for layer in layers]
    x = torch.randn(3, 4)
    rng = torch.get_rng_state()
    costs = measure_layers(layers, x, repeats=1)
    assert torch.equal(torch.get_rng_state(), rng)
    assert layers[0].weight.grad is kept
    assert not hooked
    assert [layer.training for layer in layers] == [True, True, True, False]
    assert all(p.grad is None for layer in layers for p in layer.parameters() if p is not layers[0].weight)
    for layer, values in zip(layers, before, strict=True):
        for name, value in layer.state_dict().items():
            assert torch.equal(value, values[name]), name
    assert all(c.forward_s is not None and c.forward_s > 0 for c in costs)


def test_measured_costs_keep_the_estimates_and_follow_the_work() -> None:
    layers = [nn.Linear(1024, 1024), nn.Linear(1024, 8)]  # 128 to 1: no load turns that round
    x = torch.randn(512, 1024)
    estimated, measured = estimate_layers(layers, x), measure_layers(layers, x, repeats=5)
    for plain, timed in zip(estimated, measured, strict=True):
        assert (timed.name, timed.forward_flops, timed.saved_bytes) == (
            plain.name,
            plain.forward_flops,
            plain.saved_bytes,
        )
    assert measured[0].forward_s is not None
    assert measured[1].forward_s is not None
    assert measured[0].forward_s > measured[1].forward_s


def test_a_layer_without_gradients_has_no_backward() -> None:
    (cost,) = measure_layers([nn.Linear(4, 4).requires_grad_(False)], torch.randn(2, 4))
    assert cost.backward_s is not None
    assert cost.backward_s < 1e-3


def test_a_layer_that_is_elsewhere_is_copied_there() -> None:
    layer = nn.Linear(4, 4)
    assert profile._on(layer, None) is profile._on(layer, torch.device("cpu")) is layer
    moved = profile._on(layer, torch.device("meta"))
    assert moved is not layer
    assert (moved.weight.device.type, layer.weight.device.type) == ("meta", "cpu")


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        measure_layers([nn.ReLU()], torch.randn(1), repeats=0)
