"""Whole training steps of a loop that changed two lines, beside the same loop in plain torch.

The MLP is 512-2048-512 on 256 rows. The language model is a decoder of width 512, 8 heads, SwiGLU 1408, 8 layers and a
vocabulary of 256, without biases; one step is two microbatches of two sequences of 256 tokens, or eight of them, which
have a goal for each kind of CPU. Its fp16 runs as docs/drop-in.md advises on a CPU: products in fp16, the rest in fp32.
(Plain torch's autocast fp16 takes minutes.)
The eight microbatches run through the trainer too, on one core: its weights have 16 bits and are not converted.
Figures are multiply-adds of the linear layers over the time of the whole step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Measure
from must_reach import LARGE_STEP, target
from torch import Tensor, nn

import spu

pytest.importorskip("spu._C", reason="spu._C is not built here")

PARAMETERS, PIECES = 4_000_000, 20
WIDTH, INNER, LAYERS, VOCABULARY, TOKENS, MICROBATCHES = 512, 1408, 8, 256, 256, 2
LARGE_MICROBATCHES = 8


def autocast(peer: str) -> AbstractContextManager[Any]:
    if "autocast" not in peer:
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.float16 if "fp16" in peer else torch.bfloat16)


def training_step(
    model: nn.Module, peer: str, losses: list[Callable[[], Tensor]], make_optimizer: Callable[[Any], Any]
) -> Callable[[], None]:
    """zero_grad, forward and backward of every microbatch, unscaling, clipping, the update."""
    scaler = (spu if peer.startswith("spu") else torch.amp).GradScaler(
        "cpu", init_scale=2.0**12, enabled="fp16" in peer
    )
    optimizer = make_optimizer(model.parameters())

    def step() -> None:
        optimizer.zero_grad()
        with spu.same_weights() if peer.startswith("spu") else nullcontext():
            for loss in losses:
                with autocast(peer):
                    value = loss() / len(losses)
                scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def fused_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def mlp_step(peer: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512))
    if peer.startswith("spu"):
        spu.accelerate(model, precision=None if "autocast" in peer else "fp16")
    x, y = torch.randn(256, 512), torch.randn(256, 512)
    return training_step(model, peer, [lambda: F.mse_loss(model(x), y)], fused_adamw)


def beside_fp32(peer: str, make: Callable[[str], Callable[[], None]]) -> dict[str, Callable[[], object]] | None:
    return {"torch fp32": make("torch fp32")} if peer.startswith("spu") else None


@pytest.mark.parametrize(
    "peer", ["spu fp16", "spu autocast fp16", "torch autocast fp16", "torch fp32", "torch autocast bf16"]
)
def test_mlp_step(measure: Measure, peer: str) -> None:
    measure(
        "MLP training step", "256x512x2048x512", peer, mlp_step(peer), flops=2.0 * 256 * 512 * 2048 * 5,
        targets={"torch fp32": 2.0, "torch autocast fp16": 50.0} if peer == "spu fp16" else None,
        paired=beside_fp32(peer, mlp_step),
    )  # fmt: skip


def decoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=8, max_position_embeddings=TOKENS, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        use_cache=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).train()  # type: ignore[no-any-return]


def trainer_step(precision: str, microbatches: int) -> Callable[[], object]:
    """The same by ModelParallelTrainer: one stage, one thread."""
    device = dataclasses.replace(spu.DeviceManager().get_devices(["cpu"])[0], threads=1)
    trainer = spu.ModelParallelTrainer(
        decoder(), [device], precision=precision, microbatches=microbatches, lr=1e-4, max_grad_norm=1.0, shift=True
    )
    ids = torch.randint(VOCABULARY, (2 * microbatches, TOKENS))
    return lambda: trainer.step(ids, ids)


def decoder_step(peer: str, microbatches: int = MICROBATCHES) -> Callable[[], object]:
    if peer.startswith("spu trainer"):
        return trainer_step(peer.split()[2], microbatches)
    model = decoder()
    make_optimizer: Callable[[Any], Any] = fused_adamw
    if peer.startswith("spu"):
        spu.accelerate(model, precision=peer.split()[1])
        make_optimizer = lambda parameters: spu.optim.AdamW(parameters, lr=1e-4)  # noqa: E731
    parts = [torch.randint(VOCABULARY, (2, TOKENS)) for _ in range(microbatches)]
    losses = [lambda ids=ids: model(input_ids=ids, labels=ids).loss for ids in parts]
    return training_step(model, peer, losses, make_optimizer)


@pytest.mark.parametrize("peer", ["spu fp16", "spu bf16", "torch fp32", "torch autocast bf16"])
def test_decoder_step(measure: Measure, peer: str) -> None:
    if peer == "torch autocast bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("plain torch takes minutes for this step in bf16 on a CPU without AVX-512")
    linear = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) + WIDTH * VOCABULARY
    tokens = 2 * TOKENS * MICROBATCHES
    goals = {"spu fp16": {"torch fp32": 2.0}, "spu bf16": {"torch autocast bf16": 1.2}}
    measure(
        "decoder training step", f"{tokens} tokens", peer, decoder_step(peer), flops=6.0 * linear * tokens,
        targets=goals.get(peer), paired=beside_fp32(peer, decoder_step),
    )  # fmt: skip


@pytest.mark.goals
@pytest.mark.parametrize(
    ("peer", "beside"),
    [
        ("spu bf16", "torch autocast bf16"), ("spu trainer bf16", "torch autocast bf16"),
        ("spu fp16", "torch fp32"), ("spu trainer fp16", "torch fp32"),
    ],
)  # fmt: skip
def test_large_decoder_step(measure: Measure, peer: str, beside: str) -> None:
    """16 sequences of 256 tokens in 8 microbatches."""
    linear = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) + WIDTH * VOCABULARY
    tokens = 2 * TOKENS * LARGE_MICROBATCHES
    measure(
        "large decoder training step", f"{tokens} tokens", peer, decoder_step(peer, LARGE_MICROBATCHES),
        flops=6.0 * linear * tokens, targets={beside: target(LARGE_STEP[peer])},
        paired={beside: decoder_step(beside, LARGE_MICROBATCHES)},
    )  # fmt: skip


def token_step(peer: str, batch: int) -> Callable[[], object]:
    """A forward of one token each, without a gradient, as in generation: its keys and values apart."""
    model = decoder().eval().to(torch.bfloat16 if peer.endswith("bf16") else torch.float32)
    if peer.startswith("spu"):
        spu.accelerate(model)
    ids = torch.randint(VOCABULARY, (batch, 1))

    def step() -> object:
        with torch.no_grad():
            return model(input_ids=ids).logits

    return step


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("peer", ["spu fp32", "spu bf16"])
def test_token_step(measure: Measure, peer: str, batch: int) -> None:
    linear = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) + WIDTH * VOCABULARY
    beside = peer.replace("spu", "torch")
    measure(
        "decoder, a token without gradients", f"batch {batch}", peer, token_step(peer, batch),
        bytes_=linear * (2.0 if peer.endswith("bf16") else 4.0), targets={beside: 0.95},
        paired={beside: token_step(beside, batch)},
    )  # fmt: skip


@pytest.mark.parametrize("peer", ["spu fp16", "torch fused"])
def test_optimizer_of_a_loop(measure: Measure, peer: str) -> None:
    """From scaled gradients to 16-bit parameters: what follows the backward.

    torch: GradScaler, clip_grad_norm_, fused AdamW on fp32 masters, and a 16-bit copy. Here: gradients are at true
    scale already; the norm, and one op that clips, updates and copies out.
    """
    masters = [nn.Parameter(torch.randn(PARAMETERS // PIECES)) for _ in range(PIECES)]
    halves = [nn.Parameter(master.detach().half()) for master in masters]
    if peer == "torch fused":
        optimizer, scaler = fused_adamw(masters), torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        for master in masters:
            master.grad = torch.randn_like(master)

        def step() -> None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(masters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            for half, master in zip(halves, masters, strict=True):
                half.data.copy_(master.data)
    else:
        own, found_inf = spu.optim.AdamW(halves, lr=1e-4), torch.zeros(1)
        for half in halves:
            half.grad_dtype = torch.float32
            half.grad = torch.randn(half.shape)

        def step() -> None:
            sqnorm = spu.ops.grad_sqnorm([half.grad for half in halves if half.grad is not None])
            own.step(found_inf=found_inf, grad_scale=spu.optim.clip_coefficient(sqnorm, 1.0))

    measure("unscale, clip, AdamW", f"{PARAMETERS} fp16", peer, step, bytes_=34 * PARAMETERS)
