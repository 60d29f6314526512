"""The adapter that flags ask for: which layers of the network it is on, and peft's config of it."""

import collections
import functools
import re

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mechanisms.console import say, table
from mechanisms.errors import UserError
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


def _linear_layers(network):
    """{full name: module} of all linear layers."""
    return {name: module for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}


def all_linear(network):
    """Last parts of the names of all linear layers but the output layer."""
    head = network.get_output_embeddings()
    return last_parts(name for name, module in _linear_layers(network).items() if module is not head)


def last_parts(names):
    """The last parts of full names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def default_targets(network):
    """Last parts of the names of the linear layers that get an adapter if none are named; routed experts are none."""
    skipped = {*GATES, *(MLP if takes_mlps_for_experts(network) else ())}
    return [name for name in all_linear(network) if name not in skipped]


def is_target(targets, name):
    """Whether the layer of this full name is among the targets.

    targets: names, whole or the last parts of them; or a regular expression that whole names must match, as a str.
    """
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return f".{name}".endswith(tuple(f".{target}" for target in targets))


def layers_of(targets, network):
    """Full names of the modules that the targets name, or of the linear layers that their regular expression matches.

    Raises UserError: it is no regular expression.
    """
    names = _linear_layers(network) if isinstance(targets, str) else [name for name, _ in network.named_modules()]
    try:
        return [name for name in names if is_target(targets, name)]
    except re.error as error:
        raise UserError(f"--lora_target_modules {targets}: no layer has this name, and it is no regular expression: "
                        f"{error}") from error


def read_targets(words, network):
    """--lora_target_modules -> names of layers, or a regular expression as a str.

    words: None: the network's own default; all-linear; names; or a single word, which is a regular expression if it is
    no name.
    """
    if words is None:
        return default_targets(network)
    if words == ["all-linear"]:
        return all_linear(network)
    return words if len(words) > 1 or layers_of(words, network) else words[0]


def expert_parameters(network):
    """What --lora_experts adapts, for peft's target_parameters: the weights of routed experts, and those of the MLPs
    that peft would take for them by their names (in its target_modules)."""
    names = list(experts_of(network))
    if takes_mlps_for_experts(network):
        names += [f"{name}.weight" for name in _linear_layers(network) if name.rpartition(".")[2] in MLP]
    return list(dict.fromkeys(map(_within_block, names)))


def _within_block(name):
    return re.sub(r".*\.layers\.\d+\.", "", name)


def reach(network, lora_args):
    """What the adapters reach and what they do not, as lines of a table: layers of each kind, experts included."""
    parameters = tuple(expert_parameters(network)) if lora_args.lora_experts else ()
    experts = {name.removesuffix(".weight"): weight for name, weight in network.named_parameters()
               if name.endswith(parameters)}
    reached = {*layers_of(lora_args.lora_target_modules, network), *experts}
    counts = {True: collections.Counter(), False: collections.Counter()}
    for name in [*_linear_layers(network), *experts_of(network)]:
        if name in reached or ".layers." in name:
            counts[name in reached][_within_block(name)] += 1
    lines = [(word, ", ".join(f"{kind} x {count}" for kind, count in counts[wanted].items()) or "none")
             for word, wanted in (("reached", True), ("not reached", False))]
    if experts:
        lines.append(("trained on experts", sum(weight[..., 0, 0].numel() * lora_args.lora_r * sum(weight.shape[-2:])
                                                for weight in experts.values())))
    return table(lines)


def lora_config(path, model, tokenizer, lora_args, say=say):
    """peft's LoraConfig of a new adapter, by the flags: on linear layers, and on a base model on its embeddings too.

    Args:
        path: where the model is loaded from; it tells a base model.
        model: it, or its empty network.
        say: called with a line on what was decided.
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
    settings = {name: value for flag, value in vars(lora_args).items() if (name := peft_name(flag))}
    start = lora_args.init_lora_weights
    settings["init_lora_weights"] = start if start == "gaussian" else True
    if is_part_of_weights(start):  # see start_from_weights; the scale stays what it is
        settings["r"] *= 2
        settings["lora_alpha"] *= 2 ** 0.5 if lora_args.use_rslora else 2
    if isinstance(lora_args.lora_target_modules, str):  # on mixtures of experts peft keeps only the last parts of names
        settings["target_modules"] = layers_of(lora_args.lora_target_modules, model)
    return LoraConfig(
        task_type="CAUSAL_LM", **settings,
        target_parameters=expert_parameters(model) if lora_args.lora_experts else None,
        modules_to_save=names if embeddings == "full" else None,
        trainable_token_indices={name: tokens for name in names} if embeddings == "chatml" else None,
        ensure_weight_tying=tied and embeddings != "none")


def is_part_of_weights(start):
    """Whether adapters begin as a part of the weights under them, by this value of --init_lora_weights."""
    return start.startswith(("pissa", "olora"))


def impossible_adapter(training_args, lora_args):
    """What is wrong with the settings of a new adapter, or excludes each other, as lines."""
    start, problems = lora_args.init_lora_weights, []
    if lora_args.lora_experts and lora_args.lora_dropout:
        problems.append("--lora_experts: adapters on experts cannot have dropout: add --lora_dropout 0")
    if lora_args.lora_experts and lora_args.use_dora:
        problems.append("--use_dora: not with --lora_experts, for which peft has no DoRA. Leave one of them out")
    if not re.fullmatch(r"true|gaussian|olora|pissa(_niter_\d+)?", start):
        problems.append(f"--init_lora_weights {start}: true, gaussian, olora, pissa or pissa_niter_N. Of peft's others "
                        "eva, corda and lora_ga make passes over the data of their own, and loftq changes the base")
    if is_part_of_weights(start):
        problems += [f"{flag}: not with --init_lora_weights {start}, {reason}" for flag, given, reason in (
            ("--q_lora", lora_args.q_lora, "which takes its start from 16-bit weights. Use --use_lora"),
            ("--lora_experts", lora_args.lora_experts, "which only linear layers have. Leave one of them out"),
            ("--fsdp", training_args.fsdp, "of which one half is not trained. Use --deepspeed"),
            (f"--weight_decay {training_args.weight_decay}", training_args.weight_decay,
             "which would shrink the half of it that is not trained. Give --weight_decay 0")) if given]
    return problems


def start_from_weights(model, start):
    """Begin new adapters as the part of the weights under them that PiSSA or OLoRA chooses.

    These methods (arXiv:2404.02948, arXiv:2406.01775) take that part out of the base model's weights, and the adapter
    fits no others. Here a second half of each adapter subtracts it, and is not trained: the same function of the same
    trained weights, and the result is a plain adapter, of twice the rank, on the base model as it is.

    model: peft's, with adapters of twice the rank. Raises UserError: one is not on a linear layer.
    """
    from peft.tuners.lora import Linear, LoraLayer
    from peft.utils.integrations import gather_params_ctx

    rank = model.peft_config["default"].r // 2
    say(f"note: --init_lora_weights {start}: the adapters have a rank of {2 * rank}; one half is trained, the other "
        "subtracts from the weights what that begins as")
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if type(layer) is not Linear:
            raise UserError(f"--init_lora_weights {start}: only linear layers have such a start, and {name} is none")
        down, up, weight = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.get_base_layer().weight
        dtype = down.dtype
        with gather_params_ctx(weight, modifier_rank=None):
            whole = weight.data.clone()
            layer.r["default"] = rank
            if start == "olora":
                layer.olora_init("default")
            else:
                layer.pissa_init("default", start)
            weight.data = whole
        layer.r["default"] = 2 * rank
        down.data = torch.cat([down.data, down.data]).to(dtype)
        up.data = torch.cat([up.data, -up.data], dim=1).to(dtype)
        down.register_hook(functools.partial(_without_second_half, 0))
        up.register_hook(functools.partial(_without_second_half, 1))


def _without_second_half(dim, gradient):
    first, second = gradient.chunk(2, dim)
    return torch.cat([first, torch.zeros_like(second)], dim)


def peft_name(flag):
    """The field of peft's LoraConfig that a flag of LoraArguments sets: lora_r -> r. None: it sets none."""
    from peft import LoraConfig

    return next((name for name in (flag.removeprefix("lora_"), flag) if name in LoraConfig.__dataclass_fields__), None)
