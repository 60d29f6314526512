"""One measurement of bench/compare.py, in a process of its own: python worker.py '{"task": ..., "result": ...}'.

Tasks: `prepare` makes the model and the samples that all contestants share, `train` runs one contestant. The answer
goes to the file `result` as JSON.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python looks for modules in the script's folder only

from mechanisms.quiet import silence

if __name__ == "__main__":  # before torch: some of it is read when that is imported
    silence()

# isort: split
import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen3_5TextConfig

import finetune
from finetune import IGNORED, PaddingFreeCollator
from mechanisms.data.datasets import read_files, to_conversations, tokenize
from mechanisms.data.packing import best_fit_decreasing
from mechanisms.data.records import Problems, find_files
from mechanisms.data.report import DataReport
from mechanisms.data.token_cache import TokenCache
from mechanisms.flags import prepare_command_line
from mechanisms.head_loss import HeadLoss, SummedCrossEntropy
from mechanisms.linear_attention import LINEAR
from mechanisms.trainer import SafeTrainer

# The first three are small enough for a laptop: in the first nearly all work is the output layer's, in the second the
# blocks', and the third has three layers of linear attention and one of attention, as Qwen3.5. The others have the
# shapes of the published models; the weights are random in all of them.
SHAPES = {
    "head-heavy": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "body-heavy": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8,
                   "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
    "hybrid": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
               "linear_key_head_dim": 64, "linear_value_head_dim": 64, "vocab_size": 8192, "tie_word_embeddings": True},
    "qwen2.5-0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
                     "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "qwen2.5-1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
                     "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
                     "tie_word_embeddings": True},
    "qwen2.5-7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                   "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                   "tie_word_embeddings": False},
}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "trl")


# ---------------------------------------------------------------------------------------------------------------------
# What all contestants share
# ---------------------------------------------------------------------------------------------------------------------

def prepare(job):
    """Write the model with random weights, and the samples of every step, into job["folder"]."""
    if job["model"] in SHAPES:
        shape = SHAPES[job["model"]]
        config = Qwen3_5TextConfig(**shape) if "linear_num_key_heads" in shape else Qwen2Config(
            max_position_embeddings=32768, rope_theta=1e6, use_sliding_window=False, **shape)
        torch.manual_seed(0)
        with torch.device(job["device"]):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if job["lora"] else torch.float32)
        model.save_pretrained(job["model_path"])
        finetune.load_tokenizer(job["tokenizer_path"]).save_pretrained(job["model_path"])
    vocabulary = AutoConfig.from_pretrained(job["model_path"]).vocab_size

    tokenizer = finetune.load_tokenizer(job["model_path"])
    cache = os.path.join(job["folder"], "tokens")
    TokenCache.write(cache, tokenized(job, tokenizer), dict)
    samples = TokenCache(cache)
    order = np.random.default_rng(0).permutation(len(samples))
    wanted = job["steps"] * job["samples_per_step"]
    if len(order) < wanted:
        raise SystemExit(f"{wanted} samples are needed, and the data has only {len(order)}")
    chosen = [{name: values.tolist() for name, values in samples[index].items()} for index in order[:wanted]]
    if vocabulary < len(tokenizer):
        # There is no published tokenizer of so few words: real ids are taken modulo the vocabulary.
        for sample in chosen:
            sample["input_ids"] = [token % vocabulary for token in sample["input_ids"]]
            sample["labels"] = [label if label == IGNORED else label % vocabulary for label in sample["labels"]]
    steps = [chosen[start:start + job["samples_per_step"]] for start in range(0, wanted, job["samples_per_step"])]
    Path(job["folder"], "samples.json").write_text(json.dumps(steps))
    lengths = [len(sample["input_ids"]) for sample in chosen]
    labelled = sum(label != IGNORED for sample in chosen for label in sample["labels"][1:])
    return {"tokens": sum(lengths), "labelled": labelled, "longest": max(lengths), "records": len(samples),
            "versions": {name: version(name) for name in PACKAGES}}


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def tokenized(job, tokenizer):
    """The TokenizedSamples of all the data, by finetune.py: its labels are everybody's."""
    return tokenize(find_files(job["data"], Problems()),
                             finetune.ConversationEncoder(tokenizer, job["width"]), DataReport())


def load_steps(job):
    """list of steps, each a list of samples as `TokenCache` gives them."""
    steps = [[{"input_ids": np.array(sample["input_ids"], np.int32), "labels": np.array(sample["labels"], np.int64)}
              for sample in step] for step in json.loads(Path(job["folder"], "samples.json").read_text())]
    if job["fault"]:  # for the test of the comparison itself: a sample's labels are lost but for the last
        steps[0][0]["labels"][:-1] = IGNORED
    return steps


def rows_of(job, packed=False):
    """The rows of all steps, and which of them each forward takes.

    A step has the same samples whoever trains on it, and the same number of forwards. Packed, its samples are put into
    rows of at most job["width"] tokens. Returns (rows, forwards): rows is a list of lists of samples, forwards a list
    of lists of row numbers, `job["forwards"]` of them for each step (this is set here).
    """
    plan = []
    for step in load_steps(job):
        numbers = [[number] for number in range(len(step))]
        if packed:
            numbers = best_fit_decreasing([len(sample["input_ids"]) for sample in step], job["width"], seed=0)
        rows = [[step[number] for number in row] for row in numbers]
        size = job["rows_per_forward"] or len(rows)
        plan.append([rows[start:start + size] for start in range(0, len(rows), size)])
    job["forwards"] = max(map(len, plan))
    for batches in plan:
        while len(batches) < job["forwards"]:  # Trainer wants as many in each step: split the one with most samples
            batches.sort(key=lambda batch: sum(map(len, batch)))
            batch = batches.pop()
            row = batch[0]
            batches += ([batch[::2], batch[1::2]] if len(batch) > 1
                        else [[row[:len(row) // 2]], [row[len(row) // 2:]]])
    batches = [batch for step in plan for batch in step]
    ends = np.cumsum([len(batch) for batch in batches]).tolist()
    forwards = [list(range(end - len(batch), end)) for batch, end in zip(batches, ends)]
    return [row for batch in batches for row in batch], forwards


def in_fixed_steps(trainer_class):
    """The Trainer with one change: its batches are those of `rows_of`, in that order."""

    class InFixedSteps(trainer_class):
        def get_train_dataloader(self):
            return self.accelerator.prepare(DataLoader(
                self.train_dataset, batch_sampler=self.forwards, collate_fn=self.count))

        def count(self, items):
            batch = self.data_collator(items)
            self.computed_tokens = getattr(self, "computed_tokens", 0) + batch["input_ids"].numel()
            return batch

    return InFixedSteps


def flags(job):
    """Trainer's settings that are everybody's. The norm is logged of the gradient as it is: nothing is clipped."""
    bf16 = job["dtype"] == "bf16"
    return {"output_dir": job["folder"], "max_steps": job["steps"], "learning_rate": 1e-6, "max_grad_norm": 1e9,
            "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
            "per_device_train_batch_size": max(1, job["samples_per_step"] // job["forwards"]),
            "gradient_accumulation_steps": job["forwards"], "bf16": bf16, "fp16": False,
            "use_cpu": job["device"] == "cpu", "seed": 0}


def padded(samples, width=None, pad=0):
    """Samples -> a batch for the stock model, padded right to `width`, or to the longest sample."""
    width = width or max(len(sample["input_ids"]) for sample in samples)
    batch = {"input_ids": torch.full((len(samples), width), pad), "labels": torch.full((len(samples), width), IGNORED),
             "attention_mask": torch.zeros(len(samples), width, dtype=torch.long)}
    for number, sample in enumerate(samples):
        length = len(sample["input_ids"])
        batch["input_ids"][number, :length] = torch.from_numpy(sample["input_ids"])
        batch["labels"][number, :length] = torch.from_numpy(sample["labels"])
        batch["attention_mask"][number, :length] = 1
    return batch


def load_stock(job):
    """The model as `from_pretrained` gives it: masked SDPA, all logits."""
    frozen_16_bit = job["lora"] and job["dtype"] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(job["model_path"],
                                                 dtype=torch.bfloat16 if frozen_16_bit else torch.float32)
    model.config.use_cache = False
    return with_adapter(job, model)


def with_adapter(job, model):
    if not job["lora"]:
        return model
    arguments = parse_ours(job)
    transformers.set_seed(0)
    return finetune.add_adapter(model, finetune.load_tokenizer(job["model_path"]), arguments[0], *arguments[2:])


# ---------------------------------------------------------------------------------------------------------------------
# The contestants: functions of the job that return a Trainer
# ---------------------------------------------------------------------------------------------------------------------

def original(job, width=True, checkpointing=False):
    """The recipe of Qwen's own finetune.py: rows padded to the maximum length, Trainer, adamw_torch, and nothing else.

    Only the labels are not its own, which include the user's control tokens, but everybody's.
    """
    rows, forwards = rows_of(job)
    model = load_stock(job)
    trainer = in_fixed_steps(transformers.Trainer)(
        model=model, train_dataset=[row[0] for row in rows],
        args=transformers.TrainingArguments(**flags(job), optim="adamw_torch", activation_checkpointing=checkpointing,
                                            remove_unused_columns=False, disable_tqdm=True),
        data_collator=functools.partial(padded, width=job["width"] if width else None))
    trainer.forwards = forwards
    return trainer


def trl(job, packed=False, checkpointing=False):
    """TRL's SFTTrainer with its defaults, but for the precision, and for gradient checkpointing unless asked for.

    It takes a dataset that has input_ids and labels as it is. Packed, `pack_dataset` (TRL's own) makes each row, of the
    samples that best-fit decreasing (TRL's default as well) puts there among those of the step: left to pack the whole
    dataset, it would mix samples of all steps, and no two contestants would take the same step.
    """
    from datasets import Dataset, concatenate_datasets
    from trl import SFTConfig, SFTTrainer, pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows, forwards = rows_of(job, packed)
    if packed:
        datasets = [pack_dataset(Dataset.from_list(row), job["width"]) for row in rows]
        assert all(len(dataset) == 1 for dataset in datasets)
        dataset = concatenate_datasets(datasets)
    else:
        dataset = Dataset.from_list([row[0] for row in rows])
    trainer = in_fixed_steps(SFTTrainer)(
        model=load_stock(job), train_dataset=dataset, processing_class=finetune.load_tokenizer(job["model_path"]),
        args=SFTConfig(**flags(job), max_length=job["width"], packing=packed, gradient_checkpointing=checkpointing,
                       dataset_kwargs={"skip_prepare_dataset": packed}),
        # TRL's own as well; without packing it would take the tokenizer's padding token, which is no token of the
        # model with few words
        data_collator=None if packed else DataCollatorForLanguageModeling(pad_token_id=0))
    trainer.forwards = forwards
    return trainer


def parse_ours(job):
    values = flags(job) | {"model_name_or_path": job["model_path"], "data_path": job["data"][0],
                           "model_max_length": job["width"], "disable_tqdm": True}
    argv = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    if job["lora"]:
        argv += ["--use_lora", "--lora_dropout", "0", "--lora_embeddings", "none", "--lora_target_modules",
                 "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return finetune.parse_arguments(prepare_command_line(finetune.__file__, argv))


def ours(job, packed=False, collator=None, attention=None, logits=False):
    """finetune.py, from its command line to its Trainer.

    The ablations take one thing away: `collator` makes other batches, `attention` is another implementation, `logits`
    leaves the loss to the stock model.
    """
    rows, forwards = rows_of(job, packed)
    model_args, _, training_args, lora_args = parse_ours(job)
    tokenizer = finetune.load_tokenizer(job["model_path"])
    config = AutoConfig.from_pretrained(job["model_path"])
    model = with_adapter(job, finetune.load_model(model_args, training_args, lora_args, config, tokenizer))
    if attention:
        model.set_attn_implementation(attention)
    trainer = in_fixed_steps(SafeTrainer)(
        model=model, args=training_args, train_dataset=rows if packed else [row[0] for row in rows],
        data_collator=collator or PaddingFreeCollator(), processing_class=tokenizer, run={}, card="")
    trainer.forwards = forwards
    if logits:
        trainer.head_loss = None
    elif collator is padded_with_targets:
        trainer.head_loss = HeadLossOfPadded(model)
    return trainer


def padded_with_targets(samples):
    """Padded to the longest, with the token to predict from each position."""
    batch = padded(samples)
    batch["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return batch


class HeadLossOfPadded(HeadLoss):
    """`HeadLoss` for batches of several rows: `logits_to_keep` cannot name other positions in each."""

    def summed(self, hidden):
        labelled = self.targets != IGNORED
        return SummedCrossEntropy.apply(hidden[labelled], self.linear.weight, self.linear.bias, None, None,
                                        self.targets[labelled], self.smoothing)


def without_targets(samples):
    """`PaddingFreeCollator` without what tells the stock model at which positions logits are wanted."""
    batch = PaddingFreeCollator()(samples)
    del batch["logits_to_keep"], batch["shift_labels"]
    return batch


CONTESTANTS = {
    "O": original,
    "O'": functools.partial(original, width=False),
    "T": trl,
    "P": functools.partial(trl, packed=True),
    "F": ours,
    "FP": functools.partial(ours, packed=True),
    "F/padded": functools.partial(ours, collator=padded_with_targets, attention="sdpa"),
    "F/mask": functools.partial(ours, attention="sdpa"),
    "F/labelled": functools.partial(ours, logits=True),
    "F/all": functools.partial(ours, collator=without_targets, logits=True),
    "O+gc": functools.partial(original, checkpointing=True),
    "T+gc": functools.partial(trl, checkpointing=True),
    "P+gc": functools.partial(trl, packed=True, checkpointing=True),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

class Clock(transformers.TrainerCallback):
    """Notes when each step ended, and what Trainer logs of it."""

    def __init__(self):
        self.ends, self.losses, self.norms = [], [], []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.time())

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))


def train(job):
    """One contestant's run. Seconds are those of the steps after the first, which warms up."""
    steps = load_steps(job)
    clock = Clock()
    trainer = CONTESTANTS[job["contestant"]](job)
    flops = sum(model_flops(trainer.model, step) for step in steps[1:])
    trainer.add_callback(clock)
    trainer.train()
    result = {
        "loss": clock.losses[0], "grad_norm": clock.norms[0], "losses": clock.losses,
        "step_seconds": np.diff(clock.ends).tolist(), "seconds": clock.ends[-1] - clock.ends[0],
        "first_step_seconds": clock.ends[0] - job["started"],
        "tokens": sum(len(sample["input_ids"]) for step in steps[1:] for sample in step),
        "computed_tokens_ratio": trainer.computed_tokens / sum(len(s["input_ids"]) for step in steps for s in step),
        "flops": flops, "peak_bytes": peak_bytes(job["device"])}
    if job["contestant"] == "O":
        result["roofline"] = roofline(job)
    return result | {"preprocessed_per_second": preprocessing_speed(job, trainer)}


def peak_bytes(device):
    """Most memory ever held: on a GPU what torch had allocated there, else the resident set of this process.

    (Linux keeps that twice: ru_maxrss of a new process begins with its parent's, VmHWM does not.)
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def model_flops(model, samples):
    """Floating-point operations that training on the samples needs: what a contestant does beyond is waste.

    A matrix of N weights takes 2 N for each token forward, 2 N for the gradient of its input and, if it is trained, 2 N
    for its own: 6 N (Kaplan et al. 2020, arXiv:2001.08361, section 2.1; Chowdhery et al. 2022, arXiv:2204.02311,
    appendix B), 4 N if frozen. Attention of a sample of n tokens takes, in each layer, 2 n^2 x (heads x head size) for
    its scores and as much for its values, half of that as it is causal, and twice as much again backward. The output
    layer counts for labelled positions only: nothing else needs it. Embeddings, norms, the optimizer and what linear
    attention computes beside its matrices count nothing.
    """
    config, head = model.config, model.get_output_embeddings().weight
    body = sum((6 if module.weight.requires_grad else 4) * module.weight.numel() for module in model.modules()
               if isinstance(module, torch.nn.Linear) and module.weight is not head)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers - (getattr(config, "layer_types", None) or []).count(LINEAR)
    attention = 6 * layers * config.num_attention_heads * head_size
    total = 0
    for sample in samples:
        length, labelled = len(sample["input_ids"]), int((sample["labels"][1:] != IGNORED).sum())
        total += length * body + length ** 2 * attention
        total += labelled * (6 if head.requires_grad else 4) * head.numel()
    return total


def preprocessing_speed(job, trainer):
    """Records per second from the data to input_ids and labels, as this contestant does it."""
    conversations = [{"messages": conversation.messages} for _, conversation in to_conversations(
        read_files(find_files(job["data"], Problems()), Problems()), Problems(), DataReport().notices)]
    tokenizer = finetune.load_tokenizer(job["model_path"])
    start = time.time()
    if job["contestant"].startswith("F"):
        for _ in tokenized(job, tokenizer):  # reads the files too
            pass
    elif job["contestant"].startswith("O"):
        for conversation in conversations:
            ids = tokenizer.apply_chat_template(conversation["messages"], padding="max_length", truncation=True,
                                                max_length=job["width"], return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[ids == tokenizer.pad_token_id] = IGNORED
    else:
        from datasets import Dataset
        from trl.chat_template_utils import get_training_chat_template

        with contextlib.suppress(ValueError):  # a template TRL does not know: it would train on every token
            trainer.chat_template = get_training_chat_template(tokenizer)
            trainer.args.assistant_only_loss = True
        trainer._prepare_dataset(Dataset.from_list(conversations), tokenizer, trainer.args, trainer.args.packing, None,
                                 "train")
    return len(conversations) / (time.time() - start)


def roofline(job):
    """The most floating-point operations per second that a matrix product reaches here, over the shapes that matter."""
    config = AutoConfig.from_pretrained(job["model_path"])
    size = 8192 if job["device"] == "cuda" else 2048
    width, tokens = config.hidden_size, 1024
    shapes = [(tokens, width, config.intermediate_size), (tokens, width, config.vocab_size), (size, size, size)]
    return max(matmul_speed(shape, job) for shape in shapes)


def matmul_speed(shape, job, seconds=1.0):
    rows, inner, columns = shape
    kind = {"device": job["device"], "dtype": torch.bfloat16 if job["dtype"] == "bf16" else torch.float32}
    left, right, out = (torch.randn(size, **kind) for size in ((rows, inner), (inner, columns), (rows, columns)))
    repeats = 10 if job["device"] == "cuda" else 1
    best, stop = 0, time.time() + seconds
    while time.time() < stop:
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(left, right, out=out)
        if job["device"] == "cuda":
            torch.cuda.synchronize()
        best = max(best, repeats * 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def main(job):
    torch.set_num_threads(job["threads"])
    result = {"prepare": prepare, "train": train}[job["task"]](job)
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(json.loads(sys.argv[1]))
