"""A model folder or an adapter folder -> a model that answers, or one clear sentence why not."""

import json
import os
import warnings

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from mechanisms.checkpoints import checkpoints_in, read_manifest
from mechanisms.console import say
from mechanisms.errors import UserError, first_line
from mechanisms.gptq import gptqmodel_hidden, import_gptqmodel, is_gptq
from mechanisms.paths import could_be_on_the_hub
from mechanisms.qwen1 import card_metadata, is_standard_folder, standard_folder, todays_names
from mechanisms.tokenizer import end_at_turns, load_tokenizer

LOADING_ERRORS = OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError


def find_base(path, base_model=None):
    """The base model of the adapter at `path`: `base_model` if given, else what the adapter says. None: a whole model.

    An adapter of a Qwen-1 model names the Qwen2 folder that was written for it; if that is gone, it is written again.
    Raises UserError if there is neither a model nor an adapter at `path`, or no base model where it should be.
    """
    if not os.path.isdir(path) and not could_be_on_the_hub(path):
        raise UserError(f"{path}: no such folder")
    config = os.path.join(path, "adapter_config.json")
    if not os.path.isfile(config):
        if base_model:
            raise UserError(f"--base_model is for adapters, and there is no adapter_config.json in {path}")
        if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
            complete = [folder for folder in checkpoints_in(path) if not isinstance(read_manifest(folder), str)]
            raise UserError(f"{path} holds neither a model (config.json) nor an adapter (adapter_config.json)"
                            + (f". Its newest complete checkpoint is {complete[0]}" if complete else ""))
        return None
    try:
        with open(config, encoding="utf-8") as file:
            base = base_model or json.load(file)["base_model_name_or_path"] or "?"
    except (ValueError, KeyError) as error:
        raise UserError(f"{config} is damaged: {first_line(error)}") from error
    if not base_model and not os.path.isdir(base) and is_standard_folder(base):
        base = card_metadata(path).get("base_model", base)
    if not os.path.isdir(base) and not could_be_on_the_hub(base):
        raise UserError(f"--base_model {base}: no such folder" if base_model else
                        f"the base model of {path} is {base}, and there is no such folder now: say with --base_model "
                        "where that model is")
    return standard_folder(base)


def load_weights(path, **options):
    """`AutoModelForCausalLM.from_pretrained`, which gives weights that the folder lacks random values, without that.

    Raises UserError for such a folder, and LOADING_ERRORS as that does.
    """
    if is_gptq(options.get("config") or AutoConfig.from_pretrained(path)):
        import_gptqmodel()
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{path} is not a whole model: its files lack {', '.join(missing[:3])}{more}")
    # On a CPU with bfloat16 instructions bitsandbytes packs 4-bit weights anew at the first evaluation, for good and
    # for a product that has no gradient: training would go on without. It also fails on layers of fewer than 64 inputs.
    # Can go when it unpacks them for training (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078).
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_model(path, base, tokenizer, dtype="auto", device_map=None):
    """The model or adapter at `path`, ready to answer. An adapter stays apart from its base model.

    Args:
        base: what `find_base` said.
        tokenizer: the one of finetune.py's `load_tokenizer`.
        dtype, device_map: as in `from_pretrained`.

    Raises:
        UserError: something cannot be loaded, or the adapter does not fit the base model.
    """
    try:
        model = load_weights(base or path, dtype=dtype, device_map=device_map)
    except LOADING_ERRORS as error:
        advice = f". It is the base model of {path}: say with --base_model if it is elsewhere" if base else ""
        raise UserError(f"{base or path} cannot be loaded: {first_line(error)}{advice}") from error
    if base:
        if os.path.isfile(os.path.join(path, "generation_config.json")):
            model.generation_config = GenerationConfig.from_pretrained(path)
        model = _put_on(model, base, path)
    end_at_turns(model.generation_config, tokenizer)
    return model.eval()


def _put_on(model, base, path):
    """The adapter at `path` on its base model. Raises UserError if it does not fit."""
    from peft import PeftModel

    with gptqmodel_hidden(not is_gptq(model.config)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of choices made in training, but one warning says something else:
        warnings.filterwarnings("error", "Found missing adapter keys")  # the adapter is of a model with fewer layers
        try:
            return PeftModel.from_pretrained(model, path)
        except (*LOADING_ERRORS, UserWarning) as error:
            reason = first_line(str(error).removeprefix("Error(s) in loading state_dict for PeftModelForCausalLM:"))
            raise UserError(f"the adapter {path} does not fit the model {base}: {reason[:300]}") from error


def load(path, base_model=None, dtype="auto", device_map=None):
    """The model or adapter at `path` -> (model, tokenizer), ready to answer. merge_lora.py and examples use it too.

    Arguments and UserErrors as those of `mechanisms.loading.load_model` and `find_base`.
    """
    base = find_base(path, base_model)
    path = path if base else standard_folder(path)
    has_tokenizer = base is None or os.path.isfile(os.path.join(path, "tokenizer_config.json"))
    tokenizer = load_tokenizer(path if has_tokenizer else base)
    return load_model(path, base, tokenizer, dtype, device_map), tokenizer


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
