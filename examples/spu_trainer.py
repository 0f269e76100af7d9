"""A script for transformers.Trainer, with its class changed: the model streams from a disk.

pip install accelerate; python examples/spu_trainer.py
"""

from __future__ import annotations

import torch
import transformers

from spu.integrations import SpuTrainer

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
)
model = transformers.LlamaForCausalLM(config)
text = torch.frombuffer(bytearray(__doc__ * 20, "utf-8"), dtype=torch.uint8).long()  # every byte is a token
rows = [{"input_ids": row, "labels": row} for row in text[: len(text) // 32 * 32].view(-1, 32)]

trainer = SpuTrainer(
    model,
    transformers.TrainingArguments(
        "spu-trainer-example",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=3,
        learning_rate=3e-3,
        warmup_steps=5,
        bf16=True,
        eval_strategy="epoch",
        logging_steps=5,
        use_cpu=True,
        report_to=[],
    ),
    train_dataset=rows,
    eval_dataset=rows[:8],
    spu={"residency": "streamed", "tiers": "disk=spu-trainer-example/spill:1GB"},
)
trainer.train()
