"""Full fine-tuning in 6 bytes a weight: weights and gradients in bf16, both moments of AdamW in 8 bits.

bf16 keeps 8 bits of a number, so at a learning rate of 1e-5 an update is smaller than half of the last of them, and
rounding to the nearest would undo nearly all. Rounded at random, up as often as what is cut off says, they are right on
average. `python bench/frugal.py` measures both.
"""

import contextlib

import torch
from torchao.optim import AdamW8bit

SMALL = 4096  # numbers of a tensor below which torchao keeps its moments as they are: norms and biases stay in fp32


def hold(model):
    """Hold the model's weights in bf16, and in fp32 where that costs next to nothing."""
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16 if weight.numel() >= SMALL else torch.float32)


def setup(plain):
    """A `memory.Setup` of full fine-tuning -> that with weights in bf16."""
    return plain._replace(trained=torch.bfloat16, optim="adamw_torch_8bit", optim_args=None, frugal=True)


class SeededAdamW(AdamW8bit):
    """torchao's AdamW with 8-bit moments and rounding at random, by numbers that depend on seed and step alone.

    So all ranks of DDP round alike, and a resumed run as one that was never stopped. (torchao draws from the generator
    of the process, which is another one on each rank.)
    """

    def __init__(self, params, seed, **settings):
        super().__init__(params, bf16_stochastic_round=True, **settings)
        self.seed = seed

    def step(self, closure=None):
        weights = [weight for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        made = max((int(self.state[weight]["step"]) for weight in weights if self.state[weight]), default=0)
        on_gpu = weights[0].device.type == "cuda"
        devices = [weights[0].device] if on_gpu else []
        # Compiled on a GPU, where it would hold several copies of the largest weight in fp32; on a CPU that takes g++.
        eager = contextlib.nullcontext() if on_gpu else torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(devices), eager:
            torch.manual_seed(1_000_003 * self.seed + made)
            return super().step(closure)


def optimizer(training_args):
    """-> (class, arguments) as Trainer takes them."""
    return SeededAdamW, {"seed": training_args.seed, "lr": training_args.learning_rate,
                         "betas": (training_args.adam_beta1, training_args.adam_beta2),
                         "eps": training_args.adam_epsilon}


def problems(training_args):
    """Why weights cannot be trained in bf16 with these arguments, as lines."""
    flag, found = "--trained_weights bf16", []
    if training_args.use_lora:
        found.append(f"{flag} is for full fine-tuning: adapters are small. Leave it out")
    if training_args.deepspeed or training_args.fsdp:
        found.append(f"{flag} has no effect under DeepSpeed and FSDP, which keep weights in fp32, divided among the "
                     "GPUs. Leave it out")
    if not training_args.bf16:
        found.append(f"{flag} needs --bf16" + (", and hardware with bfloat16" if training_args.fp16 else ""))
    default = type(training_args).optim
    if training_args.optim != default or training_args.optim_args:
        found.append(f"{flag} has its own optimizer (AdamW with 8-bit moments): leave out --optim and --optim_args")
    return found
