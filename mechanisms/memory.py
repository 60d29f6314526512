"""Whether a row's activations fit into memory, or are better computed a second time in the backward pass."""

import copy
import os

import psutil
import torch
from peft import get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from mechanisms.attention import WITHIN_SAMPLES
from mechanisms.head_loss import chunk_bytes

RESERVE = 0.15  # share of the memory for fragmentation, buffers of collectives and what an estimate does not know


def checkpointing_needed(model, training_args, tokens):
    """Decide --gradient_checkpointing auto, for all ranks alike: -> (bool, a line that says why).

    Args:
        model: as it will be trained, adapters included.
        tokens: of the longest row that a rank will see.
    """
    if getattr(model.config, "num_experts", None):
        return True, "gradient checkpointing is on: what a network of experts needs without it depends on the data"
    available, state = available_bytes(training_args), state_bytes(model, training_args)
    stored, recomputed = activation_bytes(model, training_args, tokens)
    needed = torch.tensor(float(state + stored > available * (1 - RESERVE)), device=training_args.device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(needed, torch.distributed.ReduceOp.MAX)
    return bool(needed), (
        f"gradient checkpointing is {'on' if needed else 'off'}: a row of {tokens:,} tokens needs about "
        f"{(state + stored) / 1e9:,.1f} GB without it, {(state + recomputed) / 1e9:,.1f} GB with it, of "
        f"{available / 1e9:,.1f} GB")


def available_bytes(training_args):
    """Memory that this rank can have, counting what it holds already."""
    device = training_args.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available / ranks_here + psutil.Process().memory_info().rss


def state_bytes(model, training_args):
    """Weights, gradients, AdamW's two moments and the loss's chunk of logits on this rank, in bytes.

    DeepSpeed keeps an fp32 copy of what is trained, divided among the ranks as the moments are; from stage 2 on the
    gradients are divided too, in stage 3 the weights (Rajbhandari et al., ZeRO, arXiv:1910.02054, section 5).
    """
    deepspeed = getattr(training_args, "hf_deepspeed_config", None)
    zero = deepspeed.config.get("zero_optimization", {}) if deepspeed else {}
    ranks, stage = training_args.world_size, zero.get("stage", 0)
    offloaded = zero.get("offload_optimizer", {}).get("device") == "cpu" and training_args.device.type == "cuda"
    total = 3 * chunk_bytes(training_args.device.type)
    for parameter in model.parameters():
        count, size = getattr(parameter, "ds_numel", parameter.numel()), parameter.element_size()
        total += count * size / (ranks if stage == 3 else 1)
        if parameter.requires_grad:
            total += count * size / (ranks if stage >= 2 else 1)
            total += 0 if offloaded else count * (12 / ranks if stage else 8)
    return total


def activation_bytes(model, training_args, tokens):
    """(stored, recomputed): what autograd keeps of one row for the backward pass, without and with checkpointing.

    Counted, not computed from a formula: the network runs with one and with two layers, on short and on longer rows, on
    tensors that have no content, and all that autograd saves is added up. It grows linearly with layers and tokens.
    """
    adapter = getattr(model, "peft_config", {}).get("default")
    dtype = next(parameter.dtype for parameter in model.parameters()
                 if parameter.is_floating_point() and not (adapter and parameter.requires_grad))
    autocast = (training_args.bf16 or training_args.fp16) and not training_args.deepspeed
    short, long = 128, 256
    one, two = ({length: _saved_bytes(model.config, layers, adapter, dtype, autocast, length)
                 for length in (short, long)} for layers in (1, 2))

    def at(tokens, count):
        return count[short] + (count[long] - count[short]) * (tokens - short) / (long - short)

    layer = at(tokens, two) - at(tokens, one)
    layers = model.config.num_hidden_layers
    inputs = layers * tokens * model.config.hidden_size * dtype.itemsize
    return at(tokens, one) + (layers - 1) * layer, at(tokens, one) + inputs


def _saved_bytes(config, layers, adapter, dtype, autocast, tokens):
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    config._attn_implementation = WITHIN_SAMPLES  # flash-attn's keeps as much, but wants a GPU
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            if adapter:
                network = get_peft_model(network, copy.deepcopy(adapter)).get_base_model()
    finally:
        torch.set_default_dtype(default)
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that its address stays its own
        return tensor

    with FakeTensorMode():
        for module in network.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = torch.nn.Parameter(
                        torch.empty(tensor.shape, dtype=tensor.dtype), requires_grad=tensor.requires_grad)
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), \
                torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            network.train().base_model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
        return sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
