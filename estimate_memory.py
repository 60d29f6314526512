"""What fits: the GPU memory that training takes, by method and strategy, from a model's config.json alone.

  python estimate_memory.py Qwen/Qwen2.5-7B-Instruct                           # every method on one GPU
  python estimate_memory.py Qwen/Qwen2.5-7B-Instruct --gpus 4 --gpu_memory 24  # every strategy
  python estimate_memory.py MODEL --use_lora --model_max_length 4096 --json   # with flags of finetune.py

MODEL is a folder or a name on the Hub; of its files only config.json is read (and the small ones beside it, where its
name does not say whether it is a chat model). All flags of finetune.py are taken, so that its command line can be
pasted here. --use_lora, --q_lora, --trained_weights and --deepspeed choose what is shown; without them all is. A row
has --model_max_length (2,048 if it is not given) x --per_device_train_batch_size (1) tokens.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from mechanisms.errors import UserError, user_errors_end_the_program
from mechanisms.flags import prepare_command_line, read_values
from mechanisms.quiet import silence

FINETUNE = str(Path(__file__).with_name("finetune.py"))
CARDS = 16, 24, 40, 80, 141  # GB that GPUs are sold with


@dataclass
class EstimateArguments:
    gpus: int = field(default=1, metadata={"help": "GPUs that share the work."})
    gpu_memory: float = field(default=None, metadata={
        "help": "GB of each (default: a column for each of 16, 24, 40, 80 and 141)."})
    json: bool = field(default=False, metadata={"help": "Print JSON."})


if __name__ == "__main__":  # wrong flags are worth knowing before torch is imported
    with user_errors_end_the_program():
        silence()
        COMMAND_LINE = prepare_command_line(__file__, sys.argv[1:], FINETUNE)
    # peft imports it wherever it is installed, which takes seconds; the counted networks have none of its layers.
    sys.modules["bitsandbytes"] = None

import contextlib
import json
import math
import os
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers.utils import logging

from mechanisms import fitting, frugal, gptq
from mechanisms.console import say
from mechanisms.fitting import Need, Plan
from mechanisms.loading import check_trainable, layer_names, load_config, read_adapter
from mechanisms.lora import empty_network, experts_of, lora_config, read_targets
from mechanisms.memory import RESERVE, Setup, network_of, training_state, working_bytes
from mechanisms.paths import could_be_on_the_hub, deepspeed_file
from mechanisms.qwen1 import todays_config, todays_names
from mechanisms.tokenizer import load_tokenizer

# What a bar is made of: part: (its letter, its colour as a terminal's number).
PARTS = {"weights": ("W", 44), "adapters": ("A", 46), "gradients": ("G", 45), "optimizer": ("O", 41),
         "activations": ("X", 42), "logits": ("L", 43), "reserve": (".", 100)}
MARKS = {"fits": "+", "tight": "~", "does not fit": "-"}
BAR = 22
SCALE = 80  # GB of its whole width, or of the one card that is asked about


class Way(NamedTuple):
    """A method under a strategy.

    Args:
        strategy: such as "ZeRO-2"; "" for one GPU.
        flags: of finetune.py, that make it.
    """
    method: str
    strategy: str
    flags: str
    setup: Setup


class Estimate(NamedTuple):
    """Of a Way: {part: bytes on each GPU}, bytes in the CPU's memory of each, whether activations are computed twice,
    and {GB of a card: "fits", "tight" (there is no room for what is not counted) or "does not fit"}."""
    way: Way
    parts: dict
    offloaded: float
    checkpointing: bool
    cards: dict

    @property
    def total(self):
        """Bytes that are counted: all but the reserve."""
        return sum(self.parts.values()) - self.parts["reserve"]


class _Tokens:
    """As much of a model's tokenizer as the config of an adapter asks for: it is loaded only where the model's name
    does not say whether it is a chat model."""

    def __init__(self, path):
        self.path = path

    def convert_tokens_to_ids(self, tokens):
        if isinstance(tokens, str):
            return load_tokenizer(self.path).convert_tokens_to_ids(tokens)
        return list(range(len(tokens)))


class Model:
    """A model as it would be trained with the flags of finetune.py, {dataclass: their values}. Raises UserError."""

    def __init__(self, path, groups):
        self.path = path
        self.training = SimpleNamespace(**vars(groups["transformers"]), **vars(groups["TrainingArguments"]))
        self.lora_args = groups["LoraArguments"]
        self.config = todays_config(path, self.training.cache_dir) or load_config(path, self.training.cache_dir)
        self.lora_args.q_lora |= gptq.is_gptq(self.config)
        self.network = empty_network(self.config)
        self.adapters = {}

    @property
    def tokens(self):
        """Of a row: the most that a batch can hold."""
        return self.training.model_max_length * self.training.per_device_train_batch_size

    @property
    def compute(self):
        training = self.training
        return torch.float16 if training.fp16 else torch.float32 if training.bf16 is False else torch.bfloat16

    def adapter(self, q_lora):
        """peft's LoraConfig (that of --q_lora may have others of a base model's embeddings)."""
        if q_lora not in self.adapters:
            arguments = SimpleNamespace(**vars(self.lora_args) | {"q_lora": q_lora})
            if arguments.lora_weight_path:
                self.adapters[q_lora] = read_adapter(arguments.lora_weight_path)
            else:
                words = arguments.lora_target_modules
                words = words and todays_names(words, layer_names(self.network))
                arguments.lora_target_modules = read_targets(words, self.network)
                check_trainable(self.path, self.config, SimpleNamespace(use_lora=True), arguments)
                adapter = lora_config(self.path, self.network, _Tokens(self.path), arguments, say=lambda line: None)
                self.adapters[q_lora] = adapter if adapter != self.adapters.get(False) else self.adapters[False]
        return self.adapters[q_lora]

    def ways(self, gpus):
        """Every Way that the flags leave open, the methods and strategies in the order of what they cost the user."""
        training, quantized = self.training, gptq.is_gptq(self.config)
        plain = Setup(self.config, compute=self.compute, ranks=gpus,
                      optim=training.optim or Setup._field_defaults["optim"],
                      optim_args=training.optim_args, accumulates=training.gradient_accumulation_steps > 1,
                      device=torch.device("cpu" if training.use_cpu else "cuda"))
        asked = "Q-LoRA" if self.lora_args.q_lora else "LoRA" if training.use_lora else None
        if not asked and not quantized:
            yield from self._strategies("full-parameter", "", plain)
        if asked in (None, "LoRA") and training.trained_weights != "bf16" and not quantized:
            yield from self._strategies("LoRA", "--use_lora", plain._replace(adapter=self.adapter(False)))
        if asked == "Q-LoRA" or asked is None and training.trained_weights != "bf16" and not experts_of(self.network):
            yield from self._strategies("Q-LoRA", "--q_lora",
                                        plain._replace(adapter=self.adapter(True), nf4=not quantized))

    def _strategies(self, method, flags, setup):
        config, trained = _zero_of(self.training.deepspeed), self.training.trained_weights
        if config is None:
            name, none = ("DDP", "--deepspeed none") if setup.ranks > 1 else ("", "")  # the launchers name one
            if trained != "bf16":
                yield Way(method, name, f"{flags} {none}".strip(), setup)
            if not setup.adapter and setup.compute == torch.bfloat16 and trained != "fp32":
                yield Way(method, f"{name}{name and ', '}weights in bf16", f"{none} --trained_weights bf16".strip(),
                          frugal.setup(setup))
        if trained == "bf16" or (self.training.deepspeed or "").lower() == "none":
            return
        for stage, offload in ((2, False), (3, False), (2, True), (3, True)):
            file = f"ds_config_zero{stage}{'_offload' if offload else ''}.json"
            zero = config or {"file": file, "stage": stage, "optimizer": offload, "weights": offload and stage == 3}
            sharded = setup.nf4 or gptq.is_gptq(self.config)
            if zero["stage"] == 3 and sharded or not config and setup.ranks == 1 and not offload:
                continue
            offloads = zero["optimizer"] or zero["weights"]
            yield Way(method, f"ZeRO-{zero['stage']}{', offload' if offloads else ''}",
                      f"{flags} --deepspeed {zero['file']}".strip(),
                      setup._replace(stage=zero["stage"], trained=setup.compute, offload_optimizer=zero["optimizer"],
                                     offload_weights=zero["weights"]))
            if config:
                return

    def estimates(self, gpus, cards):
        """An Estimate of each way, as soon as it is made."""
        asked = str(self.training.activation_checkpointing).lower()
        measured, built = {}, {}
        for way in self.ways(gpus):
            setup = way.setup
            plan = Plan(setup, None if asked == "auto" else asked == "true",
                        self.training.per_device_train_batch_size, self.training.gradient_accumulation_steps,
                        lambda items: items * self.training.model_max_length, True, None, lambda: self.adapter(False))
            kind = id(setup.adapter), setup.trained
            if kind not in measured:  # the same activations under every strategy
                measured[kind] = Need.of(plan)
            if (*kind, setup.nf4) not in built:
                built[*kind, setup.nf4] = network_of(setup)
            state = training_state(setup, built[*kind, setup.nf4])
            working, update = working_bytes(setup, state)
            need = measured[kind]._replace(state=state, working=working, update=update)
            shown = min((True, False), key=need.total) if plan.checkpointing is None else plan.checkpointing
            yield Estimate(way, self._parts(setup, need, shown), need.state.offloaded, shown,
                           {card: _verdict(plan._replace(limit=card * 1e9), need) for card in cards})

    def _parts(self, setup, need, checkpointing):
        parts = need.parts(checkpointing)
        frozen = parts["weights"]
        if setup.adapter:
            frozen = training_state(setup._replace(adapter=None, trained=setup.compute)).weights
        sizes = {"weights": frozen, "adapters": parts["weights"] - frozen, "gradients": parts["gradients"],
                 "optimizer": parts["optimizer"], "logits": need.loss}
        sizes["activations"] = need.total(checkpointing) - sum(sizes.values())
        return sizes | {"reserve": sum(sizes.values()) * RESERVE / (1 - RESERVE)}


def _verdict(plan, need):
    checkpointing, fits = fitting.choose(plan, need)
    if not fits:
        return "does not fit"
    return "fits" if need.total(checkpointing) <= (1 - RESERVE) * plan.available else "tight"


def _zero_of(value):
    """What a DeepSpeed config says of sharing: its file and stage, and whether optimizer and weights are in the CPU's
    memory; None: there is none."""
    path = deepspeed_file(value or "none")
    if path is None:
        return None
    zero = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {})
    optimizer, weights = (zero.get(f"offload_{part}", {}).get("device", "none") != "none"
                          for part in ("optimizer", "param"))
    return {"file": value, "stage": zero.get("stage", 0), "optimizer": optimizer, "weights": weights}


# -- shown ------------------------------------------------------------------------------------------------------------

def in_colour():
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def bar(estimate, scale, width=BAR):
    """A letter for every so many bytes (scale / width) of a part; > where it goes on beyond the bar."""
    text, done, colour = "", 0, in_colour()
    for name, (letter, number) in PARTS.items():
        start, done = round(done / scale * width), done + estimate.parts[name]
        letters = letter * (min(round(done / scale * width), width) - min(start, width))
        done_letters = f"\033[{number}m{letters}\033[0m" if colour and letters else letters
        text += done_letters
    filled = min(round(done / scale * width), width)
    return text + (">" if done > scale * (1 + 0.5 / width) else " ") + " " * (width - filled)


def show(model, gpus, cards, estimates):
    """Print the table of a model while it is made, at most 80 columns wide."""
    weights = sum(weight.numel() for weight in model.network.parameters())
    training, scale = model.training, min(max(cards), SCALE) if len(cards) > 1 else cards[0]
    say(f"{model.path}: {weights / 1e9:,.2f} billion weights in {model.config.num_hidden_layers} layers",
        f"{gpus} GPU{'s' if gpus > 1 else ''}, {str(model.compute).removeprefix('torch.')}, rows of {model.tokens:,} "
        f"tokens ({training.model_max_length:,} x {training.per_device_train_batch_size})", "",
        f"{'GB on each GPU':20}{'counted':>9}{'RAM':>6} {f'with reserve, of {scale:g}':{BAR + 1}}"
        + "".join(f"{card:>4g}" for card in cards))
    last, found = None, []
    for estimate in estimates:
        way = estimate.way
        if way.method != last:
            say(way.method)
            last = way.method
        ram = f"{estimate.offloaded / 1e9:,.0f}" if estimate.offloaded else ""
        say(f"  {way.strategy or 'one GPU':20}{estimate.total / 1e9:>7,.1f}{ram:>6} {bar(estimate, scale * 1e9)}"
            + "".join(f"{MARKS[estimate.cards[card]]:>4}" for card in cards))
        found.append(estimate)
    say("", " ".join(f"{letter} {name}" for name, (letter, _) in PARTS.items()),
        f"{', '.join(f'{mark} {words}' for words, mark in MARKS.items())} (tight: no room for what is not counted)",
        "", *flags_that_fit(found, cards), "")


def flags_that_fit(estimates, cards):
    """Of each method the first way that fits each card, as lines."""
    lines = []
    for card in cards:
        for verdict in ("fits", "tight"):
            for method in dict.fromkeys(estimate.way.method for estimate in estimates):
                ways = {estimate.cards[card]: estimate.way for estimate in reversed(estimates)
                        if estimate.way.method == method}
                if verdict == "tight" and "fits" in ways or verdict not in ways:
                    continue
                lines.append(f"  {card:>3g} GB  {method:15} {ways[verdict].flags or 'as it is':40}"
                             f"{' (tight)' if verdict == 'tight' else ''}".rstrip())
    if not lines:
        return ["Nothing of this fits: more --gpus, a smaller row (--model_max_length), another method or model"]
    return ["Flags of finetune.py, the first that fits of each method:", *lines]


def as_json(model, gpus, estimates):
    return {"model": model.path, "gpus": gpus, "row_tokens": model.tokens,
            "precision": str(model.compute).removeprefix("torch."),
            "ways": [{"method": way.method, "strategy": way.strategy or "one GPU", "flags": way.flags,
                      "gradient_checkpointing": checkpointing,
                      "gb": {name: round(size / 1e9, 6) for name, size in parts.items()},
                      "ram_gb": round(offloaded / 1e9, 6),
                      "cards": {f"{card:g}": words for card, words in cards.items()}}
                     for way, parts, offloaded, checkpointing, cards in estimates]}


def parse_arguments(argv):
    """argv, as `prepare_command_line` returns it -> (paths of models, EstimateArguments' values, groups of flags).

    Raises UserError.
    """
    groups, models = read_values(__file__, argv, FINETUNE)
    given = {word.partition("=")[0] for word in argv}
    if "--model_name_or_path" in given:
        models.append(groups["ModelArguments"].model_name_or_path)
    training, arguments, problems = groups["TrainingArguments"], groups["EstimateArguments"], []
    for name, value in (("model_max_length", 2048), ("per_device_train_batch_size", 1)):
        if f"--{name}" not in given:
            setattr(training, name, value)
    if not models:
        problems.append("which model? A folder, or a name on the Hub such as Qwen/Qwen2.5-7B-Instruct")
    problems += [f"{path}: no such folder" for path in models
                 if not os.path.isdir(path) and not could_be_on_the_hub(path)]
    if arguments.gpus < 1:
        problems.append(f"--gpus {arguments.gpus}: at least 1")
    if arguments.gpu_memory is not None and arguments.gpu_memory <= 0:
        problems.append(f"--gpu_memory {arguments.gpu_memory:g}: more than 0")
    if problems:
        raise UserError("\n       ".join(problems))
    return models, arguments, groups


def run(argv):
    """The estimates that a command line asks for, printed. Raises UserError."""
    models, arguments, groups = parse_arguments(prepare_command_line(__file__, argv, FINETUNE))
    cards = [arguments.gpu_memory] if arguments.gpu_memory else CARDS
    logging.set_verbosity_error()  # it remarks on kernels that are not here
    cards = [int(card) if math.isclose(card, round(card)) else card for card in cards]
    found = []
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():  # notes
        for path in models:
            model = Model(path, groups)
            estimates = model.estimates(arguments.gpus, cards)
            if arguments.json:
                found.append(as_json(model, arguments.gpus, estimates))
            else:
                show(model, arguments.gpus, cards, estimates)
    if arguments.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    with user_errors_end_the_program():
        run(COMMAND_LINE)
