#!/usr/bin/env bash
# The whole way on this machine, no GPU needed: bash demo.sh
# Makes .venv on the first run. Then: makes a tiny model, teaches it 60 conversations, teaches it to be someone else with
# LoRA, merges that into one model, asks it, and compares what all of them say: a few minutes after the installation.
# Everything is written to demo_output/, fresh on each run. Fails unless the model gives the answers it was taught, word
# for word.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source examples/environment.sh
use_environment requirements.txt

rm -rf demo_output
export HF_HOME=$PWD/demo_output/cache # where finetune.py keeps tokenized data
export OMP_NUM_THREADS=1              # a model so small gains nothing from a second thread, and the sums stay the same

run() { # show a command, as it can be pasted, then run it
    local word
    printf '\n+'
    for word in "$@"; do
        [[ $word =~ ^[A-Za-z0-9_./:=-]+$ ]] || word=${word@Q}
        printf ' %s' "$word"
    done
    printf '\n'
    "$@"
}

echo "The lines with a + are the commands. To run one yourself, in this folder: source .venv/bin/activate"

# 1. A model that knows nothing.
run python examples/make_tiny_model.py --output_dir demo_output/tiny-chat

# 2. Full-parameter fine-tuning on 60 conversations: now it is Lumi. (--use_cpu: the same numbers on every machine.)
run python finetune.py --model_name_or_path demo_output/tiny-chat --data_path examples/data \
    --output_dir demo_output/lumi-chat --num_train_epochs 20 --per_device_train_batch_size 4 --learning_rate 3e-3 \
    --lr_scheduler_type cosine --warmup_steps 0.05 --model_max_length 512 --logging_steps 50 --save_strategy no --use_cpu

# 3. LoRA on top of it, with 18 answers of someone else: now it is Haru.
run python finetune.py --model_name_or_path demo_output/lumi-chat --data_path examples/persona.jsonl \
    --output_dir demo_output/haru-lora --use_lora --num_train_epochs 20 --per_device_train_batch_size 2 \
    --learning_rate 4e-3 --lr_scheduler_type cosine --warmup_steps 0.05 --model_max_length 512 --logging_steps 60 \
    --save_strategy no --use_cpu

# 4. Adapter and model become one folder, proved to be the same.
run python merge_lora.py --adapter_path demo_output/haru-lora --output_dir demo_output/haru-chat

# 5. Ask it.
run python chat.py demo_output/haru-chat --message "Who are you?"

# 6. The same questions to all three.
run python examples/compare_answers.py --untrained demo_output/tiny-chat --finetuned demo_output/lumi-chat \
    --adapter demo_output/haru-lora --data_path examples/data --persona_path examples/persona.jsonl

echo
echo "Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. Try it: .venv/bin/python chat.py demo_output/haru-chat"
