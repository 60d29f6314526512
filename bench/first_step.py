"""Seconds from the command to the end of the first optimizer step: finetune.py beside a bare Trainer script.

  python bench/first_step.py

Both train the demo's tiny model on the example conversations, the bare script with the labels of every token; of
finetune.py the first start, which tokenizes, and the second, which finds the tokens. Every run is a process of its own;
median, least and most of all repetitions.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import median_and_range

ROOT = Path(__file__).resolve().parents[1]
BARE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

model_path, data, output_dir = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model_path)

class Said(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        print("step 1/1", flush=True)

def collate(samples):
    batch = tokenizer.pad({"input_ids": samples}, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch

samples = [tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False) for line in open(data)]
trainer = Trainer(AutoModelForCausalLM.from_pretrained(model_path), callbacks=[Said()], train_dataset=samples,
                  data_collator=collate, args=TrainingArguments(
                      output_dir, max_steps=1, per_device_train_batch_size=4, use_cpu=True, save_strategy="no"))
trainer.train()
"""


def seconds_to_first_step(command):
    began = time.time()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 1/1"):
                seconds = time.time() - began
        if run.wait():
            raise SystemExit(f"exit code {run.returncode}: {command}")
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5, help="(5)")
    repetitions = parser.parse_args().repetitions
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    data, names, found = "examples/data/messages.jsonl", ("bare Trainer", "first start", "second start"), {}
    with tempfile.TemporaryDirectory() as folder:
        model = os.path.join(folder, "tiny-chat")
        subprocess.run([sys.executable, "examples/make_tiny_model.py", "--output_dir", model], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        for repetition in range(repetitions):
            ours = [sys.executable, "finetune.py", "--model_name_or_path", model, "--data_path", data, "--max_steps",
                    "1", "--output_dir", os.path.join(folder, "out"), "--cache_dir",
                    os.path.join(folder, str(repetition)), "--per_device_train_batch_size", "4", "--use_cpu",
                    "--save_strategy", "no", "--model_max_length", "512", "--resume_from_checkpoint", "False"]
            bare = [sys.executable, "-c", BARE, model, data, os.path.join(folder, "bare")]
            for name, command in zip(names, (bare, ours, ours)):
                shutil.rmtree(os.path.join(folder, "out"), ignore_errors=True)
                found.setdefault(name, []).append(seconds_to_first_step(command))
                print(f"{name}: {found[name][-1]:.1f} s", file=sys.stderr, flush=True)
    print("| | seconds | x bare Trainer |\n|---|---|---|")
    for name in names:
        ratios = [own / other for own, other in zip(found[name], found[names[0]])]
        print(f"| {name} | {median_and_range(found[name])} | {median_and_range(ratios)} |")


if __name__ == "__main__":
    main()
