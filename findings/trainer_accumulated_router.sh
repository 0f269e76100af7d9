#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: accumulation of n counts a mixture of experts' balance loss n times, smoothing never.
#
# With output_router_logits=True a model adds router_aux_loss_coef times its load-balancing loss to that of the tokens. The
# Trainer has the tokens' loss divided by the labels of the whole accumulated batch, but each part adds its whole balance
# loss, and nothing divides that: the coefficient that counts is n times the config's. With label_smoothing_factor > 0 the
# Trainer makes the loss from the logits alone, so there is no balance loss, whatever the coefficient. Two options that are
# not about experts change how experts are balanced, without a word.
#
# Seen, 8 equal rows (each part's balance loss is the batch's), coefficient 1, share of the loss and norm of its gradient in
# the routers: Mixtral, one batch 2.000 0.23892, 4 parts 8.001 0.95569, one batch with smoothing 0 0; Qwen2-MoE 1.996
# 0.27211, 7.985 1.08843, 0 0
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
row = torch.randint(32, (12,), generator=torch.Generator().manual_seed(0))
shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
shape |= {"intermediate_size": 16, "output_router_logits": True, "num_experts_per_tok": 2}
qwen = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
models = {
    "Mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig, {"num_local_experts": 4}),
    "Qwen2-MoE": (transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig, qwen),
}


class Routers(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        own = [p.grad.flatten() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")]
        self.gradient = torch.cat(own)


def train(kind, config, more, coefficient, n, smoothing):
    torch.manual_seed(0)
    model = kind(config(**shape, **more, router_aux_loss_coef=coefficient))
    arguments = transformers.TrainingArguments(
        output_dir="out", use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=8 // n, gradient_accumulation_steps=n, max_steps=1, max_grad_norm=0,
        label_smoothing_factor=smoothing,
    )
    routers = Routers()
    rows = [{"input_ids": row, "labels": row}] * 8
    loss = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[routers]).train().training_loss
    return loss, routers.gradient


transformers.logging.set_verbosity_error()
for name, model in models.items():
    found = {}
    for what, n, smoothing in (("one batch", 1, 0.0), ("4 parts", 4, 0.0), ("smoothing", 1, 0.1)):
        (loss, gradient), (without, tokens) = train(*model, 1.0, n, smoothing), train(*model, 0.0, n, smoothing)
        found[what] = loss - without, (gradient - tokens).norm().item()
        print(f"{name:9} {what}: balance loss {found[what][0]:.3f}, its gradient in the routers {found[what][1]:.5f}")
    for whole, parts, smooth in zip(found["one batch"], found["4 parts"], found["smoothing"]):
        assert abs(parts / whole - 4) < 0.01 and smooth == 0
PY
