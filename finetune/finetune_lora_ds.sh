#!/usr/bin/env bash
# LoRA with DeepSpeed ZeRO-2: small adapters are trained beside a frozen model, of which every GPU holds a copy. A model
# that does not fit on one GPU is split with --deepspeed ds_config_zero3.json.
#
#   bash finetune/finetune_lora_ds.sh -m Qwen/Qwen2.5-7B-Instruct -d train.jsonl
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 bash finetune/finetune_lora_ds.sh -d train.jsonl   # NODE_RANK=1 on the other
set -euo pipefail
# shellcheck source=finetune/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

launch "${RECIPE[@]}" \
    --model_name_or_path Qwen/Qwen2.5-7B \
    --use_lora True \
    --learning_rate 3e-4 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --deepspeed "$ROOT/ds_config_zero2.json" \
    "$@"
