"""What is said while a run trains: a line for each log entry, of fewer than 80 columns."""

import time

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

HEADER_EVERY = 20  # lines


class Pace(TrainerCallback):
    """How fast it goes: tokens per second between two log entries, and the time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.since = self.step_end = time.monotonic()
        self.first_step, self.tokens = state.global_step, state.num_input_tokens_seen

    def on_step_end(self, args, state, control, **kwargs):
        self.step_end = time.monotonic()

    def leave_out(self, args, state, control, **kwargs):
        """Evaluations and checkpoints, which end here, are not training."""
        now = time.monotonic()
        self.since, self.step_end = self.since + now - self.step_end, now

    on_evaluate = on_save = leave_out

    def measure(self, args, state):
        """{"tokens_per_second" of all ranks, "memory": share of it that this rank has taken, "seconds_left"}."""
        now, tokens = time.monotonic(), state.num_input_tokens_seen - self.tokens
        speed = tokens / max(now - self.since, 1e-9)
        self.since, self.tokens = now, state.num_input_tokens_seen
        left = (now - self.start) / max(1, state.global_step - self.first_step) * (state.max_steps - state.global_step)
        return {"tokens_per_second": round(speed, 1), "memory": round(memory_share(args.device), 4),
                "seconds_left": round(left)}


def memory_share(device):
    """The most that this process has held of the GPU's memory; on a CPU, what it holds of the machine's now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / torch.cuda.get_device_properties(device).total_memory
    return psutil.Process().memory_info().rss / psutil.virtual_memory().total


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Lines:
    """Log entries of Trainer as lines of a table."""

    said = 0

    def lines(self, logs, state):
        step = f"step {state.global_step}/{state.max_steps}"
        if "eval_loss" in logs:
            earlier = [entry["eval_loss"] for entry in state.log_history[:-1] if "eval_loss" in entry]
            best = "" if not earlier else ", the best so far" if logs["eval_loss"] < min(earlier) else \
                f", best {min(earlier):.4f}"
            return [f"{step}  eval loss {logs['eval_loss']:.4f}{best}"]
        if "loss" not in logs:
            return []
        self.said += 1
        widest = len(f"step {state.max_steps}/{state.max_steps}")
        header = [f"{'':{widest}} {'loss':>9} {'lr':>9} {'grad':>8} {'tokens/s':>9} {'memory':>6} {'left':>9}"]
        return header * (self.said % HEADER_EVERY == 1) + [
            f"{step:{widest}} {_loss(logs['loss']):>9} {logs['learning_rate']:>9.3g} "
            f"{logs.get('grad_norm', float('nan')):>8.3g} {logs['tokens_per_second']:>9,.0f} {logs['memory']:>6.0%} "
            f"{duration(logs['seconds_left']):>9}"]


def _loss(loss):
    return f"{loss:.4f}" if loss < 100 else f"{loss:.4g}"


class ProgressBar(_Lines, ProgressCallback):
    """Trainer's own bar, with the lines above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            for line in self.lines(logs, state):
                self.training_bar.write(line)


class ProgressLines(_Lines, TrainerCallback):
    """The lines, for output that goes to a file."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            for line in self.lines(logs, state):
                print(line, flush=True)
