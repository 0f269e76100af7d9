#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: evaluate() before train() with bf16_full_eval=True trains bf16 weights.
#
# bf16_full_eval is an option of the evaluation, "full bfloat16 evaluation instead of 32-bit". Outside a training evaluate()
# casts the model itself, and nothing casts it back. So the usual look at the loss before the first step decides what is
# trained: AdamW then steps 16-bit weights, which small updates do not move, with no master copy and no autocast, and what
# is saved is bf16. Within a training the option does nothing: the same evaluation between two steps runs in fp32. No
# warning says either. fp16_full_eval is the same with fp16.
#
# Seen, 20 steps of lr 1e-6, dtype of the weights after training and share of them that moved: without evaluate() first float32,
# 100%; with it bfloat16, 2.0%; with it and bf16_full_eval=False float32, 100%
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


def trained(evaluate_first, full_eval):
    """Return the dtype of the weights after a training, and the share that moved."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (80, 8))]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=20,
            per_device_train_batch_size=4,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            bf16_full_eval=full_eval,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8])
        if evaluate_first:
            trainer.evaluate()
        before = model.lm_head.weight.detach().clone()
        trainer.train()
    weight = model.lm_head.weight
    return weight.dtype, (weight != before).float().mean().item()


for first, full, dtype, low, high in (
    (False, True, torch.float32, 0.9, 1.0),
    (True, True, torch.bfloat16, 0.0, 0.1),
    (True, False, torch.float32, 0.9, 1.0),
):
    kind, moved = trained(first, full)
    print(f"evaluate() first {first}, bf16_full_eval {full}: {kind}, {moved:.1%} of the weights moved")
    assert kind == dtype and low <= moved <= high
PY
