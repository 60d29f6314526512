"""How much memory training takes on each rank.

The model's config is enough: its network is built without content, and nothing is loaded. What is not counted are
fragmentation, NCCL's buffers, and what CUDA itself takes (`available_bytes` is without it).
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
from mechanisms.attention import VARLEN, WITHIN_SAMPLES, has_flash_attention
from mechanisms.head_loss import loss_bytes
from mechanisms.linear_attention import keep_within_samples
from mechanisms.lora import empty_network, last_parts, layers_of

RESERVE = 0.15  # share of the memory that is kept for what is not counted
# Elements, as the ds_config files say and most others: of each of the two buffers in which ZeRO-1 and -2 reduce
# gradients, and of the weights that ZeRO-3 gathers, or updates, at a time.
BUCKET, AT_A_TIME = 200_000_000, 1_000_000_000


class Setup(NamedTuple):
    """How a model is trained, as far as memory depends on it.

    Args:
        config: the model's. If its weights are quantized with GPTQ, it says so.
        adapter: peft's LoraConfig; None: all weights are trained.
        nf4: the linear layers' frozen weights are held in 4 bits (--q_lora on a 16-bit model).
        compute: dtype of matrix products and of frozen weights.
        trained: dtype of trained weights and their gradients; autocast casts them if `compute` is another one.
        ranks: processes that share the work.
        stage: of DeepSpeed's ZeRO; None: no DeepSpeed, and several ranks are DDP.
        offload_optimizer, offload_weights: whether DeepSpeed keeps these in the CPU's memory.
        device: torch.device that trains.
        optim, optim_args: the values of these flags.
        accumulates: whether a step has several batches.
        frugal: whether all weights are trained in bf16, without DeepSpeed (mechanisms/frugal.py).
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
    accumulates: bool = False
    frugal: bool = False


class State(NamedTuple):
    """Bytes that one rank holds from step to step."""
    weights: float
    gradients: float
    optimizer: float
    offloaded: float  # not on the device but in the CPU's memory
    notes: list[str]  # what had to be guessed


def available_bytes(device):
    """Memory that this rank can have, counting what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available / ranks_here + psutil.Process().memory_info().rss


def training_state(setup, built=None):
    """-> State.

    built: what `network_of` gives for a setup that differs only in how the ranks share the work.

    DeepSpeed keeps an fp32 copy of what is trained, divided among the ranks as the optimizer's state is, and if that is
    offloaded an fp32 gradient too; from stage 2 on the gradients are divided, in stage 3 the weights (Rajbhandari et
    al., ZeRO, arXiv:1910.02054, section 5). It adds gradients up in fp32, as the ds_config files ask. DDP's buckets are
    the gradients (see `SafeTrainer`), but where a step has several batches: those of all but the last lie beside them.
    """
    network, packed = built or network_of(setup)
    embeddings = {module.weight for module in network.modules() if isinstance(module, torch.nn.Embedding)}
    optim, notes, deepspeed = setup.optim, [], setup.stage is not None
    if optimizer_bytes(optim) is None:
        notes.append(f"what --optim {optim} holds is not known here and counted as AdamW's")
        optim = "adamw"
    # Trainer gives embeddings 32 bits in bitsandbytes' optimizers; DeepSpeed does not let them know their weights.
    of_embeddings = optim if deepspeed or optim.startswith("adamw_torch") else optim.replace("8bit", "32bit")
    weights = gradients = copies = moments = 0
    for parameter in network.parameters():
        weights += packed.get(parameter, parameter.nbytes)
        if parameter.requires_grad:
            summed_here = deepspeed and not setup.offload_optimizer
            gradients += 4 * parameter.numel() if summed_here else parameter.nbytes
            copies += deepspeed * (8 if setup.offload_optimizer else 4) * parameter.numel()
            moments += parameter.numel() * optimizer_bytes(
                of_embeddings if parameter in embeddings else optim, setup.optim_args)
    if setup.ranks > 1:
        weights /= setup.ranks if setup.stage == 3 else 1
        gradients *= 1 + setup.accumulates if not deepspeed else 1 / setup.ranks if setup.stage >= 2 else 1
        copies, moments = (held / (setup.ranks if setup.stage else 1) for held in (copies, moments))
    offloaded = 0
    if setup.device.type != "cpu":
        if setup.offload_weights:
            weights, offloaded = 0, weights
        if setup.offload_optimizer or optim.startswith("paged"):  # pages leave the device where it has no room
            moments, offloaded = 0, offloaded + moments
        if setup.offload_optimizer:
            copies, offloaded = 0, offloaded + copies
    return State(weights, gradients, copies + moments, offloaded, notes)


def optimizer_bytes(optim, optim_args=None):
    """Bytes that the optimizer of --optim and --optim_args holds per trained weight; None: not known here.

    From the sources of torch, transformers and bitsandbytes: numbers per weight, in fp32 or in 8 bits and one fp32
    scale for 256 of them (tensors below 4,096 stay in fp32). Adam has two moments, AdEMAMix three, Lion, Adagrad and
    RMSprop one, SGD none; SGD and RMSprop have one more with momentum. Adafactor's sums of rows and columns are next to
    nothing.
    """
    numbers = {"adam": 2, "ademamix": 3, "lion": 1, "adagrad": 1, "rmsprop": 1, "sgd": 0, "adafactor": 0}
    name = next((name for name in numbers if optim.removeprefix("paged_").startswith(name)), None)
    if name is None:
        return None
    momentum = name in ("sgd", "rmsprop") and "momentum=" in (optim_args or "")
    return (numbers[name] + momentum) * (1 + 4 / 256 if "8bit" in optim else 4)


def working_bytes(setup, state):
    """(in the passes of a row, in the update of the weights): what is held for a while beside the State."""
    if setup.device.type == "cpu":  # where buffers take no memory before they are filled
        return 0, 0
    if setup.stage == 3:  # of weights that are updated together, it makes one piece of the gradients
        sizes = [parameter.numel() for parameter in empty_network(setup.config).parameters()]
        gathered = min(sum(sizes), max(AT_A_TIME, *sizes)) * setup.compute.itemsize
        return gathered, 0 if setup.offload_optimizer else min(state.gradients, 4 * AT_A_TIME)
    if setup.stage:
        return 2 * BUCKET * setup.compute.itemsize, 0
    # torch's AdamW, where it is not the fused one, takes the roots of all second moments at once.
    return 0, state.optimizer / 2 if setup.optim == "adamw_torch" and setup.stage is None else 0


def row_loss_bytes(setup, tokens):
    """The most that the loss of a row takes, if all its tokens are trained: when its activations are all there."""
    return loss_bytes(network_of(setup, 1)[0], tokens, setup.compute, setup.device.type)


def activation_bytes(setup, tokens):
    """(stored, recomputed): what is kept of one row for the backward pass, without and with checkpointing.

    Counted, not computed from a formula: the network runs with one and with two periods of its layers (a layer, where
    all are alike), on short and on longer rows, on tensors that have no content, and all that autograd saves is added
    up. It grows linearly with layers and tokens.
    """
    layers, unpacked, period = setup.config.num_hidden_layers, 0, _period(setup)
    first_period, layer, handed_on = _layers(setup, period)
    if gptq.is_gptq(setup.config):  # the kernel unpacks a layer's weights, and autograd keeps what it made of them
        unpacked = sum(weight.numel() for weight in network_of(setup, 1)[1]) * setup.compute.itemsize
    # Checkpointed, there are the inputs of all layers and the one layer at work (of a period: the mean of its
    # layers). What does not grow with the row are copies of trained weights: autocast keeps those of all layers until
    # the forward pass ends.
    inputs = layers * tokens * handed_on
    return (first_period(tokens) + (layers - period) * layer(tokens) + layers * unpacked,
            first_period(tokens) - (period - 1) * layer(tokens) + (layers - 1) * layer(0) + inputs + unpacked)


def evaluation_bytes(setup, tokens):
    """The most that evaluation takes for a row of so many tokens: nothing is kept for a backward pass, so there is the
    layer at work, or the loss."""
    network = network_of(setup, 1)[0].requires_grad_(False)
    layer = _layers(setup, _period(setup))[1](tokens)
    return max(layer, loss_bytes(network, tokens, setup.compute, setup.device.type))


def _layers(setup, period):
    """(tokens -> bytes that autograd saves of a row in the first `period` layers, and on average in each further one;
    bytes of a token that one layer hands to the next)."""
    short, long = 128, 256
    runs = {(layers, length): _run(setup, layers, length) for layers in (period, 2 * period)
            for length in (short, long)}

    def at(tokens, layers):
        first, second = (runs[layers, length][0] for length in (short, long))
        return first + (second - first) * (tokens - short) / (long - short)

    return (lambda tokens: at(tokens, period), lambda tokens: (at(tokens, 2 * period) - at(tokens, period)) / period,
            runs[period, long][1] / long)


def _period(setup):
    """After how many layers the kinds of the network's layers repeat: 1 where all have weights of the same shapes."""
    kinds = [[(name, weight.shape) for name, weight in layer.named_parameters()]
             for layer in empty_network(setup.config).base_model.layers]
    return next(period for period in range(1, len(kinds) + 1) if kinds[period:] == kinds[:-period])


def network_of(setup, layers=None):
    """(the network as it is trained, on the meta device, {weight that is held in fewer bits: its bytes}).

    layers: how many of its layers; None: all.
    """
    config = copy.deepcopy(setup.config)
    if torch.cuda.is_available():
        flash = has_flash_attention(setup.device, setup.compute)
    else:  # an estimate for another machine
        flash = setup.device.type == "cuda" and setup.compute.itemsize == 2
    config._attn_implementation = VARLEN if flash else WITHIN_SAMPLES  # flash-attn's keeps as much as VARLEN
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = (2 * config.layer_types)[:layers]
    with torch.device("meta"):
        network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        packed, head = {}, network.get_output_embeddings()
        for module in network.modules():
            if isinstance(module, torch.nn.Linear) and module is not head:
                if gptq.is_gptq(config):
                    packed[module.weight] = gptq.packed_bytes(config, module)
                elif setup.nf4:  # half a byte, a byte more for 64 of them, a float for 256 of these bytes
                    packed[module.weight] = module.weight.numel() * (1 / 2 + 1 / 64 + 4 / 64 / 256)
        if setup.adapter:
            from peft import get_peft_model

            adapter = copy.deepcopy(setup.adapter)
            adapter.init_lora_weights = True  # others compute with the weights
            if layers:  # of which each is like one that has adapters
                adapter.layers_to_transform = adapter.layers_pattern = None
                adapter.target_modules = last_parts(layers_of(adapter.target_modules, empty_network(setup.config)))
            with gptq.gptqmodel_hidden(True):
                network = get_peft_model(network, adapter).get_base_model()
    keep_within_samples(network)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(setup.trained if parameter.requires_grad else setup.compute)
    return network, packed


def _run(setup, layers, tokens):
    """(bytes that autograd saves of a row in that many layers, bytes of what one layer hands to the next)."""
    network, _ = network_of(setup, layers)
    saved = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage  # held, so that its address stays its own
        return tensor

    bounds = torch.tensor([0, tokens], dtype=torch.int32)  # of the samples in the row: one
    with FakeTensorMode(allow_non_fake_inputs=True):
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
                _FusedDropout() if setup.device.type == "cuda" else contextlib.nullcontext(), _GroupedInFp32():
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


class _GroupedInFp32(TorchFunctionMode):
    """The experts' matrix product in fp32, which torch has on a CPU, but not for tensors without content."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch._grouped_mm and arguments[0].dtype != torch.bfloat16:
            return torch.ops.transformers.grouped_mm_fallback(*arguments[:2], offs=options["offs"])
        return function(*arguments, **(options or {}))
