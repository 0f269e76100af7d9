#!/usr/bin/env bash
# The commands of docs/guides/fine-tune-internlm2.md for your own folder and text: plan, train adapters, try, merge.
#
#   examples/fine_tune.sh FOLDER DATA [NAME]        FOLDER: weights as safetensors and their tokenizer
#
# BUDGET=cuda:0=8GB,cpu=32GB   LORA=16   SEQ=2048   may be set; run it again to go on after a stop.
set -eu
folder=$1 data=$2 name=${3:-mine}
budget=${BUDGET:-cuda:0=8GB,cpu=32GB} lora=${LORA:-16} seq=${SEQ:-2048}

spu plan --model "$folder" --lora "$lora" --seq "$seq" --budget "$budget" --out "$name-plan.json"
spu train --model "$folder" --data "$data" --lora "$lora" --seq "$seq" --budget "$budget" --lr 2e-4 \
    --eval-every 50 --patience 4 --export best --name "$name" --resume auto
echo "Hello" | spu chat "$name"
spu merge "$name" --out "$name-merged"
