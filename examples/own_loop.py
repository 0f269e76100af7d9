"""A training loop of your own around the trainer: batches, learning rate, validation, checkpoints, the trained model.

The examples of docs/guides/own-loop.md in one script; it writes the folders `checkpoint` and `model`.

    python examples/own_loop.py
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from spu import ModelParallelTrainer
from spu.optim import AdamW
from spu.train.evaluate import mean_over_targets, perplexity
from spu.train.lr import lr_factor

torch.manual_seed(0)
config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(config)  # or from_pretrained(folder)

text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 40), dtype=torch.uint8).long()


def batch(step: int, rows: int = 8, seq: int = 32):
    starts = torch.randint(len(text) - seq, (rows,), generator=torch.Generator().manual_seed(step))
    window = text[starts[:, None] + torch.arange(seq + 1)]
    inputs, targets = window[:, :-1], window[:, 1:].clone()
    targets[:, :4] = -100  # no loss there: a prompt, or padding
    return {"input_ids": inputs}, targets


STEPS = 12
trainer = ModelParallelTrainer(
    model,
    devices=["cpu:0", "cpu:1"],  # or ["cuda:0", "cpu"], or "auto"
    precision="bf16",
    microbatches=4,
    optimizer=partial(AdamW, lr=5e-3, weight_decay=0.1),
    lr_schedule=lambda step: lr_factor(step, STEPS, schedule="cosine", warm=2, final=0.1),
    max_grad_norm=1.0,
)
losses = []
for step in range(STEPS):
    result = trainer.step(*batch(step))
    losses.append(result.loss)
print(f"{losses[0]:.3f} -> {losses[-1]:.3f}, {result.tokens_per_s:,.0f} tokens/s")
assert losses[-1] < losses[0]

val_loss = mean_over_targets(trainer.evaluate, [batch(1000), batch(1001, rows=3)])  # a short batch weighs what it has
print(f"validation {val_loss:.3f}, perplexity {perplexity(val_loss):.1f} a byte")
assert math.isfinite(val_loss)

trainer.save("checkpoint", extra={"note": "anything that JSON holds"})
expected = trainer.step(*batch(STEPS)).loss
trainer.close()

again = ModelParallelTrainer(
    LlamaForCausalLM(config),
    devices=["cpu:0", "cpu:1"],
    precision="bf16",
    microbatches=4,
    optimizer=partial(AdamW, lr=5e-3, weight_decay=0.1),
    lr_schedule=lambda step: lr_factor(step, STEPS, schedule="cosine", warm=2, final=0.1),
    max_grad_norm=1.0,
)
again.prepare(*batch(0))  # plans and builds; trains nothing
note = again.load("checkpoint")["note"]
assert again.steps_done == STEPS
assert again.step(*batch(again.steps_done)).loss == expected, "the same step, to the last bit"

exact = LlamaForCausalLM(config)
averaged = AveragedModel(exact, multi_avg_fn=get_ema_multi_avg_fn(0.9))
for step in range(again.steps_done, again.steps_done + 4):
    again.step(*batch(step))
    exact.load_state_dict(again.state_dict_for_model())  # a copy of the weights; every tenth step may be enough
    averaged.update_parameters(exact)
assert all(value.dtype == torch.float32 for value in averaged.parameters())

state = again.state_dict_for_model()  # full precision, on the CPU, by the model's own names
again.close()
plain = LlamaForCausalLM(config)
plain.load_state_dict(state)
plain.save_pretrained("model")

other = ModelParallelTrainer(plain, devices=["cpu:0"], precision="fp32", microbatches=2, lr=1e-3)
loss, _ = other.forward_backward(*batch(3), keep_outputs=False)
norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
assert bool(norm.isfinite())
other.close()
