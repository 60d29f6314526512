"""Each flag of transformers.TrainingArguments with another value than its default, and the effect that it must have.

`python -m tests.sweep flags` runs all of them, tests/runs/test_flags_work.py one of each group.
"""

import contextlib
import dataclasses
import functools
import glob
import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import transformers
from transformers import TrainerCallback

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import refusals, trainer, trials
from mechanisms.declarations import read_flags
from mechanisms.errors import UserError

FIELDS = [field.name for field in dataclasses.fields(transformers.TrainingArguments)]
FLAGS = {flag.name: flag for group in read_flags(finetune.__file__).values() for flag in group}
PLAIN = ("--max_steps 3 --logging_steps 1 --save_strategy no --per_device_train_batch_size 2 --model_max_length 256 "
         "--learning_rate 1e-3 --use_cpu")
EVALUATED = "--eval_ratio 0.2 --eval_strategy steps --eval_steps 1"
SAVED = "--save_strategy steps --save_steps 1"
BEST = f"{EVALUATED} {SAVED}"
TRACKED = "--report_to trackio"


class Run(NamedTuple):
    """A run that is over."""

    trainer: trainer.SafeTrainer
    folder: Path
    seen: dict  # what was watched while it ran

    def logged(self, key):
        return [entry[key] for entry in self.trainer.state.log_history if key in entry]

    @property
    def args(self):
        return self.trainer.args

    @property
    def weights(self):
        return torch.cat([weight.detach().flatten() for weight in self.trainer.model.parameters()])

    def checkpoints(self):
        return sorted(os.path.basename(path) for path in glob.glob(f"{self.folder}/checkpoint-*"))


class Case(NamedTuple):
    words: str  # the flag with its value, and others that it needs
    has_effect: Callable[[Run, Run], bool]  # of this run and one without the flag


class Tracker(TrainerCallback):
    """In place of a tracker's callback: notes what it is given."""

    seen = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"
        self.seen.update({name: getattr(args, name) for name in names}, **logs)


# -- effects ----------------------------------------------------------------------------------------------------------

def other_weights(run, plain):
    return not torch.equal(run.weights, plain.weights)


def other_losses(run, plain):
    return run.logged("loss") != plain.logged("loss")


def other_rates(run, plain):
    return run.logged("learning_rate") != plain.logged("learning_rate")


def logs(count):
    return lambda run, plain: len(run.logged("loss")) == count


def evaluations(count):
    return lambda run, plain: len(run.logged("eval_loss")) == count


def checkpoints(*steps):
    return lambda run, plain: run.checkpoints() == [f"checkpoint-{step}" for step in steps]


def loader(**expected):
    """Of torch's data loader for training."""
    return lambda run, plain: all(getattr(run.trainer.callback_handler.train_dataloader, name) == value
                                  for name, value in expected.items())


def handler(**expected):
    """Of the keyword arguments that DDP would get."""
    return lambda run, plain: all(getattr(run.trainer.accelerator.ddp_handler, name) == value
                                  for name, value in expected.items())


def tracked(**expected):
    return lambda run, plain: run.seen["tracker"].items() >= expected.items() and run.seen["tracker"]["loss"]


def on_another_node(run, read):
    """What the first rank of a second node reads off the arguments."""
    kind = transformers.TrainingArguments
    with mock.patch.object(kind, "process_index", 4), mock.patch.object(kind, "local_process_index", 0):
        return read(run.args)


def other_optimizer(run, plain):
    of_run, of_plain = ((type(each.trainer.optimizer.optimizer), each.trainer.optimizer.defaults)
                        for each in (run, plain))
    return of_run != of_plain and other_weights(run, plain)


CASES = {
    "output_dir": Case("", lambda run, plain: (run.folder / "model.safetensors").is_file()),
    "per_device_train_batch_size": Case("--per_device_train_batch_size 3",
                                        lambda run, plain: run.trainer.state.train_batch_size == 3),
    "num_train_epochs": Case("--max_steps -1 --per_device_train_batch_size 30 --num_train_epochs 2",
                             lambda run, plain: run.trainer.state.epoch == 2),
    "max_steps": Case("--max_steps 1", lambda run, plain: run.trainer.state.global_step == 1),
    "learning_rate": Case("--learning_rate 1e-2", other_rates),
    "lr_scheduler_type": Case("--lr_scheduler_type cosine", other_rates),
    "lr_scheduler_kwargs": Case('--lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":2.5}', other_rates),
    "warmup_steps": Case("--warmup_steps 1", other_rates),
    "optim": Case("--optim sgd", lambda run, plain: isinstance(run.trainer.optimizer.optimizer, torch.optim.SGD)),
    "optim_args": Case("--optim sgd --optim_args momentum=0.9",
                       lambda run, plain: run.trainer.optimizer.param_groups[0]["momentum"] == 0.9),
    "weight_decay": Case("--weight_decay 0.5", other_weights),
    "adam_beta1": Case("--adam_beta1 0.5", other_weights),
    "adam_beta2": Case("--adam_beta2 0.5", other_weights),
    "adam_epsilon": Case("--adam_epsilon 0.1", other_weights),
    "gradient_accumulation_steps": Case(
        "--gradient_accumulation_steps 2",
        lambda run, plain: run.trainer.state.num_input_tokens_seen > 1.5 * plain.trainer.state.num_input_tokens_seen),
    "max_grad_norm": Case("--max_grad_norm 0.01", other_weights),
    "label_smoothing_factor": Case("--label_smoothing_factor 0.1", other_losses),
    "bf16": Case("--bf16", lambda run, plain: run.trainer.accelerator.mixed_precision == "bf16"),
    "activation_checkpointing": Case("--gradient_checkpointing True",
                                     lambda run, plain: run.trainer.model.is_activation_checkpointing),
    "activation_checkpointing_kwargs": Case(
        '--gradient_checkpointing True --gradient_checkpointing_kwargs {"every_n_layers":2}',
        lambda run, plain: [layer.gradient_checkpointing for layer in run.trainer.model.model.layers].count(True) == 1),
    "torch_empty_cache_steps": Case("--torch_empty_cache_steps 1", lambda run, plain: run.seen["cache emptied"] == 3),
    "logging_strategy": Case("--logging_strategy epoch", logs(1)),
    "logging_steps": Case("--logging_steps 2", logs(2)),
    "logging_first_step": Case("--logging_steps 3 --logging_first_step", logs(2)),
    "log_on_each_node": Case("--no_log_on_each_node", lambda run, plain: [
        on_another_node(each, lambda args: args.should_log) for each in (run, plain)] == [False, True]),
    "log_level": Case("--log_level info", lambda run, plain: run.seen["verbosity"] == logging.INFO),
    "log_level_replica": Case("--no_log_on_each_node --log_level_replica error",
                              lambda run, plain: on_another_node(
                                  run, lambda args: args.get_process_log_level()) == logging.ERROR),
    "disable_tqdm": Case("--disable_tqdm False", lambda run, plain: any(
        type(callback) is trainer.ProgressBar for callback in run.trainer.callback_handler.callbacks)),
    "report_to": Case(TRACKED, tracked()),
    "run_name": Case(f"{TRACKED} --run_name a", tracked(run_name="a")),
    "project": Case(f"{TRACKED} --project a", tracked(project="a")),
    "trackio_space_id": Case(f"{TRACKED} --trackio_space_id a", tracked(trackio_space_id="a")),
    "trackio_bucket_id": Case(f"{TRACKED} --trackio_bucket_id a", tracked(trackio_bucket_id="a")),
    "trackio_static_space_id": Case(f"{TRACKED} --trackio_static_space_id a", tracked(trackio_static_space_id="a")),
    "eval_strategy": Case("--eval_ratio 0.2 --eval_strategy steps", evaluations(3)),  # as often as it logs
    "eval_steps": Case("--eval_ratio 0.2 --eval_strategy steps --eval_steps 2", evaluations(2)),  # and at the end
    "eval_delay": Case(f"{EVALUATED} --eval_delay 3", evaluations(1)),
    "eval_on_start": Case("--eval_ratio 0.2 --eval_on_start", evaluations(2)),  # and at the end
    "per_device_eval_batch_size": Case(
        f"{EVALUATED} --per_device_eval_batch_size 3",
        lambda run, plain: run.trainer.callback_handler.eval_dataloader.total_batch_size == 3),
    "do_train": Case("--do_train", lambda run, plain: run.trainer.state.global_step == 3),
    "do_eval": Case("--eval_ratio 0.2 --do_eval", evaluations(1)),
    "save_strategy": Case("--save_strategy epoch", checkpoints(3)),
    "save_steps": Case("--save_strategy steps --save_steps 2", checkpoints(2, 3)),  # and at the end
    "save_total_limit": Case(f"{SAVED} --save_total_limit 1", checkpoints(3)),
    "save_only_model": Case(f"{SAVED} --save_only_model",
                            lambda run, plain: not (run.folder / "checkpoint-2/optimizer.pt").exists()),
    "save_on_each_node": Case("--save_on_each_node", lambda run, plain: [
        on_another_node(each, lambda args: args.should_save) for each in (run, plain)] == [True, False]),
    "load_best_model_at_end": Case(
        f"{BEST} --load_best_model_at_end --learning_rate 10",
        lambda run, plain: run.trainer.evaluate()["eval_loss"] == min(run.logged("eval_loss")[:3])),
    "metric_for_best_model": Case(f"{BEST} --metric_for_best_model eval_loss",
                                  lambda run, plain: run.trainer.state.best_metric == min(run.logged("eval_loss"))),
    "greater_is_better": Case(f"{BEST} --metric_for_best_model loss --greater_is_better False",
                              lambda run, plain: run.trainer.state.best_metric == min(run.logged("eval_loss"))),
    "full_determinism": Case("--full_determinism", lambda run, plain: run.seen["deterministic"]),
    "seed": Case("--seed 1", other_losses),
    "data_seed": Case("--data_seed 1", other_losses),
    "use_cpu": Case("--use_cpu", lambda run, plain: run.args.device.type == "cpu"),
    "dataloader_drop_last": Case("--max_steps -1 --num_train_epochs 1 --per_device_train_batch_size 35 "
                                 "--dataloader_drop_last", lambda run, plain: run.trainer.state.global_step == 1),
    "dataloader_num_workers": Case("--dataloader_num_workers 1", loader(num_workers=1)),
    "dataloader_pin_memory": Case("--no_dataloader_pin_memory", loader(pin_memory=False)),
    "dataloader_persistent_workers": Case("--dataloader_num_workers 1 --dataloader_persistent_workers",
                                          loader(persistent_workers=True)),
    "dataloader_prefetch_factor": Case("--dataloader_num_workers 1 --dataloader_prefetch_factor 3",
                                       loader(prefetch_factor=3)),
    "dataloader_multiprocessing_context": Case(
        "--dataloader_num_workers 1 --dataloader_multiprocessing_context spawn",
        lambda run, plain: run.trainer.callback_handler.train_dataloader.multiprocessing_context.get_start_method()
        == "spawn"),
    "train_sampling_strategy": Case("--train_sampling_strategy sequential", other_losses),
    "ddp_find_unused_parameters": Case("--ddp_find_unused_parameters True", handler(find_unused_parameters=True)),
    "ddp_bucket_cap_mb": Case("--ddp_bucket_cap_mb 7", handler(bucket_cap_mb=7)),
    "ddp_broadcast_buffers": Case("--ddp_broadcast_buffers False", handler(broadcast_buffers=False)),
    "ddp_static_graph": Case("--ddp_static_graph True", handler(static_graph=True)),
    "ddp_timeout": Case("--ddp_timeout 60", lambda run, plain: run.args.ddp_timeout_delta.total_seconds() == 60),
    "debug": Case("--debug underflow_overflow", lambda run, plain: run.trainer.model._forward_hooks),
    "skip_memory_metrics": Case("--skip_memory_metrics False",
                                lambda run, plain: run.logged("train_mem_cpu_alloc_delta")),
}
# Every value of these has a case: {value: what it needs}; those of refusals.py are left out.
CHOICES = {
    "optim": ({}, other_optimizer),
    "lr_scheduler_type": ({"warmup_stable_decay": '--lr_scheduler_kwargs {"num_decay_steps":2}',
                           "cosine_with_min_lr": '--lr_scheduler_kwargs {"min_lr_rate":0.1}',
                           "cosine_warmup_with_min_lr": '--lr_scheduler_kwargs {"min_lr_rate":0.1}',
                           "reduce_lr_on_plateau": EVALUATED, "greedy": EVALUATED}, other_rates),
    "save_strategy": ({"best": EVALUATED, "steps": "--save_steps 1"},
                      lambda run, plain: bool(run.checkpoints()) == (run.args.save_strategy != "no")),
    "eval_strategy": ({"steps": "--eval_ratio 0.2", "epoch": "--eval_ratio 0.2"},
                      lambda run, plain: run.logged("eval_loss")),
}
# Refused where there is no GPU, or a single process.
REFUSED_HERE = {"fp16": "--fp16", "tf32": "--tf32 True", "use_liger_kernel": "--use_liger_kernel",
                "fsdp": "--fsdp full_shard", "fsdp_config": '--fsdp full_shard --fsdp_config {"version":2}',
                "ddp_backend": "--ddp_backend gloo", "local_rank": "--local_rank 0"}
# What needs several ranks or a run before: the file of its test.
ELSEWHERE = {"deepspeed": "tests/ranks/test_strategies.py", "resume_from_checkpoint": "tests/runs/test_resume.py",
             **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_private_repo"), "tests/runs/test_publish.py")}


def refused_values(rows=refusals.REFUSED):
    """Yields (flag, a value that refusals.py refuses, words that give it)."""
    for row in rows:
        beside = f" {row.beside[-1]} 0.5" if row.beside else ""
        for name in row.flags.split():
            for value in row.values or [other_value(FLAGS[name])]:
                yield name, value, f"--{name} {value}{beside}"


def all_cases():
    """Yields (flag, Case) of everything that works."""
    yield from CASES.items()
    refused = {(name, value) for name, value, _ in refused_values()}
    for name, (needs, has_effect) in CHOICES.items():
        for value in FLAGS[name].choices:
            if (name, value) not in refused and value not in (FLAGS[name].default, "adamw_torch_fused"):
                yield name, Case(f"--{name} {value} {needs.get(value, '')}", has_effect)


def other_value(flag):
    """A value that is not the default."""
    if flag.choices:
        return next(choice for choice in flag.choices if choice != flag.default)
    if flag.type == "bool":
        return str(not flag.default)
    return {"int": "3", "float": "0.5", "dict": '{"a":1}'}.get(flag.type, "word")


# -- runs -------------------------------------------------------------------------------------------------------------

class Runner:
    """Runs on one tiny model, each in a folder of its own, and leaves this process as it was."""

    def __init__(self, model, folder, cache):
        self.model, self.folder, self.cache, self.count = model, folder, cache, 0

    @functools.cached_property
    def plain(self):
        return self("")

    def argv(self, words):
        self.count += 1
        return [str(word) for word in (
            "--model_name_or_path", self.model, "--data_path", EXAMPLES / "data", "--cache_dir", self.cache,
            "--output_dir", self.folder / str(self.count), *PLAIN.split(), *words.split())]

    def __call__(self, words):
        """-> Run. Raises UserError."""
        argv, seen, verbosity = self.argv(words), {}, transformers.logging.get_verbosity()
        with self._watched() as emptied:
            try:
                done = finetune.train(argv)
                seen = {"tracker": dict(Tracker.seen), "cache emptied": emptied.call_count,
                        "verbosity": transformers.logging.get_verbosity(),
                        "deterministic": torch.are_deterministic_algorithms_enabled()}
            finally:
                torch.use_deterministic_algorithms(False)
                torch.backends.cudnn.deterministic = False
                transformers.logging.set_verbosity(verbosity)
        return Run(done, self.folder / str(self.count), seen)

    @contextlib.contextmanager
    def _watched(self):
        Tracker.seen.clear()
        with (mock.patch.dict(os.environ), mock.patch.dict(trials.INTEGRATION_TO_CALLBACK, trackio=Tracker),
              mock.patch.object(trials, "get_available_reporting_integrations", lambda: ["trackio"]),
              mock.patch("transformers.trainer.clear_device_cache") as emptied,
              contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())):
            yield emptied

    def refusal(self, words):
        """What is said against the words before the data are read, or None."""
        read = mock.Mock(side_effect=AssertionError("the data were read"))
        with mock.patch.multiple(finetune, read_model_and_data=read, load_weights=read), self._watched():
            try:
                finetune.train(self.argv(words))
            except UserError as error:
                return str(error)
            except AssertionError:
                return None
        return None


def result_of(run, name, case):
    """(whether the flag has its effect, what there is to say)."""
    try:
        done = run(case.words)
        with contextlib.redirect_stdout(io.StringIO()):  # of an evaluation
            works = case.has_effect(done, run.plain)
    except UserError as error:
        return False, f"refused: {error}"
    return bool(works), "has its effect" if works else "has no effect"


def sweep(run):
    """Yields (flag, words, whether it is as it should be, what there is to say)."""
    for name, case in all_cases():
        yield name, case.words, *result_of(run, name, case)
    words_of = [*((name, words) for name, _, words in refused_values()),
                *(REFUSED_HERE.items() if not torch.cuda.is_available() else ())]
    for name, words in words_of:
        said = run.refusal(words)
        yield name, words, said is not None and words.split()[0] in said, f"refused: {said}" if said else "not refused"
