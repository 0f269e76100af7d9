#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: whether the Trainer decays a norm's weight depends on what the norm is called.
#
# The Trainer leaves biases and norms out of weight decay. torch's LayerNorm it knows by its class, all others by name:
# "layernorm", "rmsnorm", "norm", or a name that ends in "_norm". Mamba's layers have a "norm", but the last one is a
# "norm_f"; xLSTM has "norm_mlstm" and "norm_ffn", the image part of Qwen2.5-VL "norm1", "norm2" and "ln_q" (its text part
# has names that count). Those shrink towards 0 beside norms of the same model that do not, and nothing says so.
#
# Seen (decayed norms of all norms): Llama 0 of 3; Mamba 1 of 2: norm_f; xLSTM 2 of 4: norm_mlstm, norm_ffn; Qwen2.5-VL's
# image part 5 of 5
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.24.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import transformers
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

small = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1}
heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}
models = {
    "Llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, **heads)),
    "Mamba": transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=4)),
    "xLSTM": transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**small, num_heads=1)),
    "Qwen2.5-VL": Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(depth=2, hidden_size=8, num_heads=1, intermediate_size=8, out_hidden_size=8)
    ),
}
arguments = transformers.TrainingArguments(output_dir="out", use_cpu=True, report_to=[], weight_decay=0.1)
for name, model in models.items():
    norms = [path for path, module in model.named_modules() if "Norm" in type(module).__name__]
    optimizer = transformers.Trainer(model, arguments).create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    found = [path for path in norms if id(model.get_submodule(path).weight) in decayed]
    print(name, f"{len(found)} of {len(norms)}:", *found)
    assert (len(found), len(norms)) == {"Llama": (0, 3), "Mamba": (1, 2), "xLSTM": (2, 4), "Qwen2.5-VL": (5, 5)}[name], name
PY
