"""internlm2-1.8b's shapes, trained whole on a card of which 8 GiB may be used, beside what else could be done.

    python benchmarks/gpu/lease_cap.py streamed|fsdp2|resident [--dry]

``streamed``: spu under the cap, which torch's allocator enforces; state in the host's memory, predicted beside
measured. ``fsdp2``: FSDP2 with its CPU offload under the same cap, AdamW on the host. ``resident``: plain torch without
the cap. The same batches and fp16 (FSDP2: bf16, which needs no loss scaler over shards).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

import torch
from card_memory import card_memory
from lease_lines import emit
from lease_work import batches
from torch import Tensor, nn

LIMIT_BYTES = 8 << 30
STEPS, ROWS, TOKENS, MICROBATCHES = 4, 8, 1024, 8
SHAPE = {
    "vocab_size": 92544, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 8,
}  # fmt: skip
SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def model(shape: dict[str, int]) -> Any:
    """Return the decoder on the CPU in fp32 with random weights: one block of random numbers over and over, because
    drawing 1.9e9 of them takes most of a minute.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config)
    made = made.to_empty(device="cpu")
    made.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is a buffer, which was emptied
    block = 0.02 * torch.randn(1_000_003)  # a prime: rows of a weight do not repeat
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            flat = parameter.view(-1)
            for begin in range(0, flat.numel(), len(block)):
                part = flat[begin : begin + len(block)]
                part.copy_(block[: len(part)])
            assert flat.numel() == 0 or bool(flat[-1].isfinite()), name
    return made


def cap(dry: bool) -> None:
    if not dry:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, LIMIT_BYTES / whole), 0)


def _report(by: str, seconds: list[float], losses: list[float], tokens: int, dry: bool, **more: Any) -> None:
    """Emit the row; called after every step, so that a part that is cut leaves what it has."""
    steady = sorted(seconds[1:] or seconds)  # the first takes the memory
    step = steady[len(steady) // 2]
    row: dict[str, Any] = {"what": "cap", "by": by, "steps": len(losses), "step_s": step, "tokens_per_s": tokens / step}
    if not dry:
        row |= card_memory()
    emit({**row, "losses": losses, **more})


def streamed(dry: bool) -> int:
    """Train under the cap, with the state in the host's memory."""
    from spu import DeviceManager, ModelParallelTrainer

    cap(dry)
    shape, rows, tokens = (SMALL, 8, 16) if dry else (SHAPE, ROWS, TOKENS)
    trainer = ModelParallelTrainer(
        model(shape),
        # A tenth of the limit is left to the allocator's gaps and to what kernels take.
        DeviceManager(None if dry else "cuda:0=7.2GB").get_devices("cpu" if dry else "cuda:0"),
        tiers=f"disk={os.environ.get('SPU_LEASE_OUT', '/tmp')}:1GB" if dry else "cpu=64GB",
        residency="streamed", precision="fp32" if dry else "fp16", microbatches=MICROBATCHES, lr=1e-4,
        max_grad_norm=1.0,
    )  # fmt: skip
    losses: list[float] = []
    seconds: list[float] = []
    for x, y in batches(STEPS, rows, tokens, shape["vocab_size"]):
        begin = time.perf_counter()
        losses.append(float(trainer.step(x, y).loss))
        seconds.append(time.perf_counter() - begin)
        plan = trainer.plan
        assert plan is not None
        bottleneck = None if plan.streaming is None else plan.streaming.bottleneck
        _report("spu, streamed, 8 GiB", seconds, losses, rows * tokens, dry, predicted_step_s=plan.predicted.step_s,
                predicted_peak_bytes=plan.predicted.peak_bytes[0], bottleneck=bottleneck)  # fmt: skip
    print(trainer.compare())
    trainer.close()
    return 0


def recorded_step(small: bool) -> None:
    """Run a step whose kernels are recorded: one layer, and a vocabulary that is small enough for a desk and whose
    products are of the same class; one microbatch of the cap's size.
    """
    import spu.ops
    from spu import ModelParallelTrainer

    vocabulary, layers = {"vocab_size": 92544 // 5 // 128 * 128}, {"num_hidden_layers": 1}
    shape = {**SMALL, **layers} if small else {**SHAPE, **vocabulary, **layers}
    rows, tokens = (1, 16) if small else (ROWS // MICROBATCHES, TOKENS)
    with spu.ops.use_backend("triton"):
        trainer = ModelParallelTrainer(
            model(shape), ["cpu"], precision="fp16", microbatches=1, lr=1e-4, max_grad_norm=1.0
        )
        x, y = batches(1, rows, tokens, shape["vocab_size"])[0]
        trainer.step(x, y)
        trainer.close()


def _steps(by: str, made: nn.Module, optimizer: Any, scaler: Any, device: str, dry: bool, dtype: torch.dtype) -> int:
    """Train in plain torch; the same batches and microbatches."""
    shape, rows, tokens = (SMALL, 8, 16) if dry else (SHAPE, ROWS, TOKENS)
    losses: list[float] = []
    seconds: list[float] = []
    for x, y in batches(STEPS, rows, tokens, shape["vocab_size"]):
        begin, total = time.perf_counter(), 0.0
        for part, target in zip(x.to(device).chunk(MICROBATCHES), y.to(device).chunk(MICROBATCHES)):
            with torch.autocast(device, dtype, enabled=not dry):
                logits = made(input_ids=part, use_cache=False).logits
                loss: Tensor = (
                    nn.functional.cross_entropy(logits.float().flatten(0, 1), target.flatten()) / MICROBATCHES
                )
            (loss if scaler is None else scaler.scale(loss)).backward()
            total += float(loss.detach())
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        _ = optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if not dry:
            torch.cuda.synchronize()
        losses.append(total)
        seconds.append(time.perf_counter() - begin)
        _report(by, seconds, losses, rows * tokens, dry)
    return 0


def fsdp2(dry: bool) -> int:
    """FSDP2 on one card: every layer is brought in for its use, gradients and AdamW are the host's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    cap(dry)
    device = "cpu" if dry else "cuda"
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.environ.get("SPU_LEASE_PORT", "29517")}
    dist.init_process_group("gloo" if dry else "cpu:gloo,cuda:nccl", rank=0, world_size=1)
    try:
        made = model(SMALL if dry else SHAPE)
        made.gradient_checkpointing_enable()
        mesh = init_device_mesh(device, (1,))
        options: dict[str, Any] = {"mesh": mesh}
        if not dry:
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
            options["offload_policy"] = CPUOffloadPolicy()
        for layer in made.model.layers:
            fully_shard(layer, **options)
        fully_shard(made, **options)
        made.train()
        optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4, fused=True)
        return _steps("FSDP2, CPU offload, 8 GiB", made, optimizer, None, device, dry, torch.bfloat16)
    finally:
        dist.destroy_process_group()


def resident(dry: bool) -> int:
    """Plain torch with the whole card: fp32 weights, autocast, GradScaler, fused AdamW."""
    device = "cpu" if dry else "cuda"
    made = model(SMALL if dry else SHAPE).to(device)
    made.train()
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=not dry)
    return _steps("torch autocast, resident, no cap", made, optimizer, scaler, device, dry, torch.float16)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train internlm2-1.8b's shapes under a cap of 8 GiB, and beside it.")
    parser.add_argument("part", choices=("streamed", "fsdp2", "resident"))
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    return {"streamed": streamed, "fsdp2": fsdp2, "resident": resident}[options.part](options.dry)


if __name__ == "__main__":
    sys.exit(main())
