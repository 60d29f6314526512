"""Refusals before anything large is loaded: what this hardware or this model cannot do, with the flag to change."""

import os
import re
import shutil

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from mechanisms.console import say
from mechanisms.errors import UserError


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


def could_be_on_the_hub(path):
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None


def first_line(error):
    return str(error).strip().split("\n")[0]


def not_empty(flag, folder):
    """What is wrong with a folder that a program is to make, as a list of no or one line."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        return [f"{flag} {folder} is not empty: give another, or move it away"]
    return []


def check_disk(flag, folder, size):
    """Raises UserError if there is no room for `size` bytes where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(f"{flag}: {size / 1e9:.1f} GB are needed there, and {free / 1e9:.1f} GB are free")


def load_config(path, cache_dir=None):
    """The model's config. Raises UserError where there is none to be had."""
    has = {name: os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json")}
    if has["adapter_config.json"] and not has["config.json"]:
        raise UserError(f"{path} is an adapter: give its base model as --model_name_or_path and this folder as "
                        "--lora_weight_path")
    if not os.path.isdir(path) and not could_be_on_the_hub(path):
        raise UserError(f"--model_name_or_path {path}: no such folder")
    try:
        return AutoConfig.from_pretrained(path, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        where = "holds no usable model" if os.path.isdir(path) else "is no folder here and cannot be had from the Hub"
        raise UserError(f"--model_name_or_path {path} {where}: {first_line(error)}") from error


def check_model(config, training_args, lora_args, lora_defaults):
    """Refuse what this model cannot do, and shorten what it cannot hold.

    lora_defaults: LoraArguments as they are without any flag. Raises UserError.
    """
    if getattr(config, "quantization_config", None) and not lora_args.q_lora:
        raise UserError("this model is quantized: its weights cannot be trained. Add --q_lora to train adapters on it")
    others = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"})
    if others:
        raise UserError(f"this model has layers of the kind {', '.join(others)}: they would carry what they read in "
                        "one sample of a batch into the next. Only networks of attention layers are supported")
    limit = getattr(config, "max_position_embeddings", None)
    if limit and training_args.model_max_length > limit:
        say(f"note: --model_max_length {training_args.model_max_length} is more than the model's {limit} positions: "
            f"{limit} is used")
        training_args.model_max_length = limit
    if not training_args.use_lora:
        return
    from mechanisms.qwen1 import todays_names  # which imports this module

    with torch.device("meta"):  # the network without its weights (from_config would share them out under ZeRO-3)
        network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    names = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    lora_args.lora_target_modules = todays_names(lora_args.lora_target_modules, names)
    missing = [name for name in lora_args.lora_target_modules if name.rpartition(".")[2] not in names]
    if missing:
        raise UserError(f"--lora_target_modules {' '.join(missing)}: no such layers in this model; it has "
                        + ", ".join(sorted(name for name in names if name.endswith(("_proj", "lm_head")))))
    if lora_args.lora_weight_path:
        _check_adapter(lora_args, lora_defaults, names)


def _check_adapter(lora_args, defaults, names):
    """A continued adapter keeps its own settings: flags that say otherwise would have no effect.

    names: last parts of the names of all layers of the model.
    """
    from peft import PeftConfig

    path = lora_args.lora_weight_path
    if not os.path.isdir(path) and not could_be_on_the_hub(path):
        raise UserError(f"--lora_weight_path {path}: no such folder")
    try:
        adapter = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--lora_weight_path {path}: no usable adapter there: {first_line(error)}") from error
    targets = [] if isinstance(adapter.target_modules, str) else adapter.target_modules  # a str is a pattern
    missing = {name for name in targets if name.rpartition(".")[2] not in names}
    if missing:
        raise UserError(f"--lora_weight_path {path}: that adapter is for layers which this model lacks: "
                        f"{' '.join(sorted(missing))} (those trained on Qwen-1 by its own program cannot be continued)")
    own = {"lora_r": adapter.r, "lora_alpha": adapter.lora_alpha, "lora_dropout": adapter.lora_dropout,
           "lora_bias": adapter.bias, "lora_target_modules": sorted(adapter.target_modules)}
    wrong = []
    for name, value in own.items():
        asked = getattr(lora_args, name)
        if asked != getattr(defaults, name) and (sorted(asked) if isinstance(asked, list) else asked) != value:
            wrong.append(f"--{name}: the adapter in --lora_weight_path has {value}")
    if lora_args.lora_embeddings != "auto":
        wrong.append("--lora_embeddings: the adapter in --lora_weight_path has its own")
    if wrong:
        raise UserError("\n       ".join(wrong) + "\n       A continued adapter keeps its settings: leave these out")
