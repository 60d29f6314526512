"""Whether this program computes, fits and runs fast as it should on this machine's GPU. One card, no network.

    python bench/gpu_check.py              # under 10 minutes; on a machine without a GPU: tiny shapes, under a minute

Each check is a line that begins with OK or BAD (correctness, and estimated against measured memory), and each step
that is timed a row of the table for bench/RESULTS.md. Exits with 1 if a check is BAD. All models have random weights.
For torch 2.11 and newer: where varlen_attn lacks enable_gqa, it is called without.
"""

import contextlib
import gc
import importlib.util
import inspect
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mechanisms.quiet import silence  # noqa: E402

silence()

import bitsandbytes  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.nn.attention.varlen import varlen_attn  # noqa: E402
from transformers import Qwen2Config, Qwen3_5TextConfig  # noqa: E402

import finetune  # noqa: E402
from examples.make_tiny_model import EXAMPLES, example_texts, make_tiny_model  # noqa: E402
from mechanisms import fitting, frugal, memory  # noqa: E402
from mechanisms.attention import WITHIN_SAMPLES, within_samples  # noqa: E402
from mechanisms.errors import first_line  # noqa: E402
from mechanisms.gptq import gptqmodel_hidden  # noqa: E402
from mechanisms.head_loss import HeadLoss, SummedCrossEntropy  # noqa: E402
from mechanisms.linear_attention import keep_within_samples  # noqa: E402
from mechanisms.lora import default_targets, empty_network  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HALF = torch.bfloat16 if not GPU or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
LIMIT = 540  # seconds after which no further step is timed


def shapes():
    """{name: config}: those of the published models, or tiny ones with the same names on a CPU."""
    dense = {"0.5B": (896, 4864, 24, 14, 2, 151936, True), "3B": (2048, 11008, 36, 16, 2, 151936, True),
             "7B": (3584, 18944, 28, 28, 4, 152064, False)}
    if not GPU:
        dense = dict.fromkeys(dense, (64, 96, 2, 4, 2, 500, False))
    hybrid = {"vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
              "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256,
              "linear_num_key_heads": 16, "linear_num_value_heads": 16} if GPU else {
        "vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return {name: Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp,
                              num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
                              tie_word_embeddings=tied, max_position_embeddings=32768)
            for name, (hidden, mlp, layers, heads, groups, vocabulary, tied) in dense.items()
            } | {"hybrid 0.8B": Qwen3_5TextConfig(**hybrid, tie_word_embeddings=True)}


class Report:
    """Lines of checks, and whether one of them was BAD."""
    bad = 0

    @classmethod
    def line(cls, good, words):
        cls.bad += not good
        print("OK " if good else "BAD", words, flush=True)


def distance(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def seconds(function, repetitions=3):
    """Of one call, on average; the first one is not counted."""
    for repetition in range(repetitions + 1):
        if repetition == 1:
            synchronize()
            start = time.perf_counter()
        function()
    synchronize()
    return (time.perf_counter() - start) / repetitions


def synchronize():
    if GPU:
        torch.cuda.synchronize()


# -- correctness ------------------------------------------------------------------------------------------------------

def check_attention():
    """Flash attention within samples against the loop in fp32, with gradients."""
    lengths = [5, 700, 1, 1300] if GPU else [5, 30, 1, 60]
    bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=DEVICE)
    for dtype in {HALF, torch.float16} if GPU else {HALF}:
        for size, window in ((64, None), (128, None), (128, 100 if GPU else 20)):
            heads = [torch.randn(1, number, sum(lengths), size, device=DEVICE, dtype=dtype) for number in (14, 2, 2)]
            results = []
            for kind in (dtype, torch.float32):
                inputs = [tensor.to(kind).clone().requires_grad_() for tensor in heads]
                output, _ = within_samples(None, *inputs, None, scaling=size ** -0.5, cu_seq_lens_q=bounds,
                                           max_length_q=max(lengths), sliding_window=window)
                results.append([output, *torch.autograd.grad(output.float().square().sum(), inputs)])
            far = max(map(distance, *results))
            Report.line(far < 0.02, f"attention {dtype}, heads of {size}, window {window}: {far:.4f} (below 0.02)")


def check_head_loss():
    """Loss and gradients of the output layer in 16 bits against fp32."""
    tokens, size, vocabulary = (4096, 896, 151936) if GPU else (64, 32, 500)
    hidden = torch.randn(tokens, size, device=DEVICE, dtype=HALF)
    weight = (torch.randn(vocabulary, size, device=DEVICE) * 0.02).to(HALF)
    targets, results = torch.randint(vocabulary, (tokens,), device=DEVICE), []
    for dtype in (HALF, torch.float32):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        loss = SummedCrossEntropy.apply(*inputs, None, None, None, targets, 0.0)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    far = list(map(distance, *results))
    Report.line(far[0] < 1e-3 and max(far[1:]) < 0.02,
                f"head loss {HALF}: {far[0]:.1e}, its gradients {max(far[1:]):.4f} (below 1e-3, 0.02)")


def check_padding():
    """A row of samples against each sample alone, padded to the longest, through transformers' own loss."""
    config = shapes()["0.5B"]
    model = build(config)
    vocabulary, lengths = config.vocab_size, [7, 100, 33]
    samples = [{name: np.random.randint(0, vocabulary, length) for name in ("input_ids", "labels")}
               for length in lengths]
    row = to_device(finetune.PaddingFreeCollator()(samples))
    with torch.no_grad(), torch.autocast(DEVICE.type, HALF):
        with HeadLoss(model).computing(row["shift_labels"]):
            ours = model(**row).loss.item()
        padded = {name: torch.full((len(lengths), max(lengths)), fill, device=DEVICE)
                  for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))}
        for place, sample in enumerate(samples):
            for name in ("input_ids", "labels"):
                padded[name][place, :lengths[place]] = torch.from_numpy(sample[name]).to(DEVICE)
            padded["attention_mask"][place, :lengths[place]] = 1
        model.set_attn_implementation("sdpa")
        wanted = model(**padded).loss.item()
    Report.line(abs(ours / wanted - 1) < 2e-3, f"padding-free loss {ours:.4f}, padded {wanted:.4f} (within 0.2 %)")


def check_runs():
    """finetune.py itself: packing, accumulation, checkpointing and resume lead to the same numbers."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_tiny_model(folder / "tiny-chat", example_texts(), hidden_size=64)

        def train(out, batch, accumulation, *flags):
            argv = ["--model_name_or_path", folder / "tiny-chat", "--data_path", EXAMPLES / "persona.jsonl",
                    "--cache_dir", folder / "cache", "--output_dir", folder / out, "--max_steps", 2, "--logging_steps",
                    1, "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
                    "--save_strategy", "steps", "--save_steps", 1, *flags]
            with contextlib.redirect_stdout(io.StringIO()):
                return finetune.train(list(map(str, argv))).state.log_history

        def compare(what, logs, steps):
            off = max(abs(logs[1][step][key] / logs[0][step][key] - 1) for step in steps
                      for key in ("loss", "grad_norm"))
            Report.line(off < 0.01, f"{what}: loss and gradient norm are off by {off:.1e} (below 1e-2)")

        whole = train("whole", 4, 1)
        compare("4 batches of 1", (whole, train("split", 1, 4)), [0, 1])
        compare("gradient checkpointing", (whole, train("again", 4, 1, "--gradient_checkpointing", "True")), [0, 1])
        shutil.rmtree(folder / "whole" / "checkpoint-2")
        compare("resumed after the first step", (whole, train("whole", 4, 1)), [1])
        compare("packing", (train("all", 1000, 1), train("packed", 1000, 1, "--packing")), [0, 1])


# -- memory and speed -------------------------------------------------------------------------------------------------

class Case(NamedTuple):
    """One kind of step that is measured."""
    shape: str
    method: str  # full, frugal, LoRA, Q-LoRA
    tokens: int
    checkpointing: bool = False
    liger: bool = False
    compiled: bool = False

    def __str__(self):
        return ", ".join([self.shape, self.method, f"{self.tokens:,} tokens", *(
            name for name in ("checkpointing", "liger", "compiled") if getattr(self, name))])


CASES = [Case("0.5B", "full", tokens, checkpointing) for tokens in (2048, 4096) for checkpointing in (False, True)] + [
    Case("0.5B", "full", 4096, liger=True), Case("0.5B", "full", 4096, compiled=True),
    Case("0.5B", "frugal", 4096), Case("7B", "LoRA", 2048), Case("7B", "LoRA", 4096),
    Case("7B", "LoRA", 4096, checkpointing=True), Case("7B", "LoRA", 4096, liger=True),
    Case("7B", "LoRA", 4096, compiled=True), Case("3B", "Q-LoRA", 2048), Case("3B", "Q-LoRA", 2048, True),
    Case("3B", "frugal", 4096, checkpointing=True), Case("7B", "frugal", 2048, checkpointing=True),
    Case("hybrid 0.8B", "full", 4096)]


def build(config, dtype=torch.float32):
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=WITHIN_SAMPLES, dtype=dtype)
    keep_within_samples(model)
    model.config.use_cache = False
    return model.train()


def to_device(batch):
    return {name: value.to(DEVICE) if torch.is_tensor(value) else value for name, value in batch.items()}


def hold_in_4_bits(model):
    """Linear layers as --q_lora loads them."""
    head = model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and linear is not head:
            parent = model.get_submodule(name.rpartition(".")[0])
            packed = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=HALF,
                compress_statistics=True, quant_type="nf4", device="meta")
            packed.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4").to(DEVICE)
            packed.bias = linear.bias
            setattr(parent, name.rpartition(".")[2], packed)


def setup_of(case, config):
    lora = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.05,
                      target_modules=default_targets(empty_network(config))) if "LoRA" in case.method else None
    setup = memory.Setup(config, lora, nf4=case.method == "Q-LoRA", compute=HALF, device=DEVICE, accumulates=True)
    return frugal.setup(setup) if case.method == "frugal" else setup


def measure(case, rate):
    """A row of the table. Checks that the loss is a random model's, and the peak what was estimated."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    config = shapes()[case.shape]
    setup, tokens = setup_of(case, config), case.tokens if GPU else case.tokens // 32
    model = build(config, HALF if setup.adapter else torch.float32)
    if setup.nf4:
        hold_in_4_bits(model)
    if setup.adapter:
        with gptqmodel_hidden(True):
            model = get_peft_model(model, setup.adapter)
    if setup.frugal:
        frugal.hold(model)
    if case.checkpointing:
        model.activation_checkpointing_enable()
        if setup.adapter:
            model.enable_input_require_grads()
    head = HeadLoss(model)
    if case.liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model.get_base_model() if setup.adapter else model,
                                        fused_linear_cross_entropy=False)
    run = torch.compile(model) if case.compiled else model
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = frugal.SeededAdamW(trained, seed=1, lr=1e-5) if setup.frugal else torch.optim.AdamW(
        trained, 1e-5, fused=True)
    row = to_device(finetune.PaddingFreeCollator()([
        {name: np.random.randint(0, config.vocab_size, tokens // 4) for name in ("input_ids", "labels")}
        for _ in range(4)]))

    def step():
        for _ in range(2):  # gradients of the first row are there while the second is computed
            with head.computing(row["shift_labels"]), torch.autocast(DEVICE.type, HALF):
                loss = run(**row).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    loss, wanted = step(), np.log(config.vocab_size)
    took = seconds(step, 3 if GPU else 1) / 2
    peak = torch.cuda.max_memory_allocated() if GPU else None
    estimate = fitting.Need.of(fitting.Plan(
        setup, case.checkpointing, 1, 2, lambda items: tokens, True, None, None)).total(case.checkpointing)
    if case.liger or case.compiled or not GPU:  # the estimate is of the network as it is
        Report.line(abs(loss - wanted) < 1, f"{case}: loss {loss:.2f} of a random model, {wanted:.2f}")
    else:
        Report.line(0.85 < estimate / peak < 1.15, f"{case}: peak {peak / 1e9:.1f} GB, estimate {estimate / 1e9:.1f}")
    linear = sum(module.weight.numel() for module in empty_network(config).modules()
                 if isinstance(module, torch.nn.Linear))
    operations = 2 * linear * ((2 if setup.adapter else 3) + case.checkpointing)  # of a token
    gigabytes = "-" if peak is None else f"{peak / 1e9:.1f}"
    return (f"| {case} | {tokens / took:,.0f} | {operations * tokens / took / rate:.0%} | {gigabytes} "
            f"| {estimate / 1e9:.1f} |")


def matmul_rate():
    """Operations a second of this card in a large product of 16-bit matrices."""
    size = 8192 if GPU else 256
    left, right = (torch.randn(size, size, device=DEVICE, dtype=HALF) for _ in range(2))
    return 2 * size ** 3 / seconds(lambda: left @ right, 10)


def main():
    start = time.perf_counter()
    card = f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}" if GPU else "no GPU: tiny shapes"
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    kernels = {name: bool(importlib.util.find_spec(name)) for name in ("liger_kernel", "fla", "flash_attn")}
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, transformers {transformers.__version__}, {card}")
    print(f"varlen_attn {'has' if grouped else 'lacks'} enable_gqa; installed: "
          + (", ".join(name for name, there in kernels.items() if there) or "no kernels"))
    torch.manual_seed(0)
    np.random.seed(0)
    for check in (check_attention, check_head_loss, check_padding, check_runs):
        check()
    rate, rows = matmul_rate(), []
    print(f"matrix products: {rate / 1e12:.1f} TFLOP/s")
    for case in CASES:
        reason = "liger-kernel is not installed" if case.liger and not kernels["liger_kernel"] else \
            "it is compiled on a GPU only" if case.compiled and not GPU else \
            "the time is over" if time.perf_counter() - start > LIMIT else None
        if reason:
            print(f"--- {case}: not measured, {reason}")
            continue
        try:
            rows.append(measure(case, rate))
        except RuntimeError as error:  # out of memory, or what torch.compile cannot compile
            Report.line(False, f"{case}: {first_line(error)}")
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()
    print("\n| step | tokens/s | share of the matmul rate | peak GB | estimate GB |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{Report.bad} BAD; {time.perf_counter() - start:.0f} s")
    return min(1, Report.bad)


if __name__ == "__main__":
    sys.exit(main())
