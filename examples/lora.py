"""Train LoRA adapters in a pipeline over two CPU devices, save them in peft's format, and load them with peft.

pip install peft; python examples/lora.py
"""

from __future__ import annotations

import peft
import torch
import transformers

import spu

torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0
)
base = transformers.LlamaForCausalLM(config)  # yours: AutoModelForCausalLM.from_pretrained(...)
base.save_pretrained("lora-example/base")
model = peft.get_peft_model(base, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
model.print_trainable_parameters()

text = torch.frombuffer(bytearray(__doc__, "utf-8"), dtype=torch.uint8).long()  # every byte is a token
starts = torch.randint(len(text) - 32, (64, 8))

with spu.ModelParallelTrainer(model, ["cpu:0", "cpu:1"], lr=1e-2, precision="bf16", shift=True) as trainer:
    for step, rows in enumerate(starts):
        ids = text[rows[:, None] + torch.arange(32)]
        result = trainer.step({"input_ids": ids, "labels": ids})
        if step % 16 == 0:
            print(f"step {step:3d}  loss {result.loss:.4f}")
    spu.save_adapter(trainer, "lora-example/adapter")

again = transformers.AutoModelForCausalLM.from_pretrained("lora-example/base")
tuned = peft.PeftModel.from_pretrained(again, "lora-example/adapter").eval()
print(f"loaded by peft: loss {tuned(input_ids=ids, labels=ids).loss.item():.4f}")
