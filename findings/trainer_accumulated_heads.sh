#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: gradient accumulation of n makes many models' gradients n times too large.
#
# The Trainer tells a model how many labels the whole accumulated batch has, so that each part's loss is its share, and
# leaves the division to the model wherever its forward takes **kwargs, as most do. Decoders that predict the next token
# divide by that number. Others take it, and return a mean as before; n means are added, and the gradient, the logged loss
# and the norm that is clipped are n times those of the same rows in one batch. Classifiers of sequences and of tokens,
# masked models, T5 and BART are among them, question answering is not. With label_smoothing_factor the Trainer computes
# the loss itself, and all are right. Adam hides a constant factor; clipping, SGD and a changed n do not.
#
# Seen, norm of the gradient with n = 4 over that with n = 1 (loss of each): Llama next token 1.00 (3.47, 3.47), Llama
# sequences 4.00 (1.08, 4.32), Llama tokens 4.00 (1.10, 4.39), Llama answers 1.00 (1.80, 1.80), BERT sequences 4.00 (1.10,
# 4.40), BERT masked 4.00 (3.47, 13.87), T5 4.00 (4.39, 17.56)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import torch
import transformers

torch.set_num_threads(1)
ids = torch.randint(3, 32, (8, 6), generator=torch.Generator().manual_seed(0))
shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
llama = transformers.LlamaConfig(**shape, num_labels=3, pad_token_id=0)
bert = transformers.BertConfig(**shape, num_labels=3, **off)
t5 = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0)
t5.decoder_start_token_id = 0
words, classes = {"labels": ids}, {"labels": ids[:, 0] % 3}
places = {"start_positions": ids[:, 0] % 3, "end_positions": ids[:, 0] % 6}
models = {
    "Llama next token": (transformers.LlamaForCausalLM, llama, words, 1),
    "Llama sequences": (transformers.LlamaForSequenceClassification, llama, classes, 4),
    "Llama tokens": (transformers.LlamaForTokenClassification, llama, {"labels": ids % 3}, 4),
    "Llama answers": (transformers.LlamaForQuestionAnswering, llama, places, 1),
    "BERT sequences": (transformers.BertForSequenceClassification, bert, classes, 4),
    "BERT masked": (transformers.BertForMaskedLM, bert, words, 4),
    "T5": (transformers.T5ForConditionalGeneration, t5, words, 4),
}


class Norm(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()


def train(kind, config, targets, n):
    torch.manual_seed(0)
    rows = [{"input_ids": ids[i], **{name: target[i] for name, target in targets.items()}} for i in range(8)]
    arguments = transformers.TrainingArguments(
        output_dir="out", use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=8 // n, gradient_accumulation_steps=n, max_steps=1, max_grad_norm=0,
        remove_unused_columns=False,
    )
    norm = Norm()
    trainer = transformers.Trainer(kind(config), arguments, train_dataset=rows, callbacks=[norm])
    loss = trainer.train().training_loss
    return norm.norm, loss


transformers.logging.set_verbosity_error()
for name, (kind, config, targets, expected) in models.items():
    (whole, loss), (parts, summed) = train(kind, config, targets, 1), train(kind, config, targets, 4)
    print(f"{name:16} gradient {parts / whole:.2f} times that of one batch; loss {loss:.2f} and {summed:.2f}")
    assert abs(parts / whole - expected) < 0.01 and abs(summed / loss - expected) < 0.01, name
PY
