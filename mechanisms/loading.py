"""A model folder or an adapter folder -> a config, weights, a model that answers; or one clear sentence why not."""

import contextlib
import copy
import dataclasses
import glob
import json
import os
import pickle
import warnings

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from mechanisms.console import say
from mechanisms.data.template import free_tokens
from mechanisms.errors import UserError, first_line
from mechanisms.gptq import gptqmodel_hidden, import_gptqmodel, is_gptq, name_backend
from mechanisms.linear_attention import LINEAR
from mechanisms.lora import (
    MLP,
    empty_network,
    experts_of,
    last_parts,
    layers_of,
    peft_name,
    reach,
    read_targets,
    takes_mlps_for_experts,
)
from mechanisms.paths import could_be_on_the_hub, find_base
from mechanisms.qwen1 import convert_if_qwen1, todays_names
from mechanisms.tokenizer import end_at_turns, load_tokenizer

CHANGE_THE_BASE = "pissa", "olora", "corda", "loftq", "lora_ga"  # of peft's init_lora_weights
LOADING_ERRORS = OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError


@contextlib.contextmanager
def no_code(path):
    """While weights are loaded: of a pickle (.bin) torch takes only numbers. What else it holds is a UserError."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} cannot be loaded: it holds a pickle with more than weights in it, or a damaged one, "
                        "and code in it could do anything. Look for .safetensors files") from error


def load_weights(path, **options):
    """`AutoModelForCausalLM.from_pretrained`, but a checkpoint with missing weights is refused, not filled at random.

    Raises UserError for such a folder, and LOADING_ERRORS as that does.
    """
    if "config" not in options:
        options["config"] = text_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    config = options["config"]
    check_rows(path, config)
    if is_gptq(config):
        import_gptqmodel()
        if torch.cuda.is_available():
            name_backend(config)
    with no_code(path):
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, trust_remote_code=False,
                                                           **options)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(f"{path} is not a whole model: its files lack {', '.join(missing[:3])}{more}")
    # A model is saved with the conversions of its loading undone. Under ZeRO-3 transformers keeps also those that the
    # files had no use for: experts published in one tensor for a layer would be saved one by one. Can go when it keeps
    # those that were used, as it does without ZeRO-3 (transformers/integrations/deepspeed.py).
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
    # On a CPU with bfloat16 instructions bitsandbytes packs 4-bit weights anew at the first evaluation, for good and
    # for a product that has no gradient: training would go on without. It also fails on layers of fewer than 64 inputs.
    # Can go when it unpacks them for training (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2078).
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def check_rows(path, config):
    """Refuse a model folder whose config has another number of tokens than its weights. Raises UserError.

    Only headers of safetensors are read; of what is no folder of them, nothing.
    """
    rows = config.get_text_config().vocab_size
    for file in sorted(glob.glob(os.path.join(glob.escape(path), "model*.safetensors"))):
        try:
            with safe_open(file, "pt") as tensors:
                found = {name: tensors.get_slice(name).get_shape()[0] for name in tensors.keys()
                         if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
        except (OSError, SafetensorError) as error:
            raise UserError(f"the weights in {path} cannot be loaded: {os.path.basename(file)}: "
                            f"{first_line(error)}") from error
        for name, number in found.items():
            if number != rows:
                raise UserError(f"{path}: vocab_size is {rows:,} in its config.json, and {name} in "
                                f"{os.path.basename(file)} has {number:,} rows: the two are of different models")


def check_tokens(path, config, tokenizer, keep_added_tokens):
    """`check_rows`, and refuse a tokenizer with tokens that can occur in a sample and have no embedding.

    keep_added_tokens: whether those that the chat template does not write can. Raises UserError.
    """
    check_rows(path, config)
    rows, never = config.vocab_size, () if keep_added_tokens else free_tokens(tokenizer)
    beyond = [token for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
              if number >= rows and token not in never]
    if beyond:
        raise UserError(f"{path}: the model has embeddings of {rows:,} tokens, and {len(beyond):,} of its tokenizer's "
                        f"lie beyond, from {beyond[0]} on: they were added without model.resize_token_embeddings, or "
                        "the tokenizer is another model's")


def load_to_answer(path, base_model=None, dtype="auto", device_map=None):
    """The model or adapter at `path` -> (model, tokenizer), ready to answer. An adapter stays apart from its base.

    Args:
        base_model: for an adapter: where its base model is (default: where the adapter says).
        dtype, device_map: as in `from_pretrained`.

    Raises:
        UserError: something cannot be found or loaded, or the adapter does not fit the base model.
    """
    base = find_base(path, base_model)
    source = convert_if_qwen1(base or path)
    folder = path if base else source
    has_tokenizer = base is None or os.path.isfile(os.path.join(path, "tokenizer_config.json"))
    tokenizer = load_tokenizer(folder if has_tokenizer else source)
    if base:
        config = model_config(source, f"the base model of {path}")
        check_adapter(path, read_adapter(path), source, text_config(config))
    try:
        model = load_weights(source, dtype=dtype, device_map=device_map)
    except LOADING_ERRORS as error:
        advice = f". It is the base model of {path}: say with --base_model if it is elsewhere" if base else ""
        raise UserError(f"{source} cannot be loaded: {first_line(error)}{advice}") from error
    if base:
        if os.path.isfile(os.path.join(path, "generation_config.json")):
            model.generation_config = GenerationConfig.from_pretrained(path)
        model = _put_on(model, source, path)
    end_at_turns(model.generation_config, tokenizer)
    return model.eval(), tokenizer


def _put_on(model, base, path):
    """The adapter at `path` on its base model. Raises UserError if it does not fit."""
    from peft import PeftModel

    with gptqmodel_hidden(not is_gptq(model.config)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of choices made in training
        try:
            with no_code(path):
                return PeftModel.from_pretrained(model, path)
        except LOADING_ERRORS as error:
            raise UserError(f"the adapter {path} does not fit the model {base}: {first_line(error)[:300]}") from error


def model_config(path, what):
    """The config of the model at `path`; `what` names it in the UserError if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise UserError(f"{path}, {what}, cannot be loaded: {first_line(error)}. Say with --base_model where it "
                        "is") from error


def load_config(path, cache_dir=None):
    """The config of the model's language part: all of it, but for models that are published with a vision tower.

    Raises UserError where there is none to be had, or it is of a family that cannot be trained.
    """
    has = {name: os.path.isfile(os.path.join(path, name)) for name in ("config.json", "adapter_config.json")}
    if has["adapter_config.json"] and not has["config.json"]:
        raise UserError(f"{path} is an adapter: give its base model as --model_name_or_path and this folder as "
                        "--lora_weight_path")
    if not os.path.isdir(path) and not could_be_on_the_hub(path):
        raise UserError(f"--model_name_or_path {path}: no such folder")
    try:
        outer = AutoConfig.from_pretrained(path, cache_dir=cache_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "holds no usable model" if os.path.isdir(path) else "is no folder here and cannot be had from the Hub"
        raise UserError(f"--model_name_or_path {path} {where}: {first_line(error)}") from error
    config = outer.get_text_config()
    if config.model_type.startswith("qwen4_exp"):
        raise UserError(f"{path} is a {outer.model_type} model (Qwen3.8-Flash-Next): its sparse attention and n-gram "
                        "tables read across the samples of a row. Use Qwen3.5, Qwen3.6 or another Qwen3.8")
    if not {type(outer), type(config)} <= set(MODEL_FOR_CAUSAL_LM_MAPPING):
        raise UserError(f"{path} is a {outer.model_type} model, which transformers cannot load as a language model "
                        "alone. Use a text model (Qwen3), or one whose language part stands alone (Qwen3.5, Qwen3.6)")
    return text_config(outer)


def text_config(outer):
    """The config of a model's text part, with what a wrapper says for all of its parts."""
    config = outer.get_text_config()
    if config is not outer:
        config.tie_word_embeddings = config.tie_word_embeddings or outer.tie_word_embeddings
        config._commit_hash = getattr(outer, "_commit_hash", None)
        if getattr(outer, "quantization_config", None):
            config.quantization_config = outer.quantization_config
    return config


def fit_arguments(config, training_args, lora_args):
    """Change two arguments to what the model has, and say so: --model_max_length to its number of positions (as YaRN
    extends it), and --lora_target_modules to names or a pattern of its layers, see `read_targets`, those of Qwen-1 to
    today's. The config's router loss is switched off: transformers adds it to the loss of each batch as a whole,
    whatever part of a step that batch is."""
    if getattr(config, "output_router_logits", False):
        say("note: the model's config asks for a loss of its routers: it is switched off, they are trained by the "
            "loss of the answers alone")
        config.output_router_logits = False
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit and rope.get("rope_type") == "yarn" and rope.get("original_max_position_embeddings"):
        limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    if limit and training_args.model_max_length > limit:
        if training_args.model_max_length != type(training_args).model_max_length:  # somebody has asked for it
            say(f"note: --model_max_length {training_args.model_max_length} is more than the model's {limit} "
                f"positions: {limit} is used")
        training_args.model_max_length = limit
    if training_args.use_lora and not lora_args.lora_weight_path:
        words, network = lora_args.lora_target_modules, empty_network(config)
        words = words and todays_names(words, layer_names(network))
        lora_args.lora_target_modules = read_targets(words, network)
        say("Adapters:", reach(network, lora_args), "")


def layer_names(network):
    """The last parts of the names of all modules of the network, as a set."""
    return {name.rpartition(".")[2] for name, _ in network.named_modules()}


def check_trainable(model, config, training_args, lora_args):
    """Refuse what the model (a path) cannot do, by its config, and an adapter to continue that does not fit it.

    Raises UserError.
    """
    if getattr(config, "quantization_config", None) and not lora_args.q_lora:
        raise UserError("this model is quantized: its weights cannot be trained. Add --q_lora to train adapters on it")
    others = sorted(set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention", LINEAR})
    if others:
        raise UserError(f"this model has layers of the kind {', '.join(others)}: they would carry what they read in "
                        "one sample of a batch into the next. Only attention, whole, sliding and linear, is supported")
    if not training_args.use_lora:
        return
    if lora_args.use_dora and is_gptq(config):
        raise UserError("--use_dora: peft has no DoRA for GPTQ layers. Leave it out, or train on the 16-bit model")
    network = empty_network(config)
    names = layer_names(network)
    experts = sum(weight.numel() for weight in experts_of(network).values())
    if lora_args.q_lora and experts:
        whole = sum(parameter.numel() for parameter in network.parameters())
        raise UserError(f"--q_lora: this model is a mixture of experts, and {experts:,} of its {whole:,} weights are "
                        f"experts, which bitsandbytes leaves in 16 bits ({2 * experts / 1e9:,.1f} GB). Use --use_lora, "
                        "with ds_config_zero3.json if the model does not fit on a GPU")
    asked = [] if lora_args.lora_weight_path else lora_args.lora_target_modules
    if isinstance(asked, str):
        asked = last_parts(layers_of(asked, network)) or [asked]
    mlps = [name for name in asked if name.rpartition(".")[2] in MLP]
    if mlps and takes_mlps_for_experts(network):
        raise UserError(f"--lora_target_modules {' '.join(mlps)}: by these names peft adapts the routed experts of "
                        "this model, and no other MLPs. Leave them out: --lora_experts adapts them all")
    if lora_args.lora_experts and not experts:
        raise UserError("--lora_experts: this model has no routed experts. Leave it out")
    missing = [name for name in asked if not layers_of([name], network)]
    if missing:
        raise UserError(f"--lora_target_modules {' '.join(missing)}: no such layers in this model; it has "
                        + ", ".join(sorted(name for name in names if name.endswith(("_proj", "lm_head"))))
                        + ". One word may also be all-linear, or a regular expression that matches whole names")
    if lora_args.lora_weight_path:
        adapter = read_adapter(lora_args.lora_weight_path)
        _check_settings(lora_args, adapter)
        check_adapter(lora_args.lora_weight_path, adapter, model, config)


def read_adapter(path):
    """The LoraConfig of the adapter at `path`. Raises UserError if it is none, or of another kind."""
    from peft import PeftConfig

    if not os.path.isdir(path) and not could_be_on_the_hub(path):
        raise UserError(f"the adapter {path}: no such folder")
    try:
        adapter = PeftConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        raise UserError(f"no usable adapter in {path}: {first_line(error)}") from error
    if adapter.peft_type != "LORA":
        raise UserError(f"the adapter {path} is of the kind {getattr(adapter.peft_type, 'value', adapter.peft_type)}: "
                        "only LoRA adapters can be continued, merged and talked to")
    start = str(adapter.init_lora_weights).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise UserError(f'the adapter {path} (init_lora_weights "{start}") took part of the base model\'s weights into '
                        "itself when its training began, and the rest of them is not known here. Convert it to a plain "
                        "LoRA adapter: peft's save_pretrained(..., path_initial_model_for_weight_conversion=...) does")
    wrong = [f'"{name}": {json.dumps(getattr(adapter, name))}' for name in ("r", "lora_alpha", "lora_dropout")
             if isinstance(getattr(adapter, name), bool) or not isinstance(getattr(adapter, name), (int, float))]
    if wrong:
        raise UserError(f"adapter_config.json of the adapter {path} is damaged: {', '.join(wrong)} is no number")
    return adapter


def check_adapter(path, adapter, model, config):
    """Refuse an adapter whose tensors are not those that peft would make for this model: it takes others silently.

    Args:
        adapter: its LoraConfig.
        model, config: the model under it, a path, and its config.

    Raises UserError.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    network = empty_network(config)
    names = layer_names(network)
    targets = [] if isinstance(adapter.target_modules, str) else adapter.target_modules or []  # a str is a pattern
    missing = sorted(name for name in targets if name.rpartition(".")[2] not in names)
    if missing:
        raise UserError(f"the adapter {path} is for layers which this model lacks: {' '.join(missing)} (those trained "
                        "on Qwen-1 by its own program cannot be used)")
    shapes = _adapter_shapes(path)
    if empty := [name for name, shape in shapes.items() if 0 in shape]:
        raise UserError(f"the adapter {path} holds empty tensors ({len(empty)} of {len(shapes)}, such as {empty[0]}): "
                        "it was saved under ZeRO-3 or FSDP without gathering its weights. Save it again")
    settings = copy.copy(adapter)
    settings.init_lora_weights = True  # others compute with the weights
    settings.inference_mode, settings.task_type = False, "CAUSAL_LM"
    try:
        with warnings.catch_warnings(), torch.device("meta"), gptqmodel_hidden(True):
            warnings.simplefilter("ignore")
            network = get_peft_model(network, settings)
            found = set_peft_model_state_dict(network, {name: torch.empty(shape) for name, shape in shapes.items()})
    except KeyError as error:
        problem = f"it lacks {error}"
    except (ValueError, RuntimeError, TypeError) as error:
        problem = " ".join(str(error).removeprefix("Error(s) in loading state_dict for PeftModelForCausalLM:").split())
    else:
        own = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        missing = [name for name in found.missing_keys if name in own]
        problem = "; ".join(f"{len(names)} tensors {what}, such as {names[0]}" for names, what in (
            (missing, "of this model's layers are missing in it"),
            (found.unexpected_keys, "in it belong to no layer of this model")) if names)
    if problem:
        raise UserError(f"the adapter {path} does not fit the model {model}: {problem[:400]}. It was made for another "
                        "model, or by a program that names layers otherwise")


def _adapter_shapes(path):
    """{name: shape} of the tensors in the adapter's file. Raises UserError."""
    from peft import load_peft_weights

    file = os.path.join(path, "adapter_model.safetensors")
    try:
        if os.path.isfile(file):
            with safe_open(file, "pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
        with no_code(path):
            return {name: tuple(tensor.shape) for name, tensor in load_peft_weights(path, device="cpu").items()}
    except LOADING_ERRORS as error:
        raise UserError(f"the weights of the adapter {path} cannot be loaded: {first_line(error)}") from error


def _check_settings(lora_args, adapter):
    """A continued adapter keeps its own settings: flags that say otherwise would have no effect."""
    wrong, defaults = [], type(lora_args)()
    for field in dataclasses.fields(lora_args):
        asked, name = getattr(lora_args, field.name), peft_name(field.name)
        if field.name in ("q_lora", "lora_weight_path") or asked == getattr(defaults, field.name):
            continue
        own = getattr(adapter, name) if name else None
        own = sorted(own) if isinstance(own, set) else own
        if not name:
            wrong.append(f"--{field.name}: the adapter in --lora_weight_path has its own")
        elif (sorted(asked) if isinstance(asked, list) else asked) != own:
            wrong.append(f"--{field.name}: the adapter in --lora_weight_path has {own}")
    if wrong:
        raise UserError("\n       ".join(wrong) + "\n       A continued adapter keeps its settings: leave these out")
