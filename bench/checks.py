"""What the checks cost: those of each step, and those of a checkpoint.

  python bench/checks.py

Prints, for a small model (8 layers of width 512), how long a step takes and how much of it is spent in the
checks for numbers that are not finite and for signals; then, for a checkpoint of 1.6 GB, how long it takes to write and
flush it to the disk, and to make its digests and look at every number; medians of the repetitions.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mechanisms.quiet import silence  # noqa: E402

silence()

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import Trainer  # noqa: E402

import finetune  # noqa: E402
from examples.make_tiny_model import EXAMPLES, example_texts, make_tiny_model  # noqa: E402
from mechanisms import stopping  # noqa: E402
from mechanisms import trainer as trainer_module  # noqa: E402
from mechanisms.finite import all_finite  # noqa: E402
from mechanisms.paths import digest_of, flush  # noqa: E402


class Clock:
    """Seconds spent in functions, without what they call of `inner`."""

    def __init__(self):
        self.seconds = 0.0

    def add(self, owner, name, sign=1):
        plain = getattr(owner, name)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return plain(*args, **kwargs)
            finally:
                self.seconds += sign * (time.perf_counter() - start)

        setattr(owner, name, timed)


def steps(folder):
    checks, all_steps = Clock(), Clock()
    checks.add(trainer_module, "lost_where_not_finite")
    checks.add(trainer_module.SafeTrainer, "_get_grad_norm")
    checks.add(Trainer, "_get_grad_norm", -1)  # Trainer's own part of it
    checks.add(stopping.SaveOnRequest, "on_step_end")
    all_steps.add(trainer_module.SafeTrainer, "_run_epoch")
    make_tiny_model(Path(folder, "model-instruct"), example_texts(), num_layers=8, hidden_size=512)
    trainer = finetune.train([str(word) for word in [
        "--model_name_or_path", Path(folder, "model-instruct"), "--data_path", EXAMPLES / "data", "--output_dir",
        Path(folder, "out"), "--cache_dir", Path(folder, "cache"), "--max_steps", 40, "--save_strategy", "no",
        "--per_device_train_batch_size", 4]])
    count = trainer.state.global_step
    return all_steps.seconds / count, checks.seconds / count


def save(folder):
    """Seconds for one checkpoint: (to write and flush it, to look through its numbers and make its digests)."""
    size, checkpoint = 1 << 27, os.path.join(folder, "checkpoint-1")
    weights, moments = {"weight": torch.randn(size)}, {"first": torch.randn(size), "second": torch.randn(size)}
    shutil.rmtree(checkpoint, ignore_errors=True)
    os.makedirs(checkpoint)
    files = [os.path.join(checkpoint, name) for name in ("model.safetensors", "optimizer.pt")]
    start = time.perf_counter()
    save_file(weights, files[0])
    torch.save(moments, files[1])
    for path in files:
        flush(path)
    flushed = time.perf_counter()
    if not all_finite([*weights.values(), *moments.values()]):
        raise ValueError("random numbers are finite")
    for path in files:
        digest_of(path)
    return flushed - start, time.perf_counter() - flushed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    repetitions = parser.parse_args().repetitions
    with tempfile.TemporaryDirectory() as folder:
        step, checks = steps(folder)
        saves = [save(folder) for _ in range(repetitions)]
    saved, checked = map(statistics.median, zip(*saves))
    print(f"a checkpoint of 1.6 GB takes {saved:.2f} s to write and flush, its checks {checked:.2f} s: "
          f"{1 + checked / saved:.2f} times")


if __name__ == "__main__":
    main()
