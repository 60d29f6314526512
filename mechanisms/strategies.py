"""One process, DDP, ZeRO-2, ZeRO-3, FSDP: what each needs before the model is loaded, and what cannot work."""

import argparse
import contextlib
import datetime
import io
import os
import socket

import torch
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from mechanisms.checkpoints import ANY
from mechanisms.errors import UserError
from mechanisms.memory import Setup
from mechanisms.paths import deepspeed_file
from mechanisms.torchrun import stay_on_the_loopback

JOINED = "joined batches"  # the fact: how many --join_batches joins


def choose_precision(bf16, fp16, use_cpu):
    """(bf16, fp16) as asked for, or the best that the hardware has where neither was said.

    Raises UserError where the hardware lacks what was asked for.
    """
    cuda = torch.cuda.is_available() and not use_cpu
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else True
    if bf16 and fp16:
        raise UserError("--bf16 and --fp16 exclude each other: give one")
    if fp16 and not cuda:
        raise UserError("--fp16 needs a GPU and this run has none: leave it out (fp32), or give --bf16")
    if bf16 and not has_bf16:
        raise UserError(f"--bf16: {torch.cuda.get_device_name()} has no bfloat16: leave it out (fp16 is then chosen)")
    if bf16 is None and fp16 is None:
        return cuda and has_bf16, cuda and not has_bf16
    return bool(bf16), bool(fp16)


def check_backend(backend, use_cpu):
    """Raises UserError if --ddp_backend cannot connect the ranks of this run, or there are none to connect."""
    if backend and "RANK" not in os.environ:
        raise UserError(f"--ddp_backend {backend} has no effect in a single process: leave it out")
    if use_cpu and backend not in (None, "gloo"):
        raise UserError(f"--ddp_backend {backend} needs GPUs: leave it out (gloo)")


def compute_dtype(training_args):
    return torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32


def deepspeed_config(value):
    """The value of --deepspeed as Trainer takes it, see `paths.deepspeed_file`; a dict stays as it is."""
    return deepspeed_file(value) if isinstance(value, str) else value


def prepare_ranks(argv):
    """Before the arguments of a run are made, for their device connects the ranks (transformers does that).

    argv: as `flags.prepare_command_line` returns it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--deepspeed", nargs="?")
    parser.add_argument("--ddp_timeout", type=int, default=TrainingArguments.ddp_timeout)
    args, on_cpu = parser.parse_known_args(argv)[0], not torch.accelerator.is_available()
    if (args.deepspeed or "none").lower() != "none" and "RANK" not in os.environ:
        # A single process, without torchrun: DeepSpeed would look for MPI.
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        stay_on_the_loopback()
        if on_cpu and not torch.distributed.is_initialized():  # transformers does not pass --ddp_timeout on to gloo
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=args.ddp_timeout))


def _deepspeed(training_args):
    """transformers' view of the DeepSpeed config, or None (it sets the attribute under DeepSpeed only)."""
    return getattr(training_args, "hf_deepspeed_config", None)


def strategy_name(training_args):
    """How the work is shared, in the words of the field."""
    deepspeed = _deepspeed(training_args)
    if deepspeed:
        return f"ZeRO-{deepspeed.config.get('zero_optimization', {}).get('stage', 0)}"
    return "FSDP" if training_args.fsdp else "DDP" if training_args.world_size > 1 else "one process"


def is_sharded(training_args):
    """Whether no rank holds all weights."""
    deepspeed = _deepspeed(training_args)
    return bool(training_args.fsdp or deepspeed and deepspeed.is_zero3())


def memory_setup(config, adapter, nf4, training_args):
    """-> `mechanisms.memory.Setup`, which explains config, adapter and nf4. FSDP is taken for DDP, which needs more."""
    compute, deepspeed = compute_dtype(training_args), _deepspeed(training_args)
    zero = deepspeed.config.get("zero_optimization", {}) if deepspeed else {}
    optim = training_args.optim.value
    if deepspeed and "optimizer" in deepspeed.config:
        optim = deepspeed.config["optimizer"]["type"].lower()
    return Setup(
        config=config, adapter=adapter, nf4=nf4, compute=compute,
        trained=compute if deepspeed else torch.float32,  # DeepSpeed keeps its own fp32 copy
        ranks=training_args.world_size, stage=zero.get("stage", 0) if deepspeed else None,
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        device=training_args.device, optim=optim, optim_args=training_args.optim_args,
        accumulates=training_args.gradient_accumulation_steps > 1)


def resume_facts(training_args):
    """What of the strategy a checkpoint is bound to: DeepSpeed's hold one part per rank, the others are whole.

    Batches that were joined may be computed one by one from now on, as where memory runs out.
    """
    deepspeed = _deepspeed(training_args)
    joined = {JOINED: training_args.joined_batches if training_args.joined_batches > 1 else ANY}
    if not deepspeed:
        held = {"trained weights": "bf16"} if training_args.trained_weights == "bf16" else {}
        return {"sharding": "FSDP" if training_args.fsdp else "none", **held, **joined}
    universal = deepspeed.config.get("checkpoint", {}).get("load_universal")
    return {"sharding": strategy_name(training_args), "ranks": ANY if universal else training_args.world_size, **joined}


def impossible(training_args, lora_args):
    """Combinations that cannot work, each as a line that names the flag to change."""
    problems, deepspeed = [], _deepspeed(training_args)
    if training_args.deepspeed and training_args.fsdp:
        problems.append("--deepspeed and --fsdp exclude each other: give one")
    if training_args.fsdp and training_args.use_cpu:
        problems.append("--fsdp needs GPUs: without one the libraries train unsharded and do not say so. Leave it out "
                        "(DDP), or use --deepspeed ds_config_zero3.json, which shards on CPUs too")
    elif training_args.fsdp and training_args.world_size == 1:
        problems.append("--fsdp needs several GPUs: start with torchrun, or leave it out")
    if training_args.use_liger_kernel and training_args.use_cpu:
        problems.append("--use_liger_kernel needs a GPU: leave it out")
    elif training_args.use_liger_kernel and not is_liger_kernel_available():
        problems.append("--use_liger_kernel: pip install liger-kernel first")
    if lora_args.q_lora and is_sharded(training_args):
        flag = "--fsdp" if training_args.fsdp else f"--deepspeed {training_args.deepspeed}"
        problems.append(f"{flag}: weights quantized for --q_lora cannot be sharded. Use ds_config_zero2.json (each GPU "
                        "holds the 4-bit model), or --use_lora with ds_config_zero3.json")
    if deepspeed:
        problems += [f"--deepspeed {training_args.deepspeed}: {line.strip(' -')}; say \"auto\" there"
                     for line in deepspeed.mismatches]
    return problems


def overridden_flags(training_args):
    """What a user's DeepSpeed config takes out of the command line's hands, as lines."""
    if not _deepspeed(training_args):
        return []
    config, name, lines = _deepspeed(training_args).config, training_args.deepspeed, []
    if "optimizer" in config:
        lines.append(f"{name} has its own optimizer, {config['optimizer'].get('type')}: "
                     f"--optim {training_args.optim.value} has no effect")
    if "scheduler" in config:
        lines.append(f"{name} has its own scheduler, {config['scheduler'].get('type')}: "
                     f"--lr_scheduler_type {training_args.lr_scheduler_type.value} has no effect")
    return lines


def idle_gpus(training_args):
    """One line where a single process sees more GPUs than the one it uses."""
    if training_args.visible_gpus < 2:
        return []
    return [f"{training_args.visible_gpus} GPUs are here and this run uses one; bash finetune/finetune.sh, or torchrun "
            f"--nproc_per_node {training_args.visible_gpus} finetune.py, uses all"]


def join_ranks(training_args):
    """Connect the processes of this run: ZeRO-3 splits the weights while they are loaded, so it must know them all."""
    if training_args.deepspeed:
        import deepspeed

        with contextlib.redirect_stdout(io.StringIO()):  # without a GPU each process prints that an op is built
            deepspeed.init_distributed("gloo" if training_args.use_cpu else "nccl")
    return training_args.device


def device_map(training_args):
    """Where weights are loaded to: the device of this rank, one tensor after the other, so that the machine's memory
    does not hold a model for each rank. None: ZeRO-3 and FSDP divide them while they are loaded."""
    deepspeed = _deepspeed(training_args)
    return None if training_args.fsdp or deepspeed and deepspeed.is_zero3() else {"": training_args.device}


def leave_ranks():
    """At the end of a program: an interpreter that ends with open connections may abort, after all was done."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def on_first_rank(context):
    """Enter a context on the first rank, while all are in this one; what entering raises there is raised on all."""
    with contextlib.ExitStack() as stack:
        by_first_rank(lambda: stack.enter_context(context) and None)
        yield


@contextlib.contextmanager
def first_before_others(training_args):
    """As `TrainingArguments.main_process_first`, but work that goes on is waited for as long as it takes.

    Gives a function to call after each piece of it: --ddp_timeout is for one piece then, not for all of the work.
    """
    if training_args.world_size == 1:
        yield lambda: None
        return
    rounds = _Rounds(training_args.device)
    if training_args.local_process_index:
        rounds.until_nobody_is_at_work()
        yield lambda: None
        return
    try:
        yield rounds.at_work
    finally:
        rounds.until_nobody_is_at_work()


class _Rounds:
    """In each round every rank says whether it is at work; who is, does not wait for the others to say so."""

    def __init__(self, device):
        self.device, self.sent = device, None

    def at_work(self):
        if self.sent is None or self.sent.is_completed():
            self.sent = self._say(1)[0]

    def until_nobody_is_at_work(self):
        if self.sent is not None:
            self.sent.wait()
        while True:
            sent, number = self._say(0)
            sent.wait()
            if not number.item():
                return

    def _say(self, number):
        number = torch.tensor(number, dtype=torch.int32, device=self.device)
        return torch.distributed.all_reduce(number, async_op=True), number


def by_first_rank(function):
    """function() of the first rank, for all of them: files must not look different to another. What it raises, a
    UserError or OSError, is raised on all."""
    outcome = [None, None]
    if int(os.environ.get("RANK", 0)) == 0:
        try:
            outcome[0] = function()
        except (UserError, OSError) as error:
            outcome[1] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome)
    result, error = outcome
    if error:
        raise error
    return result
