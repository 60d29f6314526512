#!/usr/bin/env bash
# Q-LoRA with DeepSpeed ZeRO-2: adapters are trained beside a model held in 4 bits, of which every GPU holds a copy. A
# 16-bit model is quantized to NF4 as it is loaded; a GPTQ model (Int4, Int8) is taken as it is.
#
#   bash finetune/finetune_qlora_ds.sh -m Qwen/Qwen2.5-7B-Instruct -d train.jsonl
#   bash finetune/finetune_qlora_ds.sh -m Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4 -d train.jsonl
set -euo pipefail
# shellcheck source=finetune/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

launch "${RECIPE[@]}" \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --use_lora True \
    --q_lora True \
    --learning_rate 3e-4 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --deepspeed "$ROOT/ds_config_zero2.json" \
    "$@"
