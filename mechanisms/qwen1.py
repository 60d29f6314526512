"""Qwen-1 models (Qwen-7B, -Chat, -Int4, ...) as what they are: Qwen2's network under other names.

Their folders need Python code of their own, which does not run on transformers 5, and downloaded code is not run here.
So such a folder is written once more, under today's names, into the cache; everything else sees a plain Qwen2 folder.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
import socket

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mechanisms.compatibility import add_former_names
from mechanisms.console import counted, say
from mechanisms.errors import UserError, first_line
from mechanisms.gptq import portable_backend
from mechanisms.hubs import model_here
from mechanisms.paths import QWEN1_PREFIX, could_be_on_the_hub
from mechanisms.qwen1_tokenizer import qwen1_tokenizer

VERSION = 2  # of what is written: another one is another folder
SHARD_SIZE = 500_000_000  # bytes

# Qwen-1's modules and Qwen2's. Where several stand on the right, the left one is these stacked on the output axis.
# Those of a block are named from the block on.
PROJECTIONS = {
    "transformer.wte": ["model.embed_tokens"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "mlp.w1": ["mlp.up_proj"],
    "mlp.w2": ["mlp.gate_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "lm_head": ["lm_head"]}
MODULES = PROJECTIONS | {"ln_1": ["input_layernorm"], "ln_2": ["post_attention_layernorm"],
                         "transformer.ln_f": ["model.norm"]}
GPTQ_TENSORS = ["qweight", "qzeros", "scales", "g_idx"]  # a quantized projection has these instead of a weight

# What Qwen2's network cannot do; no published text model says otherwise.
FIXED = {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True, "emb_dropout_prob": 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# What the programs call
# ---------------------------------------------------------------------------------------------------------------------

def convert_if_qwen1(path, cache_dir=None):
    """`path` itself, or for a Qwen-1 model the standard Qwen2 folder of it, which is written when first asked for.

    (With MODELSCOPE=1, a name there becomes the folder that it was downloaded to.)

    The folder has the last name of `path`, as that tells base models from chat models. It appears whole or not at all,
    and one process at a time writes it, so that any number of ranks and runs may ask at once.

    Args:
        path: folder or Hugging Face Hub name; one where no model is, is returned as it is.
        cache_dir: parent of the new folder, and where downloads lie (default: Hugging Face's).

    Raises:
        UserError: a Qwen-1 model that cannot be converted or written, or another model that needs code of its own.
    """
    path = model_here(path, cache_dir)
    if not os.path.isdir(path) and not could_be_on_the_hub(path):
        return path
    try:
        config, _ = PretrainedConfig.get_config_dict(path, cache_dir=cache_dir)
    except (OSError, ValueError):  # whoever loads it next says what is wrong
        return path
    kind = config.get("model_type")
    if "auto_map" in config and kind not in CONFIG_MAPPING and kind != "qwen":
        raise UserError(f"{path} ({kind}) needs Python code of its own, and downloaded code is not run here. Models "
                        "that work are Qwen 1, 1.5, 2, 2.5, 3 and what else transformers itself has a network for")
    if kind != "qwen":
        return path
    source = path
    if not os.path.isdir(path):
        try:
            source = snapshot_download(path, cache_dir=cache_dir, allow_patterns=[
                "*.json", "*.safetensors", "*.bin", "qwen.tiktoken"])
        except (OSError, ValueError) as error:
            raise UserError(f"the Qwen-1 model {path} cannot be downloaded: {first_line(error)}") from error
    files = _weight_files(source)
    root = os.path.abspath(cache_dir or os.path.join(HF_HOME, "finetune_models"))
    parent = os.path.join(root, QWEN1_PREFIX + _key(source, files))
    folder = os.path.join(parent, os.path.basename(os.path.abspath(path)))
    if os.path.isdir(folder):
        return folder
    try:
        os.makedirs(parent, exist_ok=True)
        with WeakFileLock(folder + ".lock"):
            if not os.path.isdir(folder):
                _write(folder, source, config, files, os.path.abspath(path) if os.path.isdir(path) else path)
    except OSError as error:
        raise UserError(f"the Qwen-1 model {path} cannot be written as a Qwen2 folder to {folder}: "
                        f"{error.strerror or error}. --cache_dir or HF_HOME names another place") from error
    return folder


def todays_config(path, cache_dir=None):
    """The Qwen2Config of a Qwen-1 model (a folder or name), from its config.json alone; None: it is no such model.

    Raises UserError: Qwen2's network cannot be it.
    """
    try:
        config, _ = PretrainedConfig.get_config_dict(path, cache_dir=cache_dir)
    except (OSError, ValueError):  # whoever loads it next says what is wrong
        return None
    return _config(config, path) if config.get("model_type") == "qwen" else None


def todays_names(targets, layers):
    """LoRA targets with those that are Qwen-1's names replaced by the layers they are now; says so.

    targets: names, such as c_attn or mlp.c_proj; layers: the last parts of the names of all modules of the model. A
    name that the model has itself is left alone.
    """
    renamed = []
    for target in targets:
        now = [name.rpartition(".")[2] for old, names in PROJECTIONS.items() for name in names
               if f".{old}".endswith(f".{target}")]
        meant = now and set(now) <= set(layers) and target.rpartition(".")[2] not in layers
        renamed += now if meant else [target]
    renamed = list(dict.fromkeys(renamed))
    if renamed != list(targets):
        say(f"note: --lora_target_modules {' '.join(targets)} (names of Qwen-1) is {' '.join(renamed)} in this model")
    return renamed


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------

def _weight_files(source):
    """Paths of the weight files of the folder, safetensors before pickles. Raises UserError if there are none."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        names = [single]
        index = os.path.join(source, single + ".index.json")
        if os.path.isfile(index):
            try:
                with open(index, encoding="utf-8") as file:
                    names = sorted(set(json.load(file)["weight_map"].values()))
            except (ValueError, KeyError) as error:
                raise UserError(f"{index} is damaged: {error}") from error
        elif not os.path.isfile(os.path.join(source, single)):
            continue
        missing = [name for name in names if not os.path.isfile(os.path.join(source, name))]
        if missing:
            raise UserError(f"the Qwen-1 model in {source} is not whole, files are missing: {', '.join(missing)}")
        return [os.path.join(source, name) for name in names]
    raise UserError(f"the Qwen-1 model in {source} has no weights (model.safetensors or pytorch_model.bin)")


def _key(source, files):
    """Hex key of this converter, of the folder and of every file of it that counts, by size and time."""
    digest = hashlib.blake2b(repr((VERSION, os.path.abspath(source))).encode(), digest_size=8)
    for name in ["config.json", "generation_config.json", "qwen.tiktoken", *files]:
        path = os.path.join(source, name)
        if os.path.exists(path):
            state = os.stat(path)
            digest.update(repr((name, state.st_size, state.st_mtime_ns)).encode())
    return digest.hexdigest()


def _write(folder, source, config, files, name):
    """Write the standard folder, beside it first, and then give it its name.

    name: of the model, for its users. Raises UserError, OSError.
    """
    new_config, quantized = _config(config, source), "quantization_config" in config
    tokenizer = qwen1_tokenizer(source, new_config.vocab_size, new_config.max_position_embeddings)
    new_config.pad_token_id, new_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    size = sum(map(os.path.getsize, files))
    free = shutil.disk_usage(os.path.dirname(folder)).free
    if free < size:
        raise OSError(f"it needs {size / 1e9:.1f} GB, and there are {free / 1e9:.1f} GB free")
    print(f"note: {name} is a Qwen-1 model. It is written once as a Qwen2 folder ({size / 1e9:.1f} GB) to {folder}",
          flush=True)  # by the one process of this machine that does it, which need not be rank 0
    unfinished = f"{folder}.{socket.gethostname()}.unfinished"  # machines may share the disk, and not its locks
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run left
    os.makedirs(unfinished)
    try:
        dtype = _convert_weights(files, unfinished, _expected(new_config, quantized))
        if new_config.dtype is None:
            new_config.dtype = dtype
        new_config.save_pretrained(unfinished)
        _generation_config(source, name, new_config).save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        add_former_names(unfinished)
        with open(os.path.join(unfinished, "README.md"), "w", encoding="utf-8") as file:
            file.write(f"---\nconverted_from: {json.dumps(name)}\n---\n\n`{name}`, written as the Qwen2 model that it "
                       "is: the same weights under today's names. It is made again when it is missing and needed.\n")
        try:
            os.rename(unfinished, folder)
        except OSError:  # another machine that shares the disk was first
            if not os.path.isdir(folder):
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _config(config, source):
    """Qwen-1's config as Qwen2Config. Raises UserError if Qwen2's network cannot be it."""
    kinds = [kind for kind in ("visual", "audio") if kind in config]
    if kinds:
        raise UserError(f"{source} is a Qwen-1 model with a part for {kinds[0]} input: only the text models can be "
                        "used here")
    wrong = [f"{name} {config[name]!r}" for name, value in FIXED.items() if config.get(name, value) != value]
    try:
        if config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]:
            wrong.append(f"kv_channels {config['kv_channels']!r}")
        if wrong:
            raise UserError(f"{source}/config.json: Qwen2's network has no {', '.join(wrong)}")
        new_config = Qwen2Config(
            vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"] // 2,  # Qwen-1 counts w1 and w2 together
            num_hidden_layers=config["num_hidden_layers"], num_attention_heads=config["num_attention_heads"],
            num_key_value_heads=config["num_attention_heads"],
            # Beyond the length that it was trained on, Qwen-1 stretches its positions (dynamic NTK, log n), and Qwen2
            # does not: within it the two are the same.
            max_position_embeddings=config.get("seq_length") or config["max_position_embeddings"],
            rope_parameters={"rope_type": "default", "rope_theta": float(config["rotary_emb_base"])},
            rms_norm_eps=config["layer_norm_epsilon"], initializer_range=config.get("initializer_range", 0.02),
            attention_dropout=config.get("attn_dropout_prob", 0.0), tie_word_embeddings=False,
            architectures=["Qwen2ForCausalLM"], dtype=config.get("torch_dtype"))
    except KeyError as error:
        raise UserError(f"{source}/config.json is not that of a Qwen-1 model: it has no {error}") from error
    if "quantization_config" in config:
        new_config.quantization_config = _quantization(config["quantization_config"])
    return new_config


def _quantization(settings):
    """The quantization config with the names of modules that it may hold under their new names."""
    settings = dict(settings)
    if settings.get("block_name_to_quantize"):
        settings["block_name_to_quantize"] = "model.layers"
    if settings.get("modules_in_block_to_quantize"):
        settings["modules_in_block_to_quantize"] = [
            [now for name in group for now in PROJECTIONS.get(name, [name])]
            for group in settings["modules_in_block_to_quantize"]]
    if backend := portable_backend(settings.get("group_size")):
        settings["backend"] = backend
    return settings


def _generation_config(source, name, config):
    """The model's generation config, which ends a chat model's answers at <|im_end|> too. Raises UserError."""
    path, settings = os.path.join(source, "generation_config.json"), {}
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                settings = json.load(file)
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    chat = "chat" in os.path.basename(name).lower()
    if "chat_format" in settings:
        chat = settings["chat_format"] == "chatml"
    known = {key for key in vars(GenerationConfig()) if not key.startswith("_")} - {"transformers_version"}
    if not settings.get("do_sample"):
        known -= {"temperature", "top_p", "top_k"}  # they have no effect then, and transformers would not save them
    try:
        generation = GenerationConfig(**{key: value for key, value in settings.items() if key in known})
        generation.validate(strict=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())}") from error
    generation.bos_token_id, generation.pad_token_id = None, config.pad_token_id
    generation.eos_token_id = [config.eos_token_id, config.pad_token_id] if chat else config.pad_token_id
    return generation


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------

def _expected(config, quantized):
    """{name: shape} of every tensor of the network; None for the shapes of quantized ones."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Qwen2ForCausalLM(config).state_dict().items()}
    if quantized:
        for name in [name for name in shapes if name.endswith("_proj.weight")]:
            del shapes[name]
            shapes |= {name.removesuffix("weight") + kind: None for kind in GPTQ_TENSORS}
    return shapes


def _convert_weights(files, folder, expected):
    """Write the weights, with no more than SHARD_SIZE bytes of them (or one tensor) in memory at a time.

    expected: see `_expected`. Returns the dtype of the embedding. Raises UserError: a damaged file, or tensors that are
    not those of the network.
    """
    groups = [(path, names) for path in files for names in _groups(path)]  # opens every file before much is written
    index, total, dtype = {}, 0, None
    for number, (path, names) in enumerate(counted(groups, "converting", "files"), 1):
        tensors, converted = _tensors(path), {}
        for name in names:
            for new_name, part in _converted(name, tensors[name], path):
                if new_name not in expected:
                    if new_name.endswith("_proj.bias") and not part.any():
                        continue  # AutoGPTQ gives every layer a bias
                    raise UserError(f"{path}: the tensor {name} is not one of a Qwen-1 model of this size")
                if expected[new_name] not in (part.shape, None):
                    raise UserError(f"{path}: the tensor {name} has the shape {list(part.shape)}, which does not fit "
                                    "the sizes in config.json")
                converted[new_name] = part
                total += part.nbytes
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors" if len(groups) > 1 else "model.safetensors"
        index |= dict.fromkeys(converted, shard)
        if "model.embed_tokens.weight" in converted:
            dtype = converted["model.embed_tokens.weight"].dtype
        try:
            save_file(converted, os.path.join(folder, shard), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
    missing = sorted(expected.keys() - index.keys())
    if missing:
        raise UserError(f"the weights in {os.path.dirname(files[0])} are not whole: "
                        f"{', '.join(missing[:3])} (by their names in Qwen2)"
                        + (f" and {len(missing) - 3} more" if len(missing) > 3 else "") + " would be missing")
    if len(groups) > 1:
        with open(os.path.join(folder, "model.safetensors.index.json"), "w", encoding="utf-8") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": index}, file, indent=1)
    return dtype


def _groups(path):
    """Lists of the names of tensors in the file, each of at most SHARD_SIZE bytes or one tensor."""
    group, size = [], 0
    for name, tensor in _tensors(path).items():
        if group and size + tensor.nbytes > SHARD_SIZE:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes
    yield group


def _tensors(path):
    """{name: tensor} of the file, which is mapped: a tensor takes memory when it is used, until all of them are let go.

    Raises UserError if the file is damaged.
    """
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path} is damaged, perhaps not downloaded to its end: "
                        f"{first_line(error)}") from error


def _converted(name, tensor, path):
    """A tensor of Qwen-1 -> [(name in Qwen2, tensor)]. Raises UserError for a name or a size that it cannot have.

    Weights and biases have their output axis first, the tensors of a GPTQ layer last (qweight, scales; and qzeros,
    where 8 or 4 columns share an int32); g_idx belongs to the input axis.
    """
    block = re.match(r"transformer\.h\.(\d+)\.", name)
    module, _, kind = name[block.end() if block else 0:].rpartition(".")
    if module not in MODULES or bool(block) == (module.startswith("transformer.") or module == "lm_head"):
        raise UserError(f"{path}: the tensor {name} is not one of a Qwen-1 model")
    prefix = f"model.layers.{block[1]}." if block else ""
    new_names = [f"{prefix}{new}.{kind}" for new in MODULES[module]]
    axis = 0 if kind == "weight" else -1
    if kind == "g_idx":
        parts = [tensor.clone() for _ in new_names]
    elif tensor.shape[axis] % len(new_names):
        raise UserError(f"{path}: the tensor {name} of shape {list(tensor.shape)} cannot be cut into query, key and "
                        "value")
    else:
        parts = [part.contiguous() for part in tensor.chunk(len(new_names), axis)]
    return list(zip(new_names, parts))
