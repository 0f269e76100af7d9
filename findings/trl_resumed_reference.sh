#!/usr/bin/env bash
# trl 1.16.0 with transformers 5.24.0, torch 2.13.0: a DPO training that moves its reference resumes against the first reference.
#
# With sync_ref_model=True the reference model is drawn towards the trained one every few steps, so it is a part of the training's
# state, as an optimizer's moments are. The checkpoint has the model, optimizer, scheduler and random numbers, and one expects
# a resumed training to go on as the one that was not stopped. The reference is not in it. resume_from_checkpoint starts from the
# model that the trainer was made with, as at step 0, with no word of it: the loss falls at once, since the trained model has
# come far from that reference, and the gradients are others from there on. It is drawn along again, so that after some more
# steps there is nothing to see. With sync_ref_model=False the resumed losses are those of the unbroken training.
#
# Seen, losses of steps 5 to 8, unbroken and resumed at 4: moving reference 0.6739 0.6888 0.6763 0.6505, 0.6486 0.6238 0.6623
# 0.6368; fixed reference 0.6483 0.6244 0.6038 0.5803 both
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 \
  trl==1.16.0
cat > "$folder/resume.py" <<'PY'
import sys

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

transformers.logging.set_verbosity_error()
disable_progress_bars()
folder = sys.argv[1]
words = Tokenizer(models.WordLevel({word: n for n, word in enumerate("<pad> <eos> a b c d e".split())}, unk_token="a"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
rows = {"prompt": ["a b", "b c", "c d", "d e"], "chosen": [" c", " d", " e", " a"], "rejected": [" e", " a", " b", " c"]}
rows = Dataset.from_dict({name: 4 * values for name, values in rows.items()})
sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
tokens = {"vocab_size": 7, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(**sizes, **tokens)).save_pretrained(f"{folder}/base")


def losses(moving, resumed):
    """Return the losses of steps 5 to 8, of an unbroken training or one that resumes from its checkpoint at step 4."""
    out = f"{folder}/{'moving' if moving else 'fixed'}"
    args = DPOConfig(
        out,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=4,
        logging_steps=1,
        sync_ref_model=moving,
        ref_model_sync_steps=2,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(f"{folder}/base", args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-4" if resumed else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][4:]


seen = {moving: (losses(moving, False), losses(moving, True)) for moving in (True, False)}
for moving, (unbroken, resumed) in seen.items():
    name = "moving" if moving else "fixed"
    shown = [" ".join(f"{loss:.4f}" for loss in run) for run in (unbroken, resumed)]
    print(f"{name} reference: {shown[0]}, resumed {shown[1]}", file=sys.stderr)
    assert len(unbroken) == len(resumed) == 4
    if moving:
        assert unbroken[0] - resumed[0] > 0.01 and unbroken[3] - resumed[3] > 0.005
    else:
        assert max(abs(a - b) for a, b in zip(unbroken, resumed)) < 1e-3
PY
"$folder/venv/bin/python" -W ignore "$folder/resume.py" "$folder" 3>&1 >/dev/null 2>&3 | grep reference:
