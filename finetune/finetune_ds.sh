#!/usr/bin/env bash
# Full fine-tuning with DeepSpeed ZeRO-3: every weight is trained, and weights, gradients and optimizer are split over
# all GPUs. --deepspeed ds_config_zero3_offload.json keeps weights and optimizer in the CPU's memory instead: slower.
#
#   bash finetune/finetune_ds.sh -m Qwen/Qwen2.5-7B -d train.jsonl
#   bash finetune/finetune_ds.sh -m ./my-model -d 'data/*.jsonl' -o out --model_max_length 4096 --num_train_epochs 2
set -euo pipefail
# shellcheck source=finetune/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

launch "${RECIPE[@]}" \
    --model_name_or_path Qwen/Qwen2.5-7B \
    --learning_rate 1e-5 \
    --per_device_train_batch_size 1 \
    --gradient_accumulation_steps 16 \
    --deepspeed "$ROOT/ds_config_zero3.json" \
    "$@"
