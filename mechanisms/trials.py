"""What only torch and transformers know of the arguments, tried on one small weight before the data are read."""

import contextlib
import copy
import dataclasses
import inspect
import json
import os
import pathlib
import urllib.parse

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, get_scheduler
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from mechanisms.errors import first_line

# Trackers that want an account: how to log in, modes without one, and where a login is kept.
ACCOUNTS = {"wandb": ("WANDB_API_KEY", "WANDB_MODE", ("offline", "disabled"), ("~/.netrc", "~/_netrc"), "api.wandb.ai"),
            "swanlab": ("SWANLAB_API_KEY", "SWANLAB_MODE", ("local", "offline", "disabled"),
                        ("~/.swanlab/.netrc", ".swanlab/.netrc"), "machine")}
METRICS = "loss", "eval_loss"  # of an evaluation, see SafeTrainer.evaluation_loop
WEIGHTS = 4096  # the fewest that bitsandbytes holds in 8 bits


def failing(args) -> list[str]:
    """What would fail in training, each as a line that names the flag to change."""
    problems = [*_optimizer(args), *_schedule(args), *_checkpointing(args), *_trackers(args)]
    if args.metric_for_best_model not in (None, *METRICS):
        problems.append(f"--metric_for_best_model {args.metric_for_best_model}: an evaluation gives the loss alone: "
                        "leave it out")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        problems.append("--save_strategy best needs --eval_strategy")
    if args.local_rank not in (-1, int(os.environ.get("LOCAL_RANK", -1))):
        problems.append(f"--local_rank {args.local_rank}: torchrun says it: leave it out")
    return problems


def without_effect(args) -> list[str]:
    """Flags that the optimizer or schedule has no use for, as lines. Launchers give some that their user cannot take
    back, so that these are no mistakes."""
    lines, schedule = [], inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[args.lr_scheduler_type])
    if args.warmup_steps and "num_warmup_steps" not in schedule.parameters and not _deepspeed_has("scheduler", args):
        lines.append(f"--warmup_steps has no effect with --lr_scheduler_type {args.lr_scheduler_type.value}")
    if not _deepspeed_has("optimizer", args):
        lines += [f"--{name} has no effect with --optim {args.optim.value}"
                  for name in ("adam_beta1", "adam_beta2", "adam_epsilon")
                  if getattr(args, name) != _default(args, name)
                  and _settings(args) == _settings(args, name, _default(args, name))]
    return lines


def _default(args, name):
    return next(field.default for field in dataclasses.fields(args) if field.name == name)


def _deepspeed_has(part, args):
    """Whether the optimizer or scheduler is that of a DeepSpeed config."""
    return part in args.hf_deepspeed_config.config if args.deepspeed else False


def _settings(args, name=None, value=None):
    """The keyword arguments of the optimizer, with another value of one flag."""
    args = copy.copy(args)
    if name:
        setattr(args, name, value)
    return Trainer.get_optimizer_cls_and_kwargs(args)[1]


def _optimizer(args):
    if _deepspeed_has("optimizer", args):
        return []
    named = f"--optim {args.optim.value}" + (f" --optim_args {args.optim_args}" if args.optim_args else "")
    pairs = args.optim_args.replace(" ", "").split(",") if args.optim_args else []
    if any(pair.count("=") != 1 for pair in pairs):
        return [f"--optim_args {args.optim_args}: write name=value, several with commas between"]
    weight = torch.nn.Parameter(torch.ones(WEIGHTS, device=args.device))
    weight.grad = torch.ones_like(weight)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        kind([weight], **settings).step()
    except Exception as error:  # whatever it is, training would end with it
        return [f"{named}: {first_line(error)}"]
    return [f"--optim_args {pair}: --optim {args.optim.value} does not take it, or it is the default"
            for pair in pairs
            if settings == _settings(args, "optim_args", ",".join(other for other in pairs if other != pair))]


def _schedule(args):
    if _deepspeed_has("scheduler", args):
        return []
    kind, kwargs = args.lr_scheduler_type, args.lr_scheduler_kwargs
    named = f"--lr_scheduler_type {kind.value}" + (f" --lr_scheduler_kwargs '{json.dumps(kwargs)}'" if kwargs else "")
    try:
        _try_schedule(args, kwargs)
    except Exception as error:
        return [f"{named}: {first_line(error)}. What it needs stands in --lr_scheduler_kwargs, as JSON"]
    with contextlib.suppress(TypeError):  # of one that looks at what it is given
        _try_schedule(args, {"no_schedule_takes_this": 1})
        if kwargs:
            return [f"--lr_scheduler_kwargs has no effect with --lr_scheduler_type {kind.value}: leave it out"]
    return []


def _try_schedule(args, kwargs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else 1_000_000  # not known before the data are read
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, kwargs)
    for _ in range(2):
        optimizer.step()
        schedule.step(*[1.0] if "metrics" in inspect.signature(schedule.step).parameters else [])


def _checkpointing(args):
    kwargs = {"use_reentrant": False, **(args.activation_checkpointing_kwargs or {})}
    for name in ("every_n_layers", "offload"):  # Trainer's
        kwargs.pop(name, None)
    try:
        checkpoint(torch.sin, torch.ones(1, requires_grad=True), **kwargs).backward()
    except Exception as error:
        return [f"--gradient_checkpointing_kwargs '{json.dumps(args.activation_checkpointing_kwargs)}': "
                f"{first_line(error)}"]
    return []


def _trackers(args):
    installed = get_available_reporting_integrations() if args.report_to else []
    return [problem for name in args.report_to if (problem := _tracker(name, name in installed))]


def _tracker(name, installed):
    """What is wrong with a tracker, or None. Without an account it would ask for one when the model is loaded."""
    if name not in INTEGRATION_TO_CALLBACK:
        return f"--report_to {name}: no such tracker. There are {', '.join(INTEGRATION_TO_CALLBACK)}"
    if not installed:
        return f"--report_to {name}: its package is not installed: pip install {name}"
    if name not in ACCOUNTS:
        return None
    key, mode, offline, files, host = ACCOUNTS[name]
    host = urllib.parse.urlsplit(os.environ.get(f"{name.upper()}_BASE_URL", "")).hostname or host
    if os.environ.get(key) or os.environ.get(mode) in offline or any(_mentions(file, host) for file in files):
        return None
    return (f"--report_to {name}: nobody is logged in: {name} login, or {key}=...; with {mode}={offline[0]} the "
            "numbers stay on this machine")


def _mentions(file, word):
    file = pathlib.Path(file).expanduser()
    return file.is_file() and word in file.read_text(encoding="utf-8", errors="replace")
