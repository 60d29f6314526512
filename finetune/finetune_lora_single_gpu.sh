#!/usr/bin/env bash
# LoRA on one GPU, without DeepSpeed: small adapters are trained beside a frozen model. CUDA_VISIBLE_DEVICES chooses the
# GPU (default: 0).
#
#   bash finetune/finetune_lora_single_gpu.sh -m Qwen/Qwen2.5-1.5B-Instruct -d train.jsonl
set -euo pipefail
# shellcheck source=finetune/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

launch_single "${RECIPE[@]}" \
    --model_name_or_path Qwen/Qwen2.5-7B \
    --use_lora True \
    --learning_rate 3e-4 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    "$@"
