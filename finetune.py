"""Fine-tune a Qwen chat model (any ChatML model with a Qwen2-like network): full-parameter, LoRA or Q-LoRA.

  python finetune.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --data_path chats.jsonl --output_dir out
  python finetune.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --data_path chats.jsonl --output_dir out --use_lora
  python finetune.py config.yaml --learning_rate 1e-4      # a file of flags; the command line wins

The life of a sample, top to bottom in this file:

  JSON record -> messages -> input_ids and labels -> batch -> loss -> checkpoint

The same command given again resumes from the newest complete checkpoint.
"""

import sys

from mechanisms import signals
from mechanisms.errors import UserError, user_errors_end_the_program
from mechanisms.flags import parse_into, prepare_command_line
from mechanisms.quiet import silence

if __name__ == "__main__":  # a misspelt flag is worth knowing before torch is imported
    with user_errors_end_the_program():
        silence()
        COMMAND_LINE = prepare_command_line(__file__, sys.argv[1:])
    signals.install()

import dataclasses
import functools
import itertools
import os
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError

from mechanisms import (
    checkpoints,
    compilation,
    console,
    dry_run,
    facts,
    fitting,
    frugal,
    publish,
    sample_answers,
    strategies,
    summary,
    trials,
)
from mechanisms.attention import best_attention
from mechanisms.console import say
from mechanisms.data.datasets import PackedRows, check_arguments, check_records, load_datasets, split
from mechanisms.data.encoder import IGNORED, ConversationEncoder
from mechanisms.data.template import KEEP
from mechanisms.device import runs_on_cpu
from mechanisms.errors import Checks, first_line
from mechanisms.gptq import TRAINABLE_BACKEND, gptqmodel_hidden, is_gptq
from mechanisms.linear_attention import keep_within_samples, kernel_note
from mechanisms.loading import (
    check_tokens,
    check_trainable,
    fit_arguments,
    load_config,
    load_weights,
    no_code,
    read_adapter,
)
from mechanisms.lock import only_run_in
from mechanisms.lora import (
    default_targets,
    empty_network,
    impossible_adapter,
    is_part_of_weights,
    lora_config,
    start_from_weights,
)
from mechanisms.qwen1 import convert_if_qwen1
from mechanisms.report import Report
from mechanisms.strategies import choose_precision, compute_dtype, memory_setup
from mechanisms.tokenizer import load_tokenizer, set_default_mode
from mechanisms.trainer import SafeTrainer
from mechanisms.wrapper import Wrapper, check_text_only, is_wrapped

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------

@dataclass
class ModelArguments:
    model_name_or_path: str = field(default="Qwen/Qwen2.5-7B", metadata={
        "help": "Folder or Hugging Face Hub name of the model to start from.", "metavar": "MODEL", "exists": "model"})


@dataclass
class DataArguments:
    data_path: list[str] = field(default=None, metadata={
        "help": "Training data: files, folders, globs or names of datasets; PATH:0.3 takes a share, PATH:2 all of it "
                "twice. JSON Lines or arrays, CSV, TSV, parquet, arrow; also packed.",
        "metavar": "PATH", "exists": "data", "missing": "which data to train on?"})
    eval_data_path: list[str] = field(default=None, metadata={
        "help": "Evaluation data, as --data_path; used at the end and per --eval_strategy.", "metavar": "PATH",
        "exists": "data"})
    columns: list[str] = field(default=None, metadata={
        "help": "Where the data have other names, which column is what, as prompt=question response=answer; others are "
                "not used.", "metavar": "KEY=COLUMN"})
    eval_ratio: float = field(
        default=0.0, metadata={"help": "Share of the training data held out for evaluation, always the same records."})
    lazy_preprocess: bool = field(
        default=False, metadata={"help": "Tokenize each record when it is needed instead of all before the start."})
    loss_on: Literal["assistant", "last", "all"] = field(
        default="assistant", metadata={"help": "What is trained: every assistant turn, the last one, or every token."})
    overlong: Literal["truncate", "drop", "error"] = field(
        default="truncate", metadata={"help": "What to do with samples longer than --model_max_length."})
    thinking: Literal["auto", "on", "off"] = field(default="auto", metadata={
        "help": "Where the chat template has a thinking and a plain prompt: which one answers are trained after. auto: "
                "those with thinking after the one, those without after the other."})
    earlier_answers: Literal["own", "skip"] = field(default="own", metadata={
        "help": "Earlier answers that later prompts show otherwise than they were said (without their thinking): train "
                "each in a sample of its own, or skip them."})
    system: str = field(
        default=None, metadata={"help": "System message of the conversations that have none."})
    keep_added_tokens: bool = field(default=False, metadata={
        "help": "Added tokens written in the data are tokens and not text, but for those of the chat template and the "
                "ends of texts."})
    packing: bool = field(
        default=False, metadata={"help": "Fill rows of --model_max_length with samples; a batch counts rows then."})
    skip_bad_rows: int = field(
        default=0, metadata={"help": "Leave out up to this many unusable records; they go to rejected.jsonl."})


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    output_dir: str = field(
        default="output_qwen", metadata={"help": "Folder for checkpoints and the result.", "metavar": "FOLDER"})
    cache_dir: str = field(default=None, metadata={
        "help": "Folder for downloaded and converted models and tokenized data (default: Hugging Face's).",
        "metavar": "FOLDER"})
    use_lora: bool = field(
        default=False, metadata={"help": "Train low-rank adapters instead of all parameters."})
    model_max_length: int = field(
        default=8192, metadata={"help": "Longest sample in tokens; --overlong says what happens to longer ones."})
    # From here to deepspeed: those of transformers, with a line of help.
    learning_rate: float = field(default=5e-5, metadata={"help": "Highest learning rate, reached after the warmup."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "How often the data are trained on."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Samples of a GPU at a time (rows with --packing)."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches of each GPU that make one step of the optimizer."})
    join_batches: bool = field(default=False, metadata={
        "help": "Compute batches of a step together as far as they fit: the same step in fewer passes, which keep a "
                "GPU busy."})
    warmup_steps: float = field(
        default=0, metadata={"help": "Steps in which the learning rate rises from 0 (below 1: share of all)."})
    lr_scheduler_type: transformers.SchedulerType | str = field(
        default="linear", metadata={"help": "How the learning rate falls after the warmup."})
    save_steps: float = field(default=500, metadata={"help": "Steps between two checkpoints (below 1: share of all)."})
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Checkpoints to keep, the newest ones (default: all)."})
    text_only: bool = field(default=False, metadata={
        "help": "Of a model with a vision tower, save the text part alone. Else the result is the whole of it again."})
    eval_strategy: transformers.IntervalStrategy | str = field(
        default="no", metadata={"help": "When to evaluate: every --eval_steps, after each epoch, or only at the end."})
    early_stopping: int = field(default=None, metadata={
        "help": "Stop after so many evaluations in a row without a lower loss."})
    sample_prompts: str = field(default=None, metadata={
        "help": "Questions that the model answers in report.html before training, at each evaluation and at the end: a "
                "file with one on each line. Default: three of the evaluation data. none: no answers.",
        "metavar": "FILE", "exists": "file"})
    deepspeed: dict | str | None = field(default=None, metadata={
        "help": "Config for DeepSpeed: a file, or one of the ds_config_*.json beside finetune.py. none: no DeepSpeed.",
        "metavar": "FILE", "exists": "deepspeed"})
    trained_weights: Literal["auto", "fp32", "bf16"] = field(default="auto", metadata={
        "help": "How full fine-tuning holds weights: in fp32 (16 bytes each with gradient and optimizer), or in bf16 "
                "with stochastic rounding and 8-bit moments (6 bytes). auto: in bf16 where fp32 does not fit."})
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default="auto", metadata={
        "help": "Precision in which full fine-tuning saves its result. auto: that of the base model."})
    activation_checkpointing: Literal["True", "False", "auto"] = field(default="auto", metadata={
        "help": "Compute activations twice instead of keeping them, which takes a third more time. auto: only where "
                "they would not fit into the memory.",
        "nargs": "?", "const": "True"})
    bf16: bool | None = field(default=None, metadata={
        "help": "bfloat16 mixed precision. Without --bf16 and --fp16 the best that the hardware has is chosen.",
        "nargs": "?", "const": True})
    fp16: bool | None = field(default=None, metadata={
        "help": "float16 mixed precision, for GPUs without bfloat16.", "nargs": "?", "const": True})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines (below 1: share of all)."})
    resume_from_checkpoint: str = field(default=None, metadata={
        "help": "Unset: resume from the newest complete checkpoint in --output_dir, if any. True: there must be one. "
                "False: start over, in a folder without results. Or the path of a checkpoint.",
        "metavar": "True|False|FOLDER", "exists": "checkpoint"})
    memory_limit: float = field(default=None, metadata={
        "help": "GB of memory that a run may take on each GPU, or each process on a CPU (default: what is free there). "
                "One that does not fit by estimate is refused."})
    verify_checkpoint: Literal["full", "sizes"] = field(default="full", metadata={
        "help": "How a checkpoint is verified before it is resumed: by reading all of it, or, where it is huge, by the "
                "sizes of its files."})
    dry_run: bool = field(default=False, metadata={
        "help": "Check everything, tokenize, train one step on the longest rows, save, verify and load that, and end."})
    trust_checkpoint: bool = field(default=False, metadata={
        "help": "Let DeepSpeed's part of a checkpoint run the code that stands in it, as that of an optimizer of your "
                "own; without it only numbers are loaded."})
    loss_spike_factor: float = field(default=None, metadata={
        "help": "Name the records of a step whose loss is more than this many times the median of the (10 to 50) steps "
                "before it."})
    push_to_hub: bool = field(default=False, metadata={
        "help": "Upload the finished result, and nothing else, to the Hugging Face Hub. (The token is that of hf auth "
                "login, or HF_TOKEN.)"})
    hub_model_id: str | None = field(default=None, metadata={
        "help": "Its name there, as USER/NAME or NAME (default: that of --output_dir).", "metavar": "NAME"})
    hub_private_repo: bool | None = field(default=None, metadata={
        "help": "Make the repository private.", "nargs": "?", "const": True})
    # Trainer's default replaces a NaN loss by the average before it: a dead run would look alive.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN losses (never wanted).", "hidden": True})
    include_num_input_tokens_seen: str = field(
        default="all", metadata={"help": "What tokens/s counts.", "hidden": True})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has no effect here.", "hidden": True})

    def __post_init__(self):
        # DeepSpeed and DDP then use gloo; without it Trainer asks for NCCL.
        self.use_cpu = self.use_cpu or runs_on_cpu("add --use_cpu")
        self.bf16, self.fp16 = choose_precision(self.bf16, self.fp16, self.use_cpu)
        strategies.check_backend(self.ddp_backend, self.use_cpu)
        self.deepspeed = strategies.deepspeed_config(self.deepspeed)
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter that is trained is used; searching costs time
        asked = str(self.activation_checkpointing).lower()
        if asked not in ("auto", "true", "false"):
            raise UserError(f"--gradient_checkpointing {self.activation_checkpointing}: True, False or auto")
        self.auto_checkpointing, self.activation_checkpointing = asked == "auto", asked == "true"
        self.joined_batches = 1  # until the memory is known
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"  # as transformers does for --load_best_model_at_end
        self.uploads, self.push_to_hub = self.push_to_hub, False  # by us, once: see mechanisms/publish.py
        if self.disable_tqdm is None:
            self.disable_tqdm = not sys.stderr.isatty()  # a log file gets plain lines
        super().__post_init__()
        if self.use_liger_kernel:  # its loss would take the place of ours
            self.liger_kernel_config = {"fused_linear_cross_entropy": False, **(self.liger_kernel_config or {})}
        self.visible_gpus, self._n_gpu = self.n_gpu, min(1, self.n_gpu)  # DataParallel would cut the rows of a batch


@dataclass
class LoraArguments:
    q_lora: bool = field(
        default=False, metadata={"help": "LoRA on a base model held in 4 bits (NF4); implies --use_lora."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=16, metadata={
        "help": "Adapters are scaled by lora_alpha / lora_r (by lora_alpha / sqrt(lora_r) with --use_rslora)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the adapters."})
    lora_target_modules: list[str] = field(default=None, metadata={
        "help": "Linear layers that get an adapter: names, or all-linear, or one regular expression that whole names "
                "must match (default: all of every block, but gates of experts and heads).", "metavar": "NAME"})
    lora_experts: bool = field(default=False, metadata={
        "help": "Adapters on the routed experts too, one for each: many weights, and no dropout (--lora_dropout 0)."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale adapters so that high ranks learn as well as low ones (rsLoRA)."})
    use_dora: bool = field(
        default=False, metadata={"help": "Train a length for each output beside the adapters (DoRA), which is slower."})
    init_lora_weights: str = field(default="true", metadata={
        "help": "How new adapters begin: true (as peft has it), gaussian, or as a part of the weights under them, with "
                "twice the rank in the result: pissa, pissa_niter_16 (nearly the same, in seconds) or olora.",
        "metavar": "KIND"})
    lora_weight_path: str = field(default="", metadata={
        "help": "Adapter to continue, instead of a new one.", "metavar": "ADAPTER", "exists": "model"})
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none", metadata={"help": "Which biases are trained as well."})
    lora_embeddings: Literal["auto", "full", "chatml", "none"] = field(default="auto", metadata={
        "help": "Train the embedding and output layers too: full, or only the rows of the ChatML tokens (a fraction of "
                "the memory). auto: none for a chat model, full for a base model, chatml for a base model in 4 bits."})


def parse_arguments(argv):
    """argv, as `prepare_command_line` returns it -> (model, data, training, lora) arguments.

    Raises UserError with every combination that cannot work.
    """
    problems = []
    model_args, data_args, training_args, lora_args, stray = parse_into(
        (ModelArguments, DataArguments, TrainingArguments, LoraArguments), argv, problems)
    problems += [f"unexpected argument {word!r}" for word in stray]
    if lora_args.q_lora:
        training_args.use_lora = True
    lora_args.init_lora_weights = lora_args.init_lora_weights.lower()  # peft's and YAML's is True
    problems += check_arguments(data_args)
    if training_args.eval_strategy != "no" and not (data_args.eval_ratio or data_args.eval_data_path):
        problems.append(f"--eval_strategy {training_args.eval_strategy.value} needs --eval_data_path or --eval_ratio")
    if training_args.text_only and training_args.use_lora:
        problems.append("--text_only has no effect on an adapter, which is of the text part alone: give it to "
                        "merge_lora.py")
    if not training_args.use_lora:
        problems += [f"--{lora_field.name} has no effect without --use_lora or --q_lora"
                     for lora_field, default in zip(dataclasses.fields(LoraArguments),
                                                    dataclasses.astuple(LoraArguments()))
                     if getattr(lora_args, lora_field.name) != default]
    problems += strategies.impossible(training_args, lora_args) + impossible_adapter(training_args, lora_args)
    problems += trials.failing(training_args)
    if training_args.trained_weights == "bf16":
        problems += frugal.problems(training_args)
    if training_args.save_dtype != "auto" and (training_args.deepspeed or training_args.fsdp or training_args.use_lora):
        problems.append(f"--save_dtype {training_args.save_dtype}: adapters are saved as they are, and what DeepSpeed "
                        "and FSDP gather in the precision of computation. Leave it out")
    if problems:
        raise UserError("\n       ".join(problems))
    return model_args, data_args, training_args, lora_args


# ---------------------------------------------------------------------------------------------------------------------
# Data: JSON record -> conversation -> input_ids and labels -> batch
#
# The way of one record, each step in mechanisms/data:
#   records.read_records     file -> (place, record)
#   shapes.to_conversation   record of any shape -> Conversation (messages, tools, which answers are trained)
#   encoder.ConversationEncoder
#                            Conversation -> Samples (input_ids and labels), by the model's own chat template
#   token_cache.TokenCache   samples on disk, tokenized once
#   PaddingFreeCollator      samples -> one batch (below)
# ---------------------------------------------------------------------------------------------------------------------

def prepare(argv):
    """The data as `train(argv)` would train on it: (tokenizer, train dataset, eval dataset or None, reports).

    For notebooks and inspection. No weights are loaded (those of a Qwen-1 model are converted on disk first). Items of
    the datasets are dicts with "input_ids" and "labels" (IGNORED where nothing is trained), both int32 of
    shape (tokens,); reports are {"train": DataReport, "eval": DataReport} of the files read. Raises UserError.
    """
    argv = [*prepare_command_line(__file__, argv), "--deepspeed", "none"]  # which would look for other processes
    model_args, data_args, training_args, lora_args = parse_arguments(argv)
    return read_model_and_data(model_args, data_args, training_args, lora_args, Checks())[1:]


def read_model_and_data(model_args, data_args, training_args, lora_args, checks):
    """-> (config, tokenizer, *prepare_datasets(...)). Raises UserError with all that is wrong with either.

    checks: `Checks` that may have found something already.
    """
    tokenizer = None
    with checks:
        config, tokenizer = read_model_folder(model_args, training_args, lora_args)
        check_tokens(model_args.model_name_or_path, config, tokenizer, data_args.keep_added_tokens)
    with checks:
        if tokenizer:
            datasets = prepare_datasets(data_args, training_args, tokenizer)
        else:
            check_records([*data_args.data_path, *(data_args.eval_data_path or [])], data_args.skip_bad_rows,
                          data_args.columns, training_args.cache_dir)
    checks.stop()
    return config, tokenizer, *datasets


def prepare_datasets(data_args, training_args, tokenizer):
    """-> (train, eval or None, {"train": DataReport, ...}). Prints the first sample and what became of all records;
    the tokenizer remembers --keep_added_tokens.

    Raises UserError with every problem of all files if there are more than --skip_bad_rows.
    """
    encoder = ConversationEncoder.of(tokenizer, training_args.model_max_length, data_args)
    tokenizer.init_kwargs |= {KEEP: data_args.keep_added_tokens}  # saved with the result, for chat.py
    datasets, reports, problems = load_datasets(
        data_args, encoder, training_args.cache_dir, lazy=data_args.lazy_preprocess,
        first_before_others=functools.partial(strategies.first_before_others, training_args))
    problems.stop_or_skip(data_args.skip_bad_rows)
    train, evaluation = datasets["train"], datasets.get("eval")
    if problems.rejected and training_args.process_index == 0:
        os.makedirs(training_args.output_dir, exist_ok=True)
        problems.write(os.path.join(training_args.output_dir, "rejected.jsonl"))
    for name, report in reports.items():
        say(*report.lines(f"Data ({name}):"))
        if not report.kept:
            raise UserError(f"no sample of the {name} data is left to learn from (see the table above)")
    if data_args.eval_ratio:
        train, evaluation = split(train, data_args.eval_ratio)
        say(f"  --eval_ratio {data_args.eval_ratio}: {len(evaluation):,} held out, {len(train):,} trained on")
        if not len(train) or not len(evaluation):
            raise UserError(f"--eval_ratio {data_args.eval_ratio} of {len(train) + len(evaluation)} samples leaves one "
                            "side empty")
    first = train[0]
    say("First sample, what is trained between [[ and ]]:",
        console.show_trained(tokenizer, first["input_ids"].tolist(), first["labels"].tolist()), "")
    return train, evaluation, reports


def longest_row(dataset, model_max_length, items):
    """Tokens of the longest row that `PaddingFreeCollator` can make of so many items."""
    if dataset.lengths is None:
        return items * model_max_length
    return int(np.sort(dataset.lengths)[-items:].sum())


class PaddingFreeCollator:
    """Samples, or rows of them, -> one row of all their tokens, end to end, nothing padded.

    Returns a dict, T being the tokens of all samples and n those of them that are to be predicted:
      input_ids, labels: int64 (1, T); the first label of each sample is IGNORED, for nothing comes before it
      position_ids: int64 (1, T), from 0 in each sample
      cu_seq_lens_q, cu_seq_lens_k: int32 (samples + 1), where each sample starts, and T; with max_length_q and
        max_length_k, the tokens of the longest, they keep attention inside each sample
      logits_to_keep: int64 (n), the positions from which a token is predicted: the output layer sees no others
      shift_labels: int64 (1, n), the token to predict from each
    """

    def __call__(self, samples):
        if isinstance(samples[0], list):
            samples = list(itertools.chain.from_iterable(samples))
        lengths = [len(sample["input_ids"]) for sample in samples]
        starts = np.cumsum([0, *lengths])
        input_ids, labels = (np.concatenate([sample[name] for sample in samples]).astype(np.int64)
                             for name in ("input_ids", "labels"))
        labels[starts[:-1]] = IGNORED
        predicted = np.flatnonzero(labels != IGNORED)
        bounds, longest = torch.from_numpy(starts.astype(np.int32)), max(lengths)
        row = {"input_ids": input_ids, "labels": labels, "shift_labels": labels[predicted],
               "position_ids": np.concatenate([np.arange(length) for length in lengths])}
        return {**{name: torch.from_numpy(values)[None] for name, values in row.items()},
                "logits_to_keep": torch.from_numpy(predicted - 1), "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
                "max_length_q": longest, "max_length_k": longest}


# ---------------------------------------------------------------------------------------------------------------------
# Model and adapters
# ---------------------------------------------------------------------------------------------------------------------

def load_model(model_args, training_args, lora_args, config, tokenizer):
    """The model with its frozen weights in the compute precision and all weights that will be trained in fp32.

    bf16 weights would lose small updates: at a learning rate of 1e-5 most of them round to nothing. DeepSpeed keeps
    its own fp32 copy, so under it everything is loaded in the compute precision; --trained_weights bf16 rounds at
    random (mechanisms/frugal.py).
    """
    compute = compute_dtype(training_args)
    in_compute_dtype = training_args.use_lora or training_args.deepspeed or training_args.trained_weights == "bf16"
    quantization = None
    if lora_args.q_lora and not getattr(config, "quantization_config", None):  # a quantized model brings its own
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute)
    elif is_gptq(config):
        config.quantization_config["backend"] = TRAINABLE_BACKEND
    try:
        model = load_weights(
            model_args.model_name_or_path, config=config, cache_dir=training_args.cache_dir,
            quantization_config=quantization, attn_implementation=best_attention(training_args.device, compute),
            dtype=compute if in_compute_dtype else torch.float32,
            device_map=strategies.device_map(training_args))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the weights in {model_args.model_name_or_path} cannot be loaded: "
                        f"{first_line(error)}") from error
    keep_within_samples(model)
    if training_args.trained_weights == "bf16":
        frugal.hold(model)
    model.config.use_cache = False
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config.eos_token_id = [end for end in ends if end is not None]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id, model.config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return model


def read_model_folder(model_args, training_args, lora_args):
    """(config, tokenizer) of the model, which is checked: UserError if it cannot be trained with these arguments.

    Changes the arguments to what the model has: its path if it is a Qwen-1 model, see also `fit_arguments`.
    """
    model_args.model_name_or_path = convert_if_qwen1(model_args.model_name_or_path, training_args.cache_dir)
    config = load_config(model_args.model_name_or_path, training_args.cache_dir)
    fit_arguments(config, training_args, lora_args)
    check_trainable(model_args.model_name_or_path, config, training_args, lora_args)
    if training_args.text_only:
        check_text_only(model_args.model_name_or_path, training_args.cache_dir)
    if note := kernel_note(config, training_args.device):
        say(f"note: {note}")
    return config, load_tokenizer(model_args.model_name_or_path, training_args.cache_dir)


def choose_adapter(model_args, training_args, lora_args, config, tokenizer):
    """peft's config of the adapter that is trained, or None."""
    if lora_args.lora_weight_path:
        return read_adapter(lora_args.lora_weight_path)
    if training_args.use_lora:
        return lora_config(model_args.model_name_or_path, empty_network(config), tokenizer, lora_args)
    return None


def decide_memory(model_args, data_args, training_args, lora_args, checkpoint, config, adapter, tokenizer, dataset,
                  eval_dataset):
    """-> `fitting.Plan`. Decides what is auto: --gradient_checkpointing, --trained_weights, and how many batches
    --join_batches joins. A resumed run keeps the last two. Raises UserError.
    """
    def lora():
        network = empty_network(config)
        settings = LoraArguments(lora_target_modules=default_targets(network))
        return lora_config(model_args.model_name_or_path, network, tokenizer, settings, say=lambda line: None)

    before = checkpoints.read_manifest(checkpoint, "sizes") if checkpoint else {}
    if checkpoint and training_args.trained_weights == "auto":
        training_args.trained_weights = before.get("trained weights", "fp32")
    setup = memory_setup(config, adapter, lora_args.q_lora, training_args)
    may_be_frugal = training_args.trained_weights == "auto" and not frugal.problems(training_args)
    plan, why = fitting.decide(fitting.Plan(
        setup=frugal.setup(setup) if training_args.trained_weights == "bf16" else setup,
        frugal=frugal.setup(setup) if may_be_frugal else None,
        checkpointing=None if training_args.auto_checkpointing else training_args.activation_checkpointing,
        items=training_args.per_device_train_batch_size, accumulation=training_args.gradient_accumulation_steps,
        longest=functools.partial(longest_row, dataset, training_args.model_max_length),
        certain=dataset.lengths is not None,
        limit=training_args.memory_limit and training_args.memory_limit * 1e9, lora=lora,
        evaluated=eval_dataset and functools.partial(longest_row, eval_dataset, training_args.model_max_length),
        evaluation_items=training_args.per_device_eval_batch_size,
        together=training_args.gradient_accumulation_steps if training_args.join_batches and not checkpoint else 1))
    if training_args.join_batches and isinstance(joined := before.get(strategies.JOINED), int):
        plan = plan._replace(together=joined)  # more or fewer would round otherwise, and draw another dropout
    if training_args.auto_checkpointing and plan.checkpointing or plan.setup.frugal:
        say(f"note: {why}")
    training_args.activation_checkpointing = training_args.gradient_checkpointing = plan.checkpointing
    training_args.trained_weights = "bf16" if plan.setup.frugal else "fp32"
    training_args.joined_batches = plan.together
    return plan


def add_adapter(model, adapter, training_args, lora_args):
    """Wrap the model for LoRA: frozen but for the adapters and, on a base model, the embedding and output layers."""
    from peft import PeftModel, get_peft_model

    keeps_own_fp32 = training_args.deepspeed is not None  # and cannot mix fp32 adapters with 16-bit layers
    if lora_args.lora_weight_path:
        with no_code(lora_args.lora_weight_path):
            model = PeftModel.from_pretrained(model, lora_args.lora_weight_path, is_trainable=True,
                                              autocast_adapter_dtype=not keeps_own_fp32)
    else:
        model = get_peft_model(model, adapter, autocast_adapter_dtype=not keeps_own_fp32)
        if is_part_of_weights(lora_args.init_lora_weights):
            start_from_weights(model, lora_args.init_lora_weights)
    dtype = compute_dtype(training_args) if keeps_own_fp32 else torch.float32
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_numel"):  # ZeRO-3's are of that type, and cut up
            parameter.data = parameter.data.to(dtype)  # peft takes that of a GPTQ layer's scales: fp16
    if training_args.activation_checkpointing:
        model.enable_input_require_grads()  # checkpointed blocks need an input with a gradient
    # The default, "auto", asks the Hub whether the vocabulary was resized; ours never is, and what is trained of the
    # embeddings is saved anyhow.
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------

def train(argv):
    """The whole run, from the words of its command line. Returns the Trainer when it is done (None after --dry_run).

    Raises UserError.
    """
    argv = prepare_command_line(__file__, argv)
    strategies.prepare_ranks(argv)
    arguments = parse_arguments(argv)
    if arguments[2].disable_tqdm:
        transformers.utils.logging.disable_progress_bar()
    strategies.join_ranks(arguments[2])
    with strategies.on_first_rank(only_run_in(arguments[2].output_dir)):
        return run(*arguments, command=argv)


def run(model_args, data_args, training_args, lora_args, command):
    """`train` from its arguments, alone in the output folder. command: the words that they come from."""
    arguments = model_args, data_args, training_args, lora_args
    checkpoint, checks = look_around(training_args)
    config, tokenizer, train_dataset, eval_dataset, reports = read_model_and_data(*arguments, checks)
    prompt_note = set_default_mode(tokenizer, reports["train"].modes)
    if data_args.packing:
        train_dataset = PackedRows(train_dataset, training_args.model_max_length, training_args.seed)
    if training_args.dataloader_drop_last and not summary.batch_count(training_args, train_dataset):
        raise UserError(f"--dataloader_drop_last drops all {len(train_dataset)} items: they are fewer than a batch of "
                        "each rank. Leave it out, or give a smaller --per_device_train_batch_size")
    adapter = choose_adapter(model_args, training_args, lora_args, config, tokenizer)
    plan = decide_memory(*arguments, checkpoint, config, adapter, tokenizer, train_dataset, eval_dataset)
    run_facts = facts.run_facts(arguments, train_dataset, config, tokenizer)
    go_on_or_begin(arguments, checkpoint, run_facts)
    questions = sample_answers.questions(training_args, tokenizer, eval_dataset, data_args.system)
    repository = strategies.by_first_rank(functools.partial(publish.repository_of, training_args))

    published_dtype = config.dtype
    wrapped = is_wrapped(model_args.model_name_or_path, training_args.cache_dir)
    whole = wrapped and not (training_args.use_lora or training_args.text_only)
    with fitting.running_out_is_told(plan, training_args.output_dir):
        model = load_model(model_args, training_args, lora_args, config, tokenizer)
        # A new adapter starts from random numbers, of which a network may draw some itself while it is made.
        transformers.set_seed(training_args.seed)
        if training_args.use_lora:
            with gptqmodel_hidden(not is_gptq(config)):
                model = add_adapter(model, adapter, training_args, lora_args)
        transformers.utils.logging.disable_progress_bar()  # one for each checkpoint would follow
        training = summary.before_training(model, training_args, lora_args, train_dataset)
        say(*training)

        if training_args.dry_run:
            train_dataset, eval_dataset = dry_run.shorten(training_args, train_dataset, eval_dataset)
        trainer = SafeTrainer(
            model=model, args=training_args, train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=PaddingFreeCollator(), processing_class=tokenizer, run=run_facts,
            together=plan.together,
            optimizer_cls_and_kwargs=frugal.optimizer(training_args) if plan.setup.frugal else None,
            report=None if training_args.dry_run else Report(
                summary.about(command, arguments, reports, training), questions),
            card=summary.model_card(arguments, facts.settings(arguments), prompt_note, wrapped, reports["train"],
                                    run_facts["data"], repository),
            wrapper=Wrapper(model_args.model_name_or_path, training_args.cache_dir) if whole else None)
        if training_args.dry_run:
            return dry_run.prove(trainer, eval_dataset)
        result = trainer.train(resume_from_checkpoint=checkpoint)
        evaluated = trainer.evaluate_result() if eval_dataset else {}
    if not (training_args.use_lora or training_args.deepspeed or training_args.fsdp):
        asked = training_args.save_dtype
        trainer.convert(published_dtype if asked == "auto" else getattr(torch, asked))
    trainer.save_result()
    trainer.report.end("finished")
    say(*summary.after_training(trainer, result, evaluated, prompt_note, wrapped))
    if repository:
        address = strategies.by_first_rank(
            lambda: publish.upload(training_args.output_dir, trainer.result_files, repository))
        say(f"  Hub:   {address}")
    return trainer


def look_around(training_args):
    """What is there before the data are read. -> (checkpoint to resume from or None, `Checks` with what is wrong)."""
    checks, checkpoint, notices = Checks(), None, []
    with checks:
        checkpoint, notices = strategies.by_first_rank(lambda: checkpoints.checkpoint_to_resume(
            training_args.output_dir, training_args.resume_from_checkpoint, training_args.verify_checkpoint))
    with checks:
        if training_args.uploads:
            strategies.by_first_rank(publish.check_account)
    notices += strategies.overridden_flags(training_args) + strategies.idle_gpus(training_args)
    notices += compilation.clear_locks() if training_args.deepspeed else []
    notices += trials.without_effect(training_args)
    say(*[f"note: {notice}" for notice in notices])
    return checkpoint, checks


def go_on_or_begin(arguments, checkpoint, run_facts):
    """Raises UserError if the checkpoint is that of another run; what this one does not go on from is set aside."""
    training_args = arguments[2]
    if checkpoint:
        notes = checkpoints.check_same_run(checkpoint, run_facts, facts.default_values(arguments))
        say(*[f"note: {note}" for note in notes], f"Resuming from {checkpoint}")
    if not training_args.dry_run:
        moved = strategies.by_first_rank(lambda: checkpoints.set_aside(training_args.output_dir, checkpoint))
        say(*[f"note: {line}" for line in moved])


def main(argv):
    with user_errors_end_the_program():
        train(argv)
        strategies.leave_ranks()


if __name__ == "__main__":
    main(COMMAND_LINE)
