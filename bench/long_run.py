"""Does a long run grow? Memory, open files and threads of one process over many steps.

  python bench/long_run.py --steps 20000

A tiny model is trained with LoRA, evaluated and saved every 500 steps; every tenth of the run is a line. The last is
held against the second, when everything has been done once. Exits with 1 if memory grew by more than 2 % or anything
else by more than nothing.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mechanisms.quiet import silence  # noqa: E402

silence()

import psutil  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import finetune  # noqa: E402
from examples.make_tiny_model import EXAMPLES, example_texts, make_tiny_model  # noqa: E402


class Watch(TrainerCallback):
    """Prints what the process holds, ten times in a run; `seen` keeps it."""

    def __init__(self):
        self.seen, self.process = [], psutil.Process()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (state.max_steps // 10) == 0:
            held = self.process.memory_info().rss / 1e6, self.process.num_fds(), self.process.num_threads()
            self.seen.append(held)
            print(f"step {state.global_step:>6,}: {held[0]:,.1f} MB, {held[1]} open files, {held[2]} threads",
                  flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    steps, watch = parser.parse_args().steps, Watch()
    plain = finetune.SafeTrainer.__init__
    finetune.SafeTrainer.__init__ = lambda self, *args, **kwargs: (
        plain(self, *args, **kwargs), self.add_callback(watch))[0]
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(Path(folder, "model-instruct"), example_texts(), num_layers=2, hidden_size=32)
        finetune.train([str(word) for word in [
            "--model_name_or_path", Path(folder, "model-instruct"), "--data_path", EXAMPLES / "data", "--output_dir",
            Path(folder, "out"), "--cache_dir", Path(folder, "cache"), "--use_lora", "True", "--lora_r", 4,
            "--max_steps", steps, "--save_steps", 500, "--save_total_limit", 2, "--logging_steps", 500,
            "--eval_ratio", 0.1, "--eval_strategy", "steps", "--eval_steps", 500,
            "--per_device_train_batch_size", 1]])
    (early, *others), (late, *others_late) = watch.seen[1], watch.seen[-1]
    print(f"memory {late / early - 1:+.2%}, open files and threads {others} -> {others_late}")
    sys.exit(late > 1.02 * early or others_late > others)


if __name__ == "__main__":
    main()
