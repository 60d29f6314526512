"""The adapter that flags ask for: which layers of the network it is on, and peft's config of it."""

import collections

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mechanisms.console import say, table
from mechanisms.tokenizer import is_base_model

# One number for each head or expert: adapters there gain nothing, and SGLang does not load those of in_proj_ba
# (https://github.com/sgl-project/sglang/issues/30499).
GATES = "in_proj_a", "in_proj_b", "in_proj_ba", "gate", "shared_expert_gate"
MLP = "gate_proj", "up_proj", "down_proj"


def empty_network(config):
    """The network of a config without its weights (from_config would share them out under ZeRO-3)."""
    with torch.device("meta"):
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def experts_of(network):
    """{name: weight} of the routed experts, which transformers keeps as one tensor for all experts of a layer."""
    return {name: parameter for name, parameter in network.named_parameters()
            if parameter.dim() == 3 and ".experts." in name}


def takes_mlps_for_experts(network):
    """Whether peft, told to adapt MLPs, adapts the routed experts, and these alone, of this network."""
    from peft.utils import transformers_weight_conversion as conversion

    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(network.config.model_type)
    return bool(experts_of(network)) and bool(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern))


def _linear_in_blocks(network):
    return [name for name, module in network.named_modules()
            if isinstance(module, torch.nn.Linear) and ".layers." in name]


def default_targets(network):
    """Last parts of the names of the linear layers inside blocks that get an adapter; routed experts are none."""
    skipped = {*GATES, *(MLP if takes_mlps_for_experts(network) else ())}
    names = dict.fromkeys(name.rpartition(".")[2] for name in _linear_in_blocks(network))
    return [name for name in names if name not in skipped]


def expert_parameters(network):
    """What --lora_experts adapts, for peft's target_parameters: the weights of routed experts, and those of the MLPs
    that peft would take for them by their names (in its target_modules)."""
    names = list(experts_of(network))
    if takes_mlps_for_experts(network):
        names += [f"{name}.weight" for name in _linear_in_blocks(network) if name.rpartition(".")[2] in MLP]
    return list(dict.fromkeys(map(_within_block, names)))


def _within_block(name):
    return name.split(".layers.")[1].partition(".")[2]


def reach(network, lora_args):
    """What the adapters reach and what they do not, as a table: layers of each kind, those of experts included."""
    counts = collections.Counter(map(_within_block, (*_linear_in_blocks(network), *experts_of(network))))
    parameters = expert_parameters(network) if lora_args.lora_experts else []
    targets = tuple(f".{name}" for name in lora_args.lora_target_modules)
    reached = {kind for kind in counts if kind in parameters or f"{kind}.weight" in parameters
               or ".experts." not in kind and kind.endswith(targets)}
    trained = sum(weight[..., 0, 0].numel() * lora_args.lora_r * sum(weight.shape[-2:])
                  for name, weight in network.named_parameters() if name.endswith(tuple(parameters)))
    return table([(word, ", ".join(f"{kind} x {count}" for kind, count in counts.items()
                                   if (kind in reached) == wanted) or "none")
                  for word, wanted in (("reached", True), ("not reached", False))]
                 + ([("trained on experts", trained)] if parameters else []))


def lora_config(path, model, tokenizer, lora_args):
    """peft's LoraConfig of a new adapter, by the flags: on linear layers, and on a base model on its embeddings too.

    path: where the model was loaded from; it tells a base model.
    """
    from peft import LoraConfig

    embeddings = lora_args.lora_embeddings
    if embeddings == "auto":
        base, reason = is_base_model(path, tokenizer)
        embeddings = "none" if not base else "chatml" if lora_args.q_lora else "full"
        say(f"{'Base' if base else 'Chat'} model: {reason}. --lora_embeddings auto is '{embeddings}' then.")
    names = [name.rpartition(".")[2] for name, module in model.named_modules()
             if module in (model.get_input_embeddings(), model.get_output_embeddings())]
    tied = model.config.tie_word_embeddings
    names = names[:1] if tied else names
    tokens = sorted(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_parameters=expert_parameters(empty_network(model.config)) if lora_args.lora_experts else None,
        **{name: value for flag, value in vars(lora_args).items() if (name := peft_name(flag))},
        modules_to_save=names if embeddings == "full" else None,
        trainable_token_indices={name: tokens for name in names} if embeddings == "chatml" else None,
        ensure_weight_tying=tied and embeddings != "none")


def peft_name(flag):
    """The field of peft's LoraConfig that a flag of LoraArguments sets: lora_r -> r. None: it sets none."""
    from peft import LoraConfig

    return next((name for name in (flag.removeprefix("lora_"), flag) if name in LoraConfig.__dataclass_fields__), None)
