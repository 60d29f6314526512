#!/usr/bin/env bash
# Q-LoRA on one GPU, without DeepSpeed: adapters are trained beside a model held in 4 bits. A 16-bit model is quantized
# to NF4 as it is loaded; a GPTQ model (Int4, Int8) is taken as it is. CUDA_VISIBLE_DEVICES chooses the GPU (default: 0).
#
#   bash finetune/finetune_qlora_single_gpu.sh -m Qwen/Qwen2.5-7B-Instruct -d train.jsonl
set -euo pipefail
# shellcheck source=finetune/launch.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/launch.sh"

launch_single "${RECIPE[@]}" \
    --model_name_or_path Qwen/Qwen2.5-7B-Instruct \
    --use_lora True \
    --q_lora True \
    --learning_rate 3e-4 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    "$@"
