"""What ends a run before its last step: a signal or a file that asks for it, or an eval loss that gets no better."""

import contextlib
import os
import sys

import torch
from transformers import TrainerCallback

from mechanisms.checkpoints import MANIFEST
from mechanisms.console import say
from mechanisms.signals import SAVE, exit_code, name_of, requests, silence_broken_pipes

SAVE_NOW = "save_now"  # a file in the output folder


class SaveOnRequest(TrainerCallback):
    """Saves a checkpoint after the step in which a signal has come to any rank, or OUTPUT/save_now has appeared.

    For SIGUSR1 and the file, which is removed then, training goes on. For SIGUSR2, SIGTERM and SIGINT the program ends
    with exit code 0, 143 and 130: SystemExit comes out of `Trainer.train`.
    """

    def __init__(self):
        self.request = 0  # what all ranks have agreed on, until it is done
        self.by_file = False

    def on_train_begin(self, args, state, control, **kwargs):
        requests.keep()

    def on_step_end(self, args, state, control, **kwargs):
        self.request = max(self.request, self.agree(args, state))
        if self.request > SAVE:
            silence_broken_pipes()
        # What an epoch ends with comes before the checkpoint, or the run that goes on from it would not do it.
        at_the_end = state.epoch.is_integer() and "epoch" in (args.eval_strategy, args.save_strategy)
        control.should_save |= self.request > 0 and not at_the_end

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.request > 0

    def on_save(self, args, state, control, **kwargs):
        request, self.request = self.request, 0
        if not request:
            return
        checkpoint, saved = f"checkpoint-{state.global_step}", True
        if state.is_world_process_zero:
            saved = os.path.exists(os.path.join(args.output_dir, checkpoint, MANIFEST))
        if self.by_file:
            with contextlib.suppress(FileNotFoundError):  # taken back meanwhile
                os.remove(os.path.join(args.output_dir, SAVE_NOW))
        line = f"{checkpoint} is {'complete' if saved else 'not complete'}"
        if request == SAVE:
            say(f"Saved as asked: {line}, training goes on")
        else:
            say(f"Ended by {name_of(request)}: {line}, the same command resumes")
            if torch.distributed.is_initialized():  # an interpreter that ends with open connections may abort
                torch.distributed.destroy_process_group()
            sys.exit(exit_code(request) if saved else 1)

    def on_train_end(self, args, state, control, **kwargs):
        requests.end()

    def agree(self, args, state):
        """The strongest request on any rank."""
        request = requests.take()
        self.by_file = state.is_world_process_zero and os.path.isfile(os.path.join(args.output_dir, SAVE_NOW))
        if self.by_file:
            request = max(request, SAVE)
        if args.world_size > 1:
            strongest = torch.tensor(request, dtype=torch.int32, device=args.device)
            torch.distributed.all_reduce(strongest, torch.distributed.ReduceOp.MAX)
            request = strongest.item()
        return request


class EarlyStopping(TrainerCallback):
    """Stops after --early_stopping evaluations in a row without a lower loss than before.

    transformers' own counts them in itself, and a resumed run would begin to count anew; here they are read off the
    history, which is in every checkpoint.
    """

    def look(self, args, state, control, **kwargs):
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry and "result" not in entry]
        since_best = len(losses) - 1 - losses.index(min(losses)) if losses else 0
        if since_best >= args.early_stopping and not control.should_training_stop:
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no" and state.global_step > 0
            say(f"Stopped early: {since_best} evaluations without an eval loss below {min(losses):.4f}")

    on_train_begin = on_evaluate = look
