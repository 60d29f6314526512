#!/usr/bin/env bash
# Full fine-tuning, LoRA or Q-LoRA by flag: the page finetune_ds.sh, finetune_lora_ds.sh or finetune_qlora_ds.sh with its
# learning rate (full 1e-5, LoRA and Q-LoRA 3e-4) and its DeepSpeed file, but 2 samples x 8 steps also for full.
#
#   bash finetune/finetune.sh -m Qwen/Qwen2.5-7B -d train.jsonl --deepspeed ds_config_zero3.json
#   bash finetune/finetune.sh -m Qwen/Qwen2.5-7B -d train.jsonl --deepspeed ds_config_zero2.json --use_lora True
#   bash finetune/finetune.sh -m Qwen/Qwen2.5-7B-Instruct -d train.jsonl --q_lora True
set -euo pipefail

method() { # as finetune.py reads the flags: the last one counts, without a value it means True
    local use_lora='' q_lora='' name value
    while (($#)); do
        name=${1%%=*} value=${2-}
        [[ $1 != *=* ]] || value=${1#*=}
        [[ $value && $value != -* ]] || value=true
        case ${name//-/_} in
            __use_lora) use_lora=$value ;;
            __q_lora) q_lora=$value ;;
        esac
        shift
    done
    shopt -s nocasematch
    if [[ $q_lora =~ ^(true|t|yes|y|1)$ ]]; then
        echo qlora_ds
    elif [[ $use_lora =~ ^(true|t|yes|y|1)$ ]]; then
        echo lora_ds
    else
        echo ds
    fi
}

# shellcheck source=finetune/finetune_ds.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/finetune_$(method "$@").sh" \
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 "$@"
