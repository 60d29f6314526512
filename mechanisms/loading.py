"""A model folder or an adapter folder -> a model that answers, or one clear sentence why not."""

import json
import os
import warnings

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from mechanisms.checkpoints import checkpoints_in, read_manifest
from mechanisms.checks import could_be_on_the_hub, first_line
from mechanisms.errors import UserError
from mechanisms.quiet import gptqmodel_hidden, import_gptqmodel
from mechanisms.qwen1 import card_metadata, is_standard_folder, standard_folder

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
    quantization = getattr(options.get("config") or AutoConfig.from_pretrained(path), "quantization_config", None)
    if quantization and quantization.get("quant_method") == "gptq":
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


def end_at_turns(generation, tokenizer):
    """Let a generation config end answers where turns end, which a base model's does not know."""
    ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        generation.eos_token_id = [tokenizer.eos_token_id, *(end for end in ends if end is not None)]
    generation.pad_token_id = tokenizer.pad_token_id


def _put_on(model, base, path):
    """The adapter at `path` on its base model. Raises UserError if it does not fit."""
    from peft import PeftModel

    quantized = getattr(model.config, "quantization_config", None) is not None
    with gptqmodel_hidden(not quantized), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of choices made in training, but one warning says something else:
        warnings.filterwarnings("error", "Found missing adapter keys")  # the adapter is of a model with fewer layers
        try:
            return PeftModel.from_pretrained(model, path)
        except (*LOADING_ERRORS, UserWarning) as error:
            reason = first_line(str(error).removeprefix("Error(s) in loading state_dict for PeftModelForCausalLM:"))
            raise UserError(f"the adapter {path} does not fit the model {base}: {reason[:300]}") from error
