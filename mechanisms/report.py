"""report.html and metrics.jsonl in the output folder: the run as it goes, for a browser and for programs.

Both are views of Trainer's log history, which every checkpoint holds: a resumed run goes on with the one of its
checkpoint, and what lay ahead of it is gone. Beside Trainer's own numbers, its entries have

  tokens_per_second, memory, seconds_left      see mechanisms/progress.py
  eval_loss_FILE      of each file, where there are several
  hardest      the held-out records with the highest loss: [{"place", "loss", "tokens", "text"}]
  answers      to sample questions: [{"question", "answer", "cut", "wanted"}]
  result      of which step the weights are, in an evaluation after training
  saved, resumed      true at the steps of checkpoints and of resumes
"""

import contextlib
import json
import math
import os
import time

from transformers import TrainerCallback

from mechanisms.console import say
from mechanisms.held_out import described
from mechanisms.progress import duration
from mechanisms.report_page import Status, page
from mechanisms.sample_answers import answers

PAGE, METRICS = "report.html", "metrics.jsonl"
SHARE = 0.02  # of the time of a run that writing them may take


class Report(TrainerCallback):
    """Keeps both files up to date, on the first rank. All ranks make the sample answers.

    about: `report_page.About`; questions: list of `sample_answers.Question`. `trainer` is the SafeTrainer that has it.
    """

    def __init__(self, about, questions):
        self.about, self.questions, self.trainer = about, questions, None
        self.state, self.again, self.failed = "training", 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.add(saved=True, resumed=True)
        if self.questions and not any("answers" in entry for entry in state.log_history):
            self.add(answers=answers(self.trainer, self.questions))
        self.write()

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() >= self.again:
            self.write()

    def on_save(self, args, state, control, **kwargs):
        if self.trainer.saved_step == state.global_step:
            self.add(saved=True)

    def on_evaluate(self, args, state, control, **kwargs):
        if not self.trainer.is_in_train:
            best = state.best_global_step if args.load_best_model_at_end else None
            self.add(result=best or state.global_step)
        self.add(hardest=described(self.trainer.hardest, self.trainer.eval_dataset, self.trainer.processing_class))
        if self.questions:
            self.add(answers=answers(self.trainer, self.questions))
        self.write()

    def on_train_end(self, args, state, control, **kwargs):
        if self.questions and not self.trainer.eval_dataset:  # else the evaluation of the result comes
            self.add(answers=answers(self.trainer, self.questions))

    def add(self, **values):
        """To the newest entry of the history if it is of this step, else to a new one."""
        history, step = self.trainer.state.log_history, self.trainer.state.global_step
        if not history or history[-1]["step"] != step:
            history.append({"step": step})
        history[-1].update(values)

    @contextlib.contextmanager
    def following(self):
        """While the run trains: where it ends otherwise than at its end, the page says why."""
        try:
            yield
        except BaseException as error:
            first_line = str(error).strip().partition("\n")[0]
            self.end({"0": "stopped as asked", "130": "interrupted", "143": "SIGTERM"}.get(first_line, first_line)
                     if isinstance(error, SystemExit) else first_line or type(error).__name__)
            raise

    def end(self, state):
        self.state = state
        self.write()

    def write(self):
        """A failure is said once and is no reason to end the run."""
        trainer, begin = self.trainer, time.monotonic()
        if not trainer.state.is_world_process_zero:
            return
        history, out = trainer.state.log_history, trainer.args.output_dir
        left = next((duration(entry["seconds_left"]) for entry in reversed(history) if "seconds_left" in entry), "")
        status = Status(self.state, trainer.state.max_steps, left, time.strftime("%Y-%m-%d %H:%M:%S %Z"))
        try:
            _replace(os.path.join(out, METRICS), "".join(json.dumps(_finite(entry), ensure_ascii=False) + "\n"
                                                         for entry in history))
            _replace(os.path.join(out, PAGE), page(history, self.about, status))
        except OSError as error:
            if not self.failed:
                say(f"note: {out}/{PAGE} is not written: {error.strerror}. Training goes on")
            self.failed = True
        now = time.monotonic()
        self.again = now + (now - begin) / SHARE


def _finite(entry):
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()}


def _replace(path, text):
    """Write a file so that a reader, and a kill, finds the whole of it or the whole of the one before."""
    with open(path + ".unfinished", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    os.replace(path + ".unfinished", path)
