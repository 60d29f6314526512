"""--dry_run: one step on the longest rows, saved, verified and loaded again, so that what will fail fails now."""

import os
import shutil
import time

import numpy as np
import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from mechanisms import checkpoints
from mechanisms.console import say, table
from mechanisms.data.datasets import Subset
from mechanisms.errors import UserError
from mechanisms.paths import size_of
from mechanisms.summary import items_per_step, step_count


def shorten(training_args, train_dataset, eval_dataset):
    """Change the arguments to those of a run of one step in a folder of its own, and return the data of that step."""
    training_args.planned_steps = step_count(training_args, train_dataset)
    training_args.output_dir = os.path.join(training_args.output_dir, "dry_run.unfinished")
    os.makedirs(training_args.output_dir, exist_ok=True)
    training_args.max_steps = training_args.save_steps = training_args.logging_steps = 1
    training_args.save_strategy, training_args.eval_strategy = SaveStrategy.STEPS, IntervalStrategy.NO
    training_args.load_best_model_at_end = False
    training_args.report_to = []
    evaluated = training_args.eval_batch_size * training_args.world_size
    return (_longest(train_dataset, items_per_step(training_args)),
            eval_dataset and _longest(eval_dataset, evaluated))


def _longest(dataset, items):
    """The longest items of a dataset; the first ones where lengths are not known."""
    order = np.arange(len(dataset)) if dataset.lengths is None else np.argsort(-dataset.lengths, kind="stable")
    return Subset(dataset, order[:items])


def prove(trainer, eval_dataset):
    """Train, save, verify, load and evaluate; say what that took, and leave nothing of it. Raises UserError."""
    args, start = trainer.args, time.monotonic()
    try:
        trainer.train()
        trained = time.monotonic()
        folder = os.path.join(args.output_dir, "checkpoint-1")
        if trainer.saved_step != 1:
            raise UserError("the checkpoint could not be saved (see the note above)")
        problem = checkpoints.read_manifest(folder)
        if isinstance(problem, str) and problem != checkpoints.ONLY_MODEL:
            raise UserError(f"the checkpoint was saved and is not whole: {problem}")
        if not isinstance(problem, str):
            trainer.load_again(folder)
        evaluated = trainer.evaluate() if eval_dataset else {}
        trainer.save_result()
        rows = [("tokens of the step", trainer.state.num_input_tokens_seen),
                ("one step and its checkpoint", f"{trained - start:.1f} s"),
                ("a checkpoint takes", f"{size_of(folder) / 1e9:.3g} GB"),
                ("steps of the whole run", args.planned_steps)]
        if args.device.type == "cuda":
            rows.append(("most memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"))
        if evaluated:
            rows.append(("eval loss", f"{evaluated['eval_loss']:.4f}"))
        say("", "Dry run: trained one step on the longest rows, saved, verified and loaded again:", table(rows))
    finally:
        trainer.accelerator.wait_for_everyone()
        if args.should_save:
            shutil.rmtree(args.output_dir, ignore_errors=True)
