"""Which layers get an adapter, and which do not: read from the network, which has more kinds than one list knows."""

import collections

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mechanisms.console import table

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


def reach(network, targets):
    """What adapters on the layers of these names reach, as lines of a table: layers of each kind, experts included."""
    names = [*_linear_in_blocks(network), *experts_of(network)]
    counts = collections.Counter(name.split(".layers.")[1].partition(".")[2] for name in names)
    return table([(word, ", ".join(
        f"{kind} x {count}" for kind, count in counts.items()
        if (".experts." not in kind and kind.endswith(tuple(f".{name}" for name in targets))) == reached) or "none")
        for word, reached in (("reached", True), ("not reached", False))])
