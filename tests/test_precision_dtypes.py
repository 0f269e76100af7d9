"""What a 16-bit precision touches: parameters and products. Everything else keeps its dtype, as under autocast."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numeric import assert_equal
from torch import Tensor, nn

from spu import ModelParallelTrainer

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
make = functools.partial(ModelParallelTrainer, devices=["cpu:0", "cpu:1"], microbatches=2, lr=0.0)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 5, 8, generator=generator), torch.randint(3, (8, 5), generator=generator)


class Fn(nn.Module):
    """A function of the input, a buffer ``b`` and a parameter ``w``."""

    def __init__(self, fn: Callable[..., Tensor], b: Tensor, w: Tensor | None = None) -> None:
        super().__init__()
        self.fn = fn
        self.register_buffer("b", b)
        self.w = None if w is None else nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x, self.b) if self.w is None else self.fn(x, self.b, self.w)


class Recurrent(nn.Module):
    def __init__(self, cls: Any) -> None:
        super().__init__()
        self.cell = cls(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, attn_mask=self.mask)[0]


def times(x: Tensor, b: Tensor) -> Tensor:
    """Sines of times around 1000.5, which 16 bits do not hold."""
    angle = (x[..., :1] + 1000.5) * b
    return torch.cat([angle.sin(), angle.cos()], -1)


def rotate(x: Tensor, b: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], 4, 2).contiguous())
    return torch.view_as_real(pairs * b).flatten(-2)


def where(x: Tensor, b: Tensor) -> Tensor:
    return torch.where(x > 0, x, b[0]).softmax(-1) + (x * b[1]) / b[1]


def volume(w: Tensor) -> Tensor:
    return torch.linalg.slogdet(w)[1] + torch.logdet(w) + w.det()


def solved(x: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return x @ torch.linalg.solve_triangular(w.tril(-1) + b, b, upper=False)


def encoder(**how: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, **how)


positions = torch.linspace(-2, 2, 40).view(5, 8)
MODELS: dict[str, Callable[[], list[nn.Module]]] = {
    "positions": lambda: [nn.Linear(8, 8), Fn(torch.add, positions)],
    "positions first": lambda: [Fn(torch.add, positions)],
    "times": lambda: [Fn(times, torch.exp(-torch.arange(4.0))), nn.Linear(8, 8)],
    "large constants": lambda: [nn.Linear(8, 8), Fn(where, torch.tensor([[-1e9], [1e6]]))],
    "fp64": lambda: [nn.Linear(8, 8), Fn(torch.mul, torch.tensor(1 / 3, dtype=torch.float64))],
    "complex": lambda: [nn.Linear(8, 8), Fn(rotate, torch.polar(torch.ones(4), torch.arange(4.0)))],
    "additive mask": lambda: [Attending()],
    "layer norm": lambda: [nn.LayerNorm(8)],
    "layer norm of a function": lambda: [
        nn.Linear(8, 8),
        Fn(lambda x, b, w: F.layer_norm(x + b, (8,), w), positions, torch.ones(8)),
    ],
    "group norm": lambda: [nn.Conv1d(5, 5, 3, padding=1), nn.GroupNorm(1, 5)],
    "batch norm": lambda: [nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5)],
    "batch norm first": lambda: [nn.BatchNorm1d(5)],
    "instance norm": lambda: [nn.InstanceNorm1d(5, affine=True, track_running_stats=True)],
    "rms norm": lambda: [nn.RMSNorm(8)],
    "lstm": lambda: [Recurrent(nn.LSTM)],
    "gru": lambda: [nn.Linear(8, 8), Recurrent(nn.GRU)],
    "encoder": lambda: [encoder()],
    "encoder after positions": lambda: [nn.Linear(8, 8), Fn(torch.add, positions), encoder(norm_first=True)],
    "encoder after a product": lambda: [nn.Linear(8, 8), encoder()],
    "bilinear": lambda: [
        Fn(lambda x, b, w: F.bilinear(x, x + b, w), positions, torch.linspace(-1, 1, 512).view(8, 8, 8))
    ],
    "lerp": lambda: [Fn(lambda x, b, w: torch.lerp(x + b, w.expand_as(x), 0.5), positions, torch.linspace(-1, 1, 8))],
    "spectral norm": lambda: [nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))],
    "weight norm": lambda: [nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))],
    "prelu": lambda: [nn.PReLU()],
    "orthogonal": lambda: [nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))],
    "determinant": lambda: [
        Fn(lambda x, b, w: x * volume(w + 2 * b), torch.eye(8), torch.linspace(-0.1, 0.1, 64).view(8, 8))
    ],
    "triangular": lambda: [Fn(solved, torch.eye(8), torch.linspace(-0.3, 0.3, 64).view(8, 8))],
}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_16_bits_come_as_close_to_fp32_as_autocast(name: str, precision: str) -> None:
    x, y = batch()
    torch.manual_seed(1)
    model = nn.Sequential(*MODELS[name](), nn.Linear(8, 3))
    plain, cast = copy.deepcopy(model), copy.deepcopy(model)
    with make(model, precision=precision) as trainer:
        loss, outputs = trainer.forward_backward(x, y)
        gradients = [p.grad.float() for p in model.parameters() if p.grad is not None]
        evaluated = trainer.evaluate(x, y)
    expected = torch.cat([plain(part) for part in x.chunk(2)])
    error = (outputs.float() - expected).norm() / expected.norm()
    try:
        with torch.autocast("cpu", DTYPES[precision]):
            autocast = torch.cat([cast(part) for part in x.chunk(2)])
        allowed = 2 * (autocast.float() - expected).norm() / expected.norm()
    except RuntimeError:  # torch's fp16 LSTM
        allowed = torch.zeros(())
    assert error <= allowed + 2 * torch.finfo(DTYPES[precision]).eps
    near = 16 * torch.finfo(DTYPES[precision]).eps
    assert loss.item() == pytest.approx(F.cross_entropy(expected.flatten(0, 1), y.flatten()).item(), rel=near)
    plain.eval()
    assert evaluated == pytest.approx(F.cross_entropy(plain(x).flatten(0, 1), y.flatten()).item(), rel=near)
    plain.train()
    plain.zero_grad()
    F.cross_entropy(expected.flatten(0, 1), y.flatten()).backward()
    assert len(gradients) == len(list(model.parameters()))
    largest = max(p.grad.abs().max().item() for p in plain.parameters())
    for gradient, parameter in zip(gradients, plain.parameters(), strict=True):
        assert (gradient - parameter.grad).abs().max() <= 32 * torch.finfo(DTYPES[precision]).eps * largest


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_running_statistics_do_not_stall(precision: str, recompute: bool) -> None:
    """In 16 bits a running mean stopped at 3.3 on its way to 5, and the variance of large activations was infinite."""
    x = 300 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0)) + 5
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(8, momentum=0.01), nn.Linear(8, 3))
    plain = copy.deepcopy(model[1])
    with make(model, precision=precision, recompute=recompute) as trainer:
        for _ in range(60):
            trainer.step(x, torch.arange(8) % 3)
            for part in x.chunk(2):
                plain(part)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(getattr(model[1], name), getattr(plain, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_buffers_and_inputs_keep_dtype_and_bits(precision: str) -> None:
    buffers = {
        "complex": torch.polar(torch.ones(4), torch.arange(4.0)),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "large": torch.tensor([-1e9, 1e6, -torch.inf]),
        "whole": torch.arange(3),
        "flags": torch.tensor([True, False]),
        "narrow": torch.ones(2, dtype=torch.bfloat16),
    }
    seen = {}

    class Look(nn.Module):
        def forward(self, x: dict[str, Tensor]) -> Tensor:
            seen.update({name: value.dtype for name, value in x.items()})
            return x["x"]

    model = nn.Sequential(Look(), nn.Linear(8, 3))
    for name, value in buffers.items():
        model[0].register_buffer(f"own_{name}", value.clone())
    x = {
        "x": torch.randn(4, 8),
        "time": torch.tensor([1000.5] * 4),
        "mask": torch.full((4, 1), -1e9),
        "z": torch.ones(4, dtype=torch.complex64),
        "ids": torch.arange(4),
        "flags": torch.ones(4, dtype=torch.bool),
    }
    with make(model, precision=precision) as trainer:
        trainer.step(x, torch.arange(4) % 3)
        state = trainer.state_dict_for_model()
    assert seen == {name: value.dtype for name, value in x.items()}
    for name, value in buffers.items():
        assert_equal(getattr(model[0], f"own_{name}"), value, name)
        assert_equal(state[f"0.own_{name}"], value, name)


def test_normalisations_keep_fp32_parameters_and_their_buffers() -> None:
    model = nn.Sequential(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.LayerNorm(8), nn.Linear(8, 3)).half()
    with make(model, precision="fp16") as trainer:
        trainer.step(*batch())
    assert {p.dtype for p in (*model[0].parameters(), *model[3].parameters())} == {torch.float16}
    assert {t.dtype for t in (*model[1].parameters(), *model[2].parameters())} == {torch.float32}
    assert model[1].running_mean.dtype == model[1].running_var.dtype == torch.float32


@pytest.mark.parametrize("given", [torch.float64, torch.bfloat16])
def test_a_model_that_was_converted_whole_is_trained_in_fp32(given: torch.dtype) -> None:
    x, y = batch()
    model = nn.Sequential(nn.Linear(8, 8), Fn(lambda x, b: x @ b, torch.eye(8)), nn.BatchNorm1d(5), nn.Linear(8, 3))
    model.to(given)
    plain = copy.deepcopy(model).float()
    with make(model, precision="fp32") as trainer:
        loss, outputs = trainer.forward_backward(x, y)
    assert outputs.dtype == torch.float32
    assert loss.item() == pytest.approx(
        F.cross_entropy(torch.cat([plain(p) for p in x.chunk(2)]).flatten(0, 1), y.flatten()).item(), rel=1e-5
    )


def test_a_shared_buffer_stays_shared() -> None:
    first, second = nn.BatchNorm1d(8).half(), nn.BatchNorm1d(8).half()
    second.running_mean = first.running_mean
    model = nn.Sequential(first, second, nn.Linear(8, 3))
    with make(model, precision="fp16", devices=["cpu:0"]) as trainer:
        trainer.step(torch.randn(8, 8), torch.arange(8) % 3)
    assert first.running_mean is second.running_mean


def test_complex_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Fn(lambda x, b, w: (x * w).abs(), torch.ones(1), torch.ones(8) * 1j))
    model.append(nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"parameter '1\.w' is complex64.*view_as_real"):
        make(model, precision="fp32").step(*batch())
    assert all(p.dtype != torch.float16 for p in model.parameters())
    model[1].w.requires_grad_(False)
    assert torch.isfinite(torch.tensor(make(model, precision="fp16").step(*batch()).loss))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_positions_of_a_hugging_face_decoder_are_as_exact_as_under_autocast(precision: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=16,
        max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    plain = copy.deepcopy(model)
    ids = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "position_ids": torch.arange(4089, 4097).repeat(2, 1)}
    with make(model, precision=precision) as trainer:
        outputs = trainer.forward_backward(inputs, ids.roll(-1, 1))[1].float()
    with torch.no_grad():
        expected = plain(**inputs, use_cache=False).logits
        with torch.autocast("cpu", DTYPES[precision]):
            autocast = plain(**inputs, use_cache=False).logits.float()
    assert (outputs - expected).norm() <= 2 * (autocast - expected).norm()


# What the loss sees


def test_a_loss_sees_fp32_outputs() -> None:
    """In fp16 the sum over 20,000 rows of loss 10 was infinite, and every step was skipped."""
    x = torch.eye(2).repeat(10_000, 1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
        model[0].bias.zero_()
        model[1].weight.copy_(10 * torch.eye(2))
    y = 1 - torch.arange(20_000) % 2
    plain = F.cross_entropy(model(x), y).item()
    with make(model, loss_fn=nn.CrossEntropyLoss(), microbatches=1, precision="fp16") as trainer:
        assert trainer.evaluate(x, y) == pytest.approx(plain, rel=1e-3)
        step = trainer.step(x, y)
    assert step.loss == pytest.approx(plain, rel=1e-3)
    assert not step.skipped


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_raw_outputs(precision: str, raw: bool) -> None:
    seen = set()

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        seen.update((name, value.dtype) for name, value in outputs.items())
        return F.cross_entropy(outputs["y"].float(), targets)

    model = nn.Sequential(nn.Linear(8, 3), Fn(lambda x, b: {"y": x, "z": b, "wide": x.double()}, torch.arange(2)))
    with make(model, precision=precision, loss_fn=loss, raw_outputs=raw) as trainer:
        trainer.step(torch.randn(4, 8), torch.arange(4) % 3)
        trainer.evaluate(torch.randn(4, 8), torch.arange(4) % 3)
    own = DTYPES.get(precision, torch.float32) if raw else torch.float32
    assert seen == {("y", own), ("z", torch.int64), ("wide", torch.float64)}
