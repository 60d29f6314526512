"""What a run says: only rank 0 speaks; a bar on a terminal, plain lines in a log file."""

import os
import sys
import time

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


def say(*lines):
    """Print on the first rank of all nodes only."""
    if lines and int(os.environ.get("RANK", 0)) == 0:
        print(*lines, sep="\n", flush=True)


def table(rows):
    """[(name, value), ...] as aligned lines; numbers get thousands separators."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}" for name, value in rows)


def counted(items, what, unit):
    """Pass items on, with a running count and rate on a terminal, and a line every 30 s in a log file."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, unit=f" {unit}", leave=False)
        return
    start = said = time.time()
    for number, item in enumerate(items, 1):
        yield item
        if time.time() - said > 30:
            said = time.time()
            say(f"{what}: {number:,} {unit}, {number / (said - start):,.0f} {unit}/s")


def show_trained(tokenizer, input_ids, labels, limit=2000):
    """The sample as text, trained spans between [[ and ]] (green on a terminal), cut in the middle past `limit`."""
    green, plain = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("", "")
    pieces, start = [], 0
    trained = [label != -100 for label in labels]
    for end in range(1, len(trained) + 1):
        if end == len(trained) or trained[end] != trained[start]:
            text = tokenizer.decode(input_ids[start:end])
            if len(text) > limit:
                text = f"{text[:limit // 2]} ... {len(text) - limit} characters ... {text[-limit // 2:]}"
            pieces.append(f"{green}[[{text}]]{plain}" if trained[start] else text)
            start = end
    return "".join(pieces)


def _duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _line(logs, state):
    """A log entry of Trainer as one line."""
    parts = [f"step {state.global_step}/{state.max_steps}"]
    if "epoch" in logs:
        parts.append(f"epoch {logs['epoch']:.2f}")
    for key, name, form in (("loss", "loss", ".4f"), ("eval_loss", "eval_loss", ".4f"),
                            ("grad_norm", "grad_norm", ".4g"), ("learning_rate", "lr", ".3g"),
                            ("train_tokens_per_second", "tokens/s", ",.0f")):
        if key in logs:
            parts.append(f"{name} {logs[key]:{form}}")
    return "  ".join(parts)


class ProgressBar(ProgressCallback):
    """Trainer's own bar, with one readable line per log entry above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and ("loss" in logs or "eval_loss" in logs):
            self.training_bar.write(_line(logs, state))


class ProgressLines(TrainerCallback):
    """One line per log entry with the time left, for output that goes to a file."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first_step = time.time(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and ("loss" in logs or "eval_loss" in logs):
            line = _line(logs, state)
            done = state.global_step - self.first_step
            if done:
                left = (time.time() - self.start) / done * (state.max_steps - state.global_step)
                line += f"  left {_duration(left)}"
            print(line, flush=True)
