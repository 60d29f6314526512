"""Quantize a model to 8, 4, 3 or 2 bits with GPTQ: one folder that loads as it stands, measured before it is named.

  python run_gptq.py --model_name_or_path merged --data_path chats.jsonl --out_path merged-Int4
  python run_gptq.py --model_name_or_path merged --data_path chats.jsonl --out_path merged-Int8 --bits 8

The model is calibrated on the conversations as finetune.py would train on them: give the data that it was trained on,
or data like what it will be asked. Some of the records are held back; the perplexity on their trained tokens tells what
the rounding costs. An adapter has to be merged first (merge_lora.py).

Everything is written into merged-Int4.unfinished, loaded again from there, measured, and only then renamed: after a
kill there is no `merged-Int4`, or a whole one. A model that the rounding has broken gets no name either (exit code 1).
"""

import sys
from dataclasses import dataclass, field

from mechanisms import publish
from mechanisms.data.shapes import parse_columns
from mechanisms.errors import UserError, interrupts_end_at_once, user_errors_end_the_program
from mechanisms.flags import parse_into, prepare_command_line
from mechanisms.paths import not_empty
from mechanisms.quiet import silence

# By how much perplexity may grow, by bits. Sound models of 7B and more lose 1 % at 8 bits, 5 % at 4, a fifth at 3, and
# grow sixfold at 2; the smallest ones lose several times as much. A broken model guesses: its perplexity is near the
# size of its vocabulary, hundreds of times what it was.
LARGEST_RATIO = {8: 1.5, 4: 2, 3: 5, 2: 50}


@dataclass
class QuantizeArguments:
    model_name_or_path: str = field(metadata={
        "help": "Folder or Hugging Face Hub name of a 16- or 32-bit model.", "exists": "model"})
    data_path: list[str] = field(metadata={"help": "Calibration data, as finetune.py takes it.", "exists": "data"})
    out_path: str = field(metadata={"help": "Folder to make. It must not exist, or be empty."})
    columns: list[str] = field(default=None, metadata={
        "help": "Which column of the data is what, as finetune.py takes it.", "metavar": "KEY=COLUMN"})
    max_len: int = field(default=8192, metadata={"help": "Longer conversations are cut to this many tokens."})
    bits: int = field(default=4, metadata={"help": "Bits per weight: 8, 4, 3 or 2."})
    group_size: int = field(default=128, metadata={
        "help": "Weights of a row that share a scale; smaller is more exact and larger on disk. -1: a whole row."})
    max_samples: int = field(default=512, metadata={"help": "Conversations to calibrate on, drawn with a fixed seed."})
    desc_act: bool = field(default=False, metadata={
        "help": "Round the columns with the largest inputs first: a little more exact, slower to serve."})
    skip_bad_rows: int = field(default=0, metadata={
        "help": "Leave out up to this many unusable records; they go to rejected.jsonl."})
    push_to_hub: bool = field(default=False, metadata={
        "help": "Upload the folder to the Hugging Face Hub. (The token is that of hf auth login, or HF_TOKEN.)"})
    hub_model_id: str = field(default=None, metadata={
        "help": "Its name there, as USER/NAME or NAME (default: that of --out_path).", "metavar": "NAME"})
    hub_private_repo: bool | None = field(default=None, metadata={
        "help": "Make the repository private.", "nargs": "?", "const": True})


def parse_arguments(argv):
    """argv -> QuantizeArguments. Raises UserError with everything that is wrong with them."""
    args, words = parse_into((QuantizeArguments,), argv)
    problems = [f"unexpected argument {word!r}" for word in words]
    if args.columns:
        args.columns, wrong = parse_columns(args.columns)
        problems += wrong
    if args.bits not in LARGEST_RATIO:
        problems.append(f"--bits {args.bits}: GPTQ has {', '.join(map(str, LARGEST_RATIO))}")
    for name in ("max_len", "max_samples"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} {getattr(args, name)}: at least 1")
    problems += not_empty("--out_path", args.out_path)
    problems += publish.without_push(args)
    if problems:
        raise UserError("\n       ".join(problems))
    return args


if __name__ == "__main__":  # wrong flags and folders are worth knowing before torch is imported
    with user_errors_end_the_program():
        silence()
        COMMAND_LINE = prepare_command_line(__file__, sys.argv[1:])
        parse_arguments(COMMAND_LINE)

import datetime
import gc
import json
import math
import os
import random
import shlex
import shutil
import time

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

from mechanisms import card
from mechanisms.compatibility import add_former_names
from mechanisms.console import counted, say, table
from mechanisms.data.datasets import read_files, to_conversations
from mechanisms.data.encoder import IGNORED, ConversationEncoder
from mechanisms.data.records import Notices, Problems, find_files
from mechanisms.data.shapes import BadRecord
from mechanisms.device import runs_on_cpu
from mechanisms.errors import first_line
from mechanisms.gptq import GROUP_SIZES, quantize
from mechanisms.linear_attention import LINEAR
from mechanisms.loading import LOADING_ERRORS, check_rows, load_config, load_weights
from mechanisms.lora import empty_network, experts_of
from mechanisms.paths import check_disk, source_name
from mechanisms.qwen1 import convert_if_qwen1
from mechanisms.serving import serving_hints
from mechanisms.tokenizer import end_at_turns, load_tokenizer

SEED = 42  # of the draw of the calibration records
HELD_BACK = 0.1, 64  # share of the records that perplexity is measured on, and how many at most
class BrokenModel(Exception):
    """The quantized model is of no use. The message says what was measured."""


# ---------------------------------------------------------------------------------------------------------------------
# Before: everything that can be refused without loading a weight
# ---------------------------------------------------------------------------------------------------------------------

def check_quantizable(args):
    """The config of the model; shortens args.max_len to what it holds.

    Raises UserError if it cannot be quantized, or not with this --group-size.
    """
    path = args.model_name_or_path
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        merged = os.path.normpath(path) + "-merged"
        raise UserError(f"{path} is an adapter: merge it into its base model first, then quantize the result:\n"
                        f"       python merge_lora.py --adapter_path {shlex.quote(path)} --output_dir "
                        f"{shlex.quote(merged)}\n       and then --model_name_or_path {shlex.quote(merged)}")
    config = load_config(path)
    path = source_name(path)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        raise UserError(f"{path} is quantized already ({getattr(method, 'value', method).upper()}): give the 16-bit "
                        "model that it was made from")
    if LINEAR in (getattr(config, "layer_types", None) or []):
        raise UserError(f"{path} has layers of linear attention ({config.model_type}): quantizing them with GPTQ "
                        "is not supported. Serve it in 16 bits")
    network = empty_network(config)
    if experts_of(network):
        raise UserError(f"{path} is a mixture of experts ({config.model_type}): transformers does not load experts "
                        "that are quantized with GPTQ, so the result would be of no use. Serve it in 16 bits")
    widths = {module.in_features for name, module in network.named_modules()
              if isinstance(module, torch.nn.Linear) and ".layers." in name}
    possible = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    if args.group_size not in (-1, *possible):
        raise UserError(f"--group-size {args.group_size} does not work with this model, whose layers have input widths "
                        f"of {', '.join(map(str, sorted(widths)))}; possible: "
                        + ", ".join(map(str, [*possible, "-1 (one group for a whole row)"])))
    check_rows(args.model_name_or_path, config)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and args.max_len > limit:
        say(f"note: --max_len {args.max_len} is more than the model's {limit} positions: {limit} is used")
        args.max_len = limit
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

def prepare_samples(args, tokenizer, problems):
    """-> (calibration, held back): lists of `finetune.Sample`, the same ones each time, none in both.

    Raises UserError as finetune.py does, with every problem of the data.
    """
    encoder, notices = ConversationEncoder(tokenizer, args.max_len), Notices()
    files = find_files(args.data_path, problems)
    problems.fatal += [f"{path}:{share:g}: a share of a file is for training only. Give --max_samples"
                       for path, share in files.items() if share != 1]
    records = read_files(files, problems)
    conversations = to_conversations(records, problems, notices, args.columns)
    distinct = {}
    for place, conversation in counted(conversations, "reading", "records"):
        distinct.setdefault(conversation.digest, (place, conversation))
    drawn = list(distinct.values())
    random.Random(SEED).shuffle(drawn)
    share, most = HELD_BACK
    held_back = max(1, min(most, int(share * len(drawn)), int(share * args.max_samples)))
    samples = []
    for place, conversation in drawn:
        try:
            encoded = [sample for sample in encoder(conversation) if sample.input_ids]  # something to learn
        except BadRecord as bad:
            problems.add(place, bad.args[0], conversation.shown())
            continue
        samples += encoded[-1:]  # where answers have samples of their own: that of the last, the longest
        if len(samples) == held_back + args.max_samples:
            break
    problems.stop_or_skip(args.skip_bad_rows)
    if len(samples) < 2:
        raise UserError(f"the data has {len(samples)} different conversations with an answer within --max_len; it "
                        "takes two at least: one to calibrate on and one to measure with")
    return samples[held_back:], samples[:held_back]


# ---------------------------------------------------------------------------------------------------------------------
# Quantize
# ---------------------------------------------------------------------------------------------------------------------

@torch.inference_mode()
def measure(folder, samples):
    """(perplexity on the trained tokens of the samples, bytes) of the model in `folder`, loaded for this and freed."""
    try:
        model = load_weights(
            folder, dtype="auto", device_map="auto" if torch.accelerator.is_available() else None).eval()
    except LOADING_ERRORS as error:
        raise UserError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from error
    loss = count = 0
    for sample in samples:
        ids, labels = (torch.tensor(values, device=model.device) for values in sample[:2])
        places = (labels[1:] != IGNORED).nonzero()[:, 0]  # whose next token is trained; the others need no logits
        logits = model(input_ids=ids[None], logits_to_keep=places).logits[0].float()
        loss += cross_entropy(logits, labels[places + 1].to(logits.device), reduction="sum").item()
        count += len(places)
    size = model.get_memory_footprint()
    del model
    gc.collect()
    return math.exp(min(loss / count, 700)), size  # exp(709) is the largest that there is; NaN stays NaN


class Progress:
    """Called after each layer: a bar on a terminal, lines with the time left in a log file."""

    def __init__(self, layers):
        self.layers, self.start = layers, time.time()
        self.bar = tqdm(total=layers, desc="quantizing", unit=" layers") if sys.stderr.isatty() else None

    def __call__(self, done):
        if self.bar:
            self.bar.update()
        else:
            left = (time.time() - self.start) / done * (self.layers - done)
            say(f"layer {done}/{self.layers}  left {datetime.timedelta(seconds=round(left))}")


def complete(args, folder, tokenizer):
    """Everything else that inference needs."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        settings = json.load(file)
    settings.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    write(folder, "config.json", json.dumps(settings, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(args.model_name_or_path)
    except OSError:  # the model has none
        generation = GenerationConfig()
    end_at_turns(generation, tokenizer)
    generation.save_pretrained(folder)
    add_former_names(folder)


def write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def model_card(args, samples, before, after):
    """README.md of the quantized folder."""
    base = source_name(args.model_name_or_path)
    name = args.hub_model_id or os.path.basename(os.path.normpath(args.out_path))
    return (card.head(args.model_name_or_path, "transformers", "text-generation", args.push_to_hub,
                      base_model_relation="quantized")
            + f"`{base}` in {args.bits} bits (GPTQ, groups of {args.group_size}"
            f"{', desc_act' if args.desc_act else ''}), calibrated on {samples} conversations. Prompts are ChatML, by "
            f"this folder's chat template.\n\n{card.how_to_load(name, 'AutoModelForCausalLM')}\n"
            f"Perplexity on held-back conversations: {before:.4f} before, {after:.4f} after.\n")


def run(argv):
    """The whole run. Raises UserError for what the user can put right, BrokenModel if the result is of no use."""
    args = parse_arguments(argv)
    runs_on_cpu("set CUDA_VISIBLE_DEVICES= ")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    args.model_name_or_path = convert_if_qwen1(args.model_name_or_path)
    config = check_quantizable(args)
    tokenizer = load_tokenizer(args.model_name_or_path)
    problems = Problems()
    if args.push_to_hub:
        publish.check_account()
    samples, held_back = prepare_samples(args, tokenizer, problems)
    folder = os.path.normpath(args.out_path)
    unfinished = folder + ".unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run left
        os.makedirs(unfinished)
    except OSError as error:
        raise UserError(f"--out_path: {unfinished} cannot be written: {error.strerror}") from error
    if problems.rejected:
        problems.write(os.path.join(unfinished, "rejected.jsonl"))
    say(f"Calibrating on {len(samples):,} conversations, {sum(len(sample.input_ids) for sample in samples):,} tokens; "
        f"{len(held_back):,} held back to measure with")
    if args.push_to_hub:
        args.hub_model_id = publish.make_repository(args.hub_model_id or publish.default_name(folder),
                                                    args.hub_private_repo)
    before, size_before = measure(args.model_name_or_path, held_back)
    if not math.isfinite(before):
        raise UserError(f"{args.model_name_or_path} itself is broken: its perplexity on the data is {before}")
    say(f"Perplexity before: {before:.4f}")
    check_disk("--out_path", unfinished, size_before)  # the layers not yet rounded and those that are
    with interrupts_end_at_once():
        quantize(args.model_name_or_path, unfinished, samples, Progress(config.num_hidden_layers),
                 bits=args.bits, group_size=args.group_size, desc_act=args.desc_act)
    complete(args, unfinished, tokenizer)
    gc.collect()
    after, _ = measure(unfinished, held_back)
    size_after = sum(file.stat().st_size for file in os.scandir(unfinished) if file.name.endswith(".safetensors"))
    say("", table([("perplexity before", f"{before:.4f}"),
                   ("perplexity after", f"{after:.4f} (x {after / before:.3f})"),
                   ("size before", f"{size_before / 1e6:,.1f} MB"),
                   ("size after", f"{size_after / 1e6:,.1f} MB ({size_after / size_before:.0%})")]))
    if not after <= before * LARGEST_RATIO[args.bits]:  # NaN is no number that is too large
        raise BrokenModel(
            f"the quantized model is broken: its perplexity on the held-back conversations is {after:.4g}, the model's "
            f"own {before:.4g}, and {LARGEST_RATIO[args.bits]} times that is the most that {args.bits} bits may cost.\n"
            f"       {folder} was not written; {unfinished} holds the faulty result. What helps: more or other data "
            "(it must be like what the model was trained on), a smaller --group-size, more --bits")
    write(unfinished, "README.md", model_card(args, len(samples), before, after))
    os.replace(unfinished, folder)
    chat, vllm, *_ = serving_hints(folder, False)
    say("", f"Done: {folder}", chat, vllm,
        f"  Q-LoRA:     python finetune.py --q_lora --model_name_or_path {shlex.quote(folder)} --data_path ...",
        "  llama.cpp and Ollama have their own formats: convert the 16-bit model for them")
    if args.push_to_hub:
        say(f"  Hub:        {publish.upload(folder, os.listdir(folder), args.hub_model_id)}")


def main(argv):
    with user_errors_end_the_program():
        try:
            run(argv)
        except BrokenModel as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main(COMMAND_LINE)
