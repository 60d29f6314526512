"""What a run says of itself: before the first step, at the end, and in the model card."""

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shlex

from mechanisms import card
from mechanisms.console import table
from mechanisms.gptq import is_gptq, packed_weights
from mechanisms.paths import could_be_on_the_hub, source_name
from mechanisms.report_page import About
from mechanisms.serving import IGNORED, adapter_hint
from mechanisms.strategies import strategy_name

LIBRARIES = "torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes", "gptqmodel"


def method_name(training_args, lora_args):
    if lora_args.q_lora:
        return "Q-LoRA"
    if training_args.use_lora:
        return "LoRA"
    return f"Full-parameter{' (weights in bf16, 8-bit moments)' if training_args.trained_weights == 'bf16' else ''}"


def items_per_step(training_args):
    """Items of the dataset (samples, or rows of them with --packing) behind one optimizer step, over all ranks."""
    return (training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps
            * training_args.world_size)


def step_count(training_args, dataset):
    """Optimizer steps of the whole run, as Trainer counts them."""
    if training_args.max_steps > 0:
        return training_args.max_steps
    steps = math.ceil(batch_count(training_args, dataset) / training_args.gradient_accumulation_steps)
    return math.ceil(training_args.num_train_epochs * steps)


def batch_count(training_args, dataset):
    """Batches of each rank in an epoch."""
    batches = len(dataset) / (training_args.per_device_train_batch_size * training_args.world_size)
    return math.floor(batches) if training_args.dataloader_drop_last else math.ceil(batches)


def before_training(model, training_args, lora_args, dataset):
    """What is trained, on what and in which precision, as lines."""
    parameters, trained = packed_weights(model), 0
    for parameter in model.parameters():
        parameters += parameter_count(parameter)
        trained += parameter_count(parameter) * parameter.requires_grad
    precision = "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32"
    return ["Training:", table([
        ("method", method_name(training_args, lora_args)),
        ("precision", f"{precision}, trained weights and optimizer in fp32" if training_args.trained_weights == "fp32"
         else f"{precision}, trained weights too, rounded at random"),
        ("device", f"{training_args.world_size} x {training_args.device.type}, {strategy_name(training_args)}"),
        ("parameters", parameters),
        ("trained parameters", f"{trained:,} ({trained / parameters:.2%})"),
        *_per_step(training_args, dataset),
        ("steps", step_count(training_args, dataset))]), ""]


def about(command, arguments, reports, training):
    """-> `report_page.About` of a run.

    command: the words after finetune.py; reports: {"train": DataReport, ...}; training: lines of `before_training`.
    """
    model_args, _, training_args, lora_args = arguments
    out = os.path.basename(os.path.abspath(training_args.output_dir))
    method = f"{method_name(training_args, lora_args)} fine-tuning of {source_name(model_args.model_name_or_path)}"
    versions = [(name, importlib.metadata.version(name)) for name in LIBRARIES if importlib.util.find_spec(name)]
    data = {f"Data ({name})": "\n".join(report.lines("")[1:]) for name, report in reports.items()}
    return About(out, method, shlex.join(["python", "finetune.py", *command]), {
        training[0].rstrip(":"): training[1], **data,
        "Versions": table([("python", platform.python_version()), *versions])})


def _per_step(training_args, dataset):
    items = items_per_step(training_args)
    if dataset.fill is None:
        return [("samples per step", items)]
    samples = len(dataset.dataset)
    return [("rows", f"{len(dataset):,} of {training_args.model_max_length:,} tokens, {dataset.fill:.1%} filled with "
                     f"{samples:,} samples"),
            ("rows per step", f"{items}, on average {items * samples / len(dataset):.1f} samples")]


def parameter_count(parameter):
    """Number of weights: ZeRO-3 keeps the whole count in ds_numel, bitsandbytes packs two 4-bit weights in a byte."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    if type(parameter).__name__ == "Params4bit":
        return math.prod(parameter.quant_state.shape)
    return parameter.numel()


def after_training(trainer, result, evaluated, prompt_note, wrapped):
    """The numbers of the finished run and the commands that go on from it, as lines.

    result: what `Trainer.train` returned; evaluated: the metrics of the last evaluation, or {}; prompt_note: which
    prompt the answers were trained after, or ""; wrapped: whether the model is the text part of a larger one.
    """
    state, out = trainer.state, trainer.args.output_dir
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    tokens = state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen  # of this run, not those before it
    rows = [("steps", state.global_step), ("loss, last logged", f"{losses[-1]:.4f}" if losses else "none")]
    if trainer.skipped_steps:
        rows.append(("steps skipped by fp16's loss scaler", trainer.skipped_steps))
    if "eval_loss" in evaluated:
        rows.append(("eval loss", f"{evaluated['eval_loss']:.4f}"))
    rows += [("tokens", tokens), ("tokens/s", f"{tokens / result.metrics['train_runtime']:,.0f}"),
             ("time", f"{result.metrics['train_runtime']:.1f} s"), ("result", out)]
    lines = ["", "Done:", table(rows), *([f"  note: {prompt_note}"] if prompt_note else []),
             f"  chat:  python chat.py {shlex.quote(out)}"]
    if trainer.args.use_lora:
        quantized = is_gptq(trainer.model.config) and trainer.model.peft_config["default"].base_model_name_or_path
        lines.append(f"  merge: {merge_command(out, quantized)}")
        lines += [f"  note:  {IGNORED}"] if wrapped else adapter_hint(out, trainer.model.peft_config["default"])
    return lines


def merge_command(out, quantized=None):
    """quantized: the GPTQ model under the adapter, which nothing can be merged into; its 16-bit original can."""
    command = f"python merge_lora.py --adapter_path {shlex.quote(out)} --output_dir {shlex.quote(out + '-merged')}"
    if not quantized:
        return command
    name = source_name(quantized)
    original = re.sub(r"-(GPTQ-)?Int[48]$", "", name)  # as Qwen names them
    on_hub = original != name and could_be_on_the_hub(name) and not os.path.isdir(name)
    return f"{command} --base_model {original if on_hub else 'THE_16_BIT_MODEL'}"


def model_card(arguments, settings, prompt_note, wrapped, report, digest, repository=None):
    """README.md of the result, with the metadata that the Hugging Face Hub reads.

    arguments: the (model, data, training, lora) arguments; settings: {flag: value}, see `facts.settings`; prompt_note:
    which prompt the answers were trained after, or ""; wrapped: whether the model is the text part of a larger one;
    report: the DataReport of the training data; digest: of what was trained on; repository: where it is uploaded.
    """
    model_args, data_args, training_args, lora_args = arguments
    rows = "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in settings.items())
    data = ", ".join(f"`{os.path.basename(os.path.normpath(path))}`" for path in data_args.data_path)
    base = source_name(model_args.model_name_or_path)
    whole = wrapped and not (training_args.use_lora or training_args.text_only)
    serving = (f" {IGNORED[0].upper()}{IGNORED[1:]}: `{merge_command(training_args.output_dir)}`."
               if wrapped and training_args.use_lora else "")
    loader = ("AutoPeftModelForCausalLM" if training_args.use_lora else
              "AutoModelForImageTextToText" if whole else "AutoModelForCausalLM")
    name = repository or os.path.basename(os.path.abspath(training_args.output_dir))
    counts = "\n".join(f"| {what.strip()} | {f'{number:,}' if isinstance(number, int) else number} |"
                       for what, number in report.rows())
    return (card.head(model_args.model_name_or_path, "peft" if training_args.use_lora else "transformers",
                      "image-text-to-text" if whole else "text-generation", ask_hub=repository is not None)
            + f"{method_name(training_args, lora_args)} fine-tuning of `{base}` on {data}; "
            f"loss on {data_args.loss_on}. Prompts are ChatML, by this folder's chat template."
            f"{f' {prompt_note[0].upper()}{prompt_note[1:]}.' if prompt_note else ''}{serving}\n\n"
            f"{card.how_to_load(name, loader)}\n"
            f"| data | number |\n|---|---|\n{counts}\n| digest of the samples | {digest} |\n\n"
            f"| setting | value |\n|---|---|\n{rows}\n")
