"""What a training run needs of a rank's memory, from a model's config alone, and whether a row's activations fit.

Nothing is loaded and no device is touched: networks are built without content. What is not counted: fragmentation, the
buffers of collectives, and the weights that ZeRO-3 gathers for the layer at work.
"""

import contextlib
import copy
import os
from typing import NamedTuple

import psutil
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

from mechanisms import gptq
from mechanisms.attention import VARLEN, WITHIN_SAMPLES
from mechanisms.head_loss import loss_bytes

RESERVE = 0.15  # share of the memory that is kept for what is not counted


class Setup(NamedTuple):
    """How a model is trained, as far as memory depends on it.

    Args:
        config: of the model; that its weights are quantized with GPTQ is read here.
        adapter: peft's LoraConfig, or None: all weights are trained.
        nf4: the frozen weights of linear layers are held in 4 bits (--q_lora on a 16-bit model).
        compute: dtype of the products and of the frozen weights.
        trained: dtype of the trained weights and their gradients. Where it differs from `compute`, autocast casts them.
        ranks: number of processes that share the work.
        stage: DeepSpeed's ZeRO stage, or None without DeepSpeed. Without it several ranks are DDP.
        offload_optimizer, offload_weights: DeepSpeed keeps these in the CPU's memory.
        device: torch.device that trains.
        optim, optim_args: as --optim and --optim_args.
    """
    config: PretrainedConfig
    adapter: object = None
    nf4: bool = False
    compute: torch.dtype = torch.bfloat16
    trained: torch.dtype = torch.float32
    ranks: int = 1
    stage: int | None = None
    offload_optimizer: bool = False
    offload_weights: bool = False
    device: torch.device = torch.device("cuda")
    optim: str = "adamw_torch_fused"
    optim_args: str | None = None


class State(NamedTuple):
    """What one rank holds from the first step to the last, in bytes."""
    weights: float
    gradients: float
    optimizer: float
    on_cpu: float  # what was offloaded, which the device does not hold
    notes: list[str]  # where this is a guess


def checkpointing_needed(setup, tokens):
    """Decide --gradient_checkpointing auto, for all ranks alike: -> (bool, a line that says why).

    tokens: of the longest row that a rank will see.
    """
    if getattr(setup.config, "num_experts", None):
        return True, "gradient checkpointing is on: what a network of experts needs without it depends on the data"
    available, state = available_bytes(setup.device), state_bytes(setup)
    held = state.weights + state.gradients + state.optimizer + row_loss_bytes(setup, tokens)
    stored, recomputed = (held + activations for activations in activation_bytes(setup, tokens))
    needed = torch.tensor(float(stored > available * (1 - RESERVE)), device=setup.device)
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(needed, torch.distributed.ReduceOp.MAX)
    return bool(needed), "; ".join([
        f"gradient checkpointing is {'on' if needed else 'off'}: a row of {tokens:,} tokens needs about "
        f"{stored / 1e9:,.1f} GB without it, {recomputed / 1e9:,.1f} GB with it, of {available / 1e9:,.1f} GB",
        *state.notes])


def available_bytes(device):
    """Memory that this rank can have, counting what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available / ranks_here + psutil.Process().memory_info().rss


def state_bytes(setup):
    """-> State.

    DeepSpeed keeps an fp32 copy of what is trained, divided among the ranks as the optimizer's state is; from stage 2
    on the gradients are divided too, in stage 3 the weights (Rajbhandari et al., ZeRO, arXiv:1910.02054, section 5).
    Offloaded, it keeps an fp32 gradient beside that copy as well. DDP has its buckets: the gradients a second time.
    """
    network, packed = _network(setup)
    stage, ranks = setup.stage or 0, setup.ranks
    weights = gradients = trained = 0
    for parameter in network.parameters():
        weights += packed.get(parameter, parameter.nbytes)
        if parameter.requires_grad:
            trained += parameter.numel()
            gradients += parameter.nbytes
    moments, notes = optimizer_bytes(setup.optim, setup.optim_args), []
    if moments is None:
        moments = optimizer_bytes("adamw")
        notes.append(f"what --optim {setup.optim} keeps is not known here, and counted as AdamW's")
    weights /= ranks if stage == 3 else 1
    gradients *= 1 / ranks if stage >= 2 else 2 if setup.stage is None and ranks > 1 else 1
    optimizer = trained * moments
    if setup.stage is not None:
        optimizer = trained * (moments + (8 if setup.offload_optimizer else 4)) / (ranks if stage else 1)
    on_cpu = 0
    if setup.device.type != "cpu":
        if setup.offload_optimizer or setup.optim.startswith("paged"):  # the driver moves pages out where there is need
            optimizer, on_cpu = 0, optimizer
        if setup.offload_weights:
            weights, on_cpu = 0, on_cpu + weights
    return State(weights, gradients, optimizer, on_cpu, notes)


def optimizer_bytes(optim, optim_args=None):
    """Bytes that an optimizer, by its name for --optim, keeps per trained weight. None: not known here.

    Tensors as large as the weights, by the sources of torch, transformers and bitsandbytes: Adam has two moments,
    AdEMAMix three, Lion, Adagrad and RMSprop one, SGD none, and the last two one more with momentum. Adafactor has a sum
    per row and column, next to nothing. They are in fp32; in 8 and 4 bits bitsandbytes and torchao add one fp32 scale
    to each 256 values (and leave tensors of less than 4,096 in fp32).
    """
    kinds = {"adam": 2, "ademamix": 3, "lion": 1, "adagrad": 1, "rmsprop": 1, "sgd": 0, "adafactor": 0}
    kind = next((kind for kind in kinds if optim.removeprefix("paged_").startswith(kind)), None)
    if kind is None:
        return None
    tensors = kinds[kind] + (kind in ("sgd", "rmsprop") and "momentum=" in (optim_args or ""))
    return tensors * (1 + 4 / 256 if "8bit" in optim else 1 / 2 + 4 / 256 if "4bit" in optim else 4)


def row_loss_bytes(setup, tokens):
    """The most that the loss of one row takes, which is at the end of the forward pass, if all its tokens are trained."""
    return loss_bytes(_network(setup, 1)[0], tokens, setup.compute, setup.device.type)


def activation_bytes(setup, tokens):
    """(stored, recomputed): what is kept of one row for the backward pass, without and with checkpointing.

    Counted, not computed from a formula: the network runs with one and with two layers, on short and on longer rows, on
    tensors that have no content, and all that autograd saves is added up. It grows linearly with layers and tokens.

    With checkpointing that is the input of each layer and the one layer at work. What does not grow with the row are
    copies of trained weights: autocast keeps those of all layers until the forward pass ends, checkpointed or not.
    Beside that GPTQ's kernel unpacks the weights of a layer, and autograd keeps what it made of them.
    """
    short, long = 128, 256
    runs = {(layers, length): _run(setup, layers, length) for layers in (1, 2) for length in (short, long)}

    def at(tokens, layers):
        first, second = (runs[layers, length][0] for length in (short, long))
        return first + (second - first) * (tokens - short) / (long - short)

    def layer(tokens):
        return at(tokens, 2) - at(tokens, 1)

    layers = setup.config.num_hidden_layers
    unpacked = 0
    if gptq.is_gptq(setup.config):
        unpacked = sum(weight.numel() for weight in _network(setup, 1)[1]) * setup.compute.itemsize
    inputs = layers * tokens * runs[1, long][1] / long
    return (at(tokens, 1) + (layers - 1) * layer(tokens) + layers * unpacked,
            at(tokens, 1) + (layers - 1) * layer(0) + inputs + unpacked)


def _network(setup, layers=None):
    """-> (the network as it is trained, without content, {each weight that is held packed: its bytes}).

    layers: how many of its layers; None is all.
    """
    config = copy.deepcopy(setup.config)
    on_gpu = setup.device.type == "cuda" and setup.compute.itemsize == 2
    config._attn_implementation = VARLEN if on_gpu else WITHIN_SAMPLES  # flash-attn's keeps as much as VARLEN
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    with torch.device("meta"):
        network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        packed, head = {}, network.get_output_embeddings()
        for module in network.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                if gptq.is_gptq(config):
                    packed[module.weight] = gptq.packed_bytes(config, module)
                elif setup.nf4:  # half a byte, a byte for 64 of them, and a float for 256 of these
                    packed[module.weight] = module.weight.numel() * (1 / 2 + 1 / 64 + 4 / 64 / 256)
        if setup.adapter:
            from peft import get_peft_model

            with gptq.gptqmodel_hidden(True):
                network = get_peft_model(network, copy.deepcopy(setup.adapter)).get_base_model()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(setup.trained if parameter.requires_grad else setup.compute)
    return network, packed


def _run(setup, layers, tokens):
    """(bytes that autograd saves of a row in that many layers, bytes of what one layer hands to the next)."""
    network, _ = _network(setup, layers)
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that its address stays its own
        return tensor

    bounds = torch.tensor([0, tokens], dtype=torch.int32)  # of the samples in the row: one
    with FakeTensorMode():
        for module in network.modules():
            for name, tensor in module._parameters.items():
                if tensor is not None:
                    module._parameters[name] = torch.nn.Parameter(
                        torch.empty(tensor.shape, dtype=tensor.dtype), tensor.requires_grad)
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), \
                torch.autocast("cpu", setup.compute, enabled=setup.compute != setup.trained), \
                _FusedDropout() if setup.device.type == "cuda" else contextlib.nullcontext():
            output = network.train().base_model(
                input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False, cu_seq_lens_q=bounds,
                cu_seq_lens_k=bounds, max_length_q=tokens, max_length_k=tokens)
        return (sum(storage.nbytes() for address, storage in saved.items() if address not in weights),
                output.last_hidden_state.nbytes)


class _FusedDropout(TorchFunctionMode):
    """Dropout as on a GPU, which keeps a byte for each element instead of a float."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.nn.functional.dropout:
            return torch.native_dropout(*arguments, options["p"], options["training"])[0]
        return function(*arguments, **(options or {}))
