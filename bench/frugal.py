"""Does full fine-tuning with weights in bf16 learn what it learns in fp32?

  python bench/frugal.py                    # 500 steps at a learning rate of 1e-5, three seeds
  python bench/frugal.py --learning_rate 1e-4 --seeds 1

A tiny model learns examples/data, then a second persona at the small rate: in fp32; in bf16 as --trained_weights bf16
does it; and in bf16 with torch's AdamW, which rounds to the nearest. Held against each other is the loss on the
persona's records. Exits with 1 if stochastic rounding is more than 1 % off fp32, or plain bf16 is not.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mechanisms.quiet import silence  # noqa: E402

silence()

import torch  # noqa: E402

import finetune  # noqa: E402
from examples.make_tiny_model import EXAMPLES, example_texts, make_tiny_model  # noqa: E402
from mechanisms import frugal  # noqa: E402

WAYS = {"fp32, AdamW": ["--trained_weights", "fp32"], "bf16, stochastic rounding": ["--trained_weights", "bf16"],
        "bf16, AdamW": ["--trained_weights", "bf16"]}


def plain_adamw(training_args):
    return torch.optim.AdamW, {"lr": training_args.learning_rate, "weight_decay": 0.0}


def train(folder, model, out, data, *flags):
    return finetune.train([str(word) for word in [
        "--model_name_or_path", model, "--data_path", data, "--output_dir", folder / out, "--cache_dir",
        folder / "cache", "--per_device_train_batch_size", 8, "--save_strategy", "no", "--bf16", "--logging_steps",
        10_000, "--lr_scheduler_type", "constant", *flags]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--seeds", type=int, default=3)
    args, seeded = parser.parse_args(), frugal.optimizer
    persona, lines, off = EXAMPLES / "persona.jsonl", [], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_tiny_model(folder / "tiny-instruct", example_texts())
        train(folder, folder / "tiny-instruct", "learned", EXAMPLES / "data", "--max_steps", 120, "--learning_rate",
              "1e-3", "--trained_weights", "fp32")
        for seed in range(1, args.seeds + 1):
            after = {}
            for way, flags in WAYS.items():
                frugal.optimizer = plain_adamw if way == "bf16, AdamW" else seeded
                trainer = train(folder, folder / "learned", f"{way} {seed}", persona, "--max_steps", args.steps,
                                "--learning_rate", args.learning_rate, "--seed", seed, *flags, "--eval_data_path",
                                persona, "--eval_strategy", "steps", "--eval_steps", args.steps, "--eval_on_start")
                losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
                before, after[way] = losses[0], losses[-1]
                share = (before - after[way]) / (before - after["fp32, AdamW"])
                off.setdefault(way, []).append(after[way] / after["fp32, AdamW"] - 1)
                lines.append(f"| {seed} | {way} | {before:.4f} | {after[way]:.4f} | {off[way][-1]:+.2%} | "
                             f"{share:.1%} |")
    print("| seed | weights, optimizer | loss before | loss after | beside fp32 | share of fp32's improvement |\n"
          "|---|---|---|---|---|---|", *lines, sep="\n")
    sys.exit(max(map(abs, off["bf16, stochastic rounding"])) > 0.01 or min(map(abs, off["bf16, AdamW"])) < 0.01)


if __name__ == "__main__":
    main()
