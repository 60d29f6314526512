"""Every method under every strategy, for real: two gloo ranks, and the numbers of one process.

The matrix in docs/gpus.md is the one that this file runs (`test_the_page_shows_this_matrix`).
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import checkpoints

ROOT = Path(finetune.__file__).parent
LORA = ["--lora_r", "8", "--lora_dropout", "0"]  # no dropout: ranks draw other random numbers than one process
METHODS = {"full": [], "LoRA": ["--use_lora", *LORA], "Q-LoRA": ["--q_lora", *LORA]}
STRATEGIES = {"one process": None, "DDP": None, "ZeRO-2": "ds_config_zero2.json", "ZeRO-3": "ds_config_zero3.json",
              "ZeRO-2 offload": "ds_config_zero2_offload.json", "ZeRO-3 offload": "ds_config_zero3_offload.json"}
REFUSED = {("ZeRO-3", "Q-LoRA"), ("ZeRO-3 offload", "Q-LoRA")}  # the library cannot shard quantized weights
STEPS = 10
RESUMED = ("full, chat", "LoRA, base")
# An adapter that begins as a part of weights which ZeRO-3 has shared out, and whose second half is not trained.
FROM_WEIGHTS = {"PiSSA, chat": ["--use_lora", *LORA, "--init_lora_weights", "pissa", "--weight_decay", "0"],
                "OLoRA and DoRA, chat": ["--use_lora", *LORA, "--init_lora_weights", "olora", "--use_dora",
                                         "--weight_decay", "0"]}
OTHER_RUNS = {"learning_rate": "1e-5", "model_name_or_path": None, "lora_alpha": "64", "lora_r": "16"}  # not resumed


def torchrun(arguments, ranks=2, timeout=600, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "mechanisms/torchrun.py"), "--nproc_per_node", str(ranks), *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=ROOT, env={**os.environ, **environment})


def cell_argv(strategy, method, model, out, cache_dir):
    config = STRATEGIES[strategy]
    accumulation = 4 if strategy == "one process" else 2
    argv = ["--model_name_or_path", model, "--data_path", EXAMPLES / "data", "--output_dir", out,
            "--cache_dir", cache_dir, "--max_steps", STEPS, "--save_steps", 5, "--logging_steps", 1,
            "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", accumulation,
            "--learning_rate", "5e-3", "--lr_scheduler_type", "cosine", "--warmup_steps", 2, "--weight_decay", 0.1,
            "--eval_ratio", 0.2, "--per_device_eval_batch_size", 5,  # 12 samples: ranks have not equally many
            "--sample_prompts", "none",  # tests/ranks/test_report.py has them
            *METHODS[method], *(["--deepspeed", config] if config else [])]
    return [str(word) for word in argv]


class Matrix(dict):
    """{strategy: {cell: what tests/ranks/cells.py reports}}, each strategy run when it is first asked for, its ranks
    started once for all of its cells."""

    def __init__(self, models, cache_dir, folder):
        super().__init__()
        self.models, self.cache_dir, self.folder = models, cache_dir, folder

    def __missing__(self, strategy):
        cells = {}
        for method in METHODS:
            for kind, model in self.models.items():
                out = self.folder / f"{strategy} {method} {kind}"
                cells[f"{method}, {kind}"] = {"argv": cell_argv(strategy, method, model, out, self.cache_dir),
                                              "out": str(out)}
        if strategy in ("one process", "ZeRO-2", "ZeRO-3"):
            for name, flags in FROM_WEIGHTS.items():
                out = self.folder / f"{strategy} {name}"
                argv = cell_argv(strategy, "LoRA", self.models["chat"], out, self.cache_dir)
                cells[name] = {"argv": [*argv, *flags], "out": str(out)}
        joined = cell_argv(strategy, "full", self.models["chat"], self.folder / f"{strategy} joined", self.cache_dir)
        cells["joined"] = {"argv": [*joined, "--join_batches", "True"], "out": str(self.folder / f"{strategy} joined")}
        for name in RESUMED:
            last = Path(cells[name]["out"]) / f"checkpoint-{STEPS}"
            cells[name + ", resumed"] = {**cells[name], "remove": [str(last)]}
            for flag, value in OTHER_RUNS.items():
                other = self.models["base" if "chat" in name else "chat"]
                argv = [*cells[name]["argv"], f"--{flag}", value or str(other)]
                cells[f"{name}, {flag}"] = {**cells[name], "argv": argv}
        (self.folder / "cells.json").write_text(json.dumps(cells))
        run = torchrun(["tests/ranks/cells.py", self.folder / "cells.json", self.folder / "results.json"],
                       ranks=1 if strategy == "one process" else 2, timeout=1200)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        self[strategy] = json.loads((self.folder / "results.json").read_text())
        for name, cell in cells.items():
            self[strategy][name]["out"] = cell["out"]
        return self[strategy]


@pytest.fixture(scope="module")
def matrix(make_model, cache_dir, tmp_path_factory):
    models = {"chat": make_model(base=False), "base": make_model(base=True)}
    return Matrix(models, cache_dir, tmp_path_factory.mktemp("matrix"))


def numbers(result):
    assert "error" not in result, result["error"]
    return [(entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in result["log"] if "loss" in entry]


@pytest.mark.parametrize("kind", ["chat", "base"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_cell_trains_to_the_same_numbers_and_its_result_loads(matrix, strategy, method, kind):
    result = matrix[strategy][f"{method}, {kind}"]
    if (strategy, method) in REFUSED:
        assert "cannot be sharded" in result["error"] and "ds_config_zero2.json" in result["error"]
        assert not Path(result["out"]).exists()
        return
    wrapped = {"one process": None, "DDP": "DistributedDataParallel"}.get(strategy, "DeepSpeedEngine")
    assert wrapped is None or result["wrapped"] == wrapped
    alone = numbers(matrix["one process"][f"{method}, {kind}"])
    assert len(alone) == STEPS and alone[-1][0] < alone[0][0]
    for step, (found, expected) in enumerate(zip(numbers(result), alone, strict=True), 1):
        assert found == pytest.approx(expected, rel=1e-4), f"step {step}"
    assert [rate for *_, rate in alone] == pytest.approx(expected_rates())
    eval_losses = [matrix[each][f"{method}, {kind}"]["log"][-1]["eval_loss"] for each in (strategy, "one process")]
    assert eval_losses[0] == pytest.approx(eval_losses[1], rel=1e-4)
    loader = AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(result["out"])
    logits = []
    for out in (result["out"], matrix["one process"][f"{method}, {kind}"]["out"]):
        model = loader.from_pretrained(out, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(torch.tensor([tokenizer("Who are you?")["input_ids"]])).logits)
    assert torch.allclose(*logits, atol=2e-3)
    assert not isinstance(checkpoints.read_manifest(Path(result["out"]) / "checkpoint-5"), str)


@pytest.mark.parametrize("kind", ["chat", "base"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_memory_is_counted_as_it_is_held(matrix, strategy, method, kind):
    """Weights and optimizer on one rank, from the config alone."""
    if (strategy, method) not in REFUSED:
        result = matrix[strategy][f"{method}, {kind}"]
        assert result["counted"] == pytest.approx(result["held"], rel=0.01)


@pytest.mark.parametrize("cell", FROM_WEIGHTS)
@pytest.mark.parametrize("strategy", ["ZeRO-2", "ZeRO-3"])
def test_adapters_begin_as_the_same_part_of_weights_that_are_shared_out(matrix, strategy, cell):
    found, alone = (numbers(matrix[each][cell]) for each in (strategy, "one process"))
    assert found == [pytest.approx(step, rel=1e-4) for step in alone]
    plain = numbers(matrix[strategy]["LoRA, chat"])
    assert found[0][0] == pytest.approx(plain[0][0], rel=1e-5) and found[-1][0] != pytest.approx(plain[-1][0], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_computed_together_are_the_same_step_under_every_strategy(matrix, strategy):
    result = matrix[strategy]["joined"]
    assert result["together"] == (4 if strategy == "one process" else 2)
    assert numbers(result) == [pytest.approx(step, rel=1e-4) for step in numbers(matrix[strategy]["full, chat"])]


def expected_rates():
    """Cosine with 2 steps of warm-up, from its formula: the rate that each of the steps was taken with."""
    from math import cos, pi

    return [5e-3 * (step / 2 if step < 2 else 0.5 * (1 + cos(pi * (step - 2) / (STEPS - 2)))) for step in range(STEPS)]


@pytest.mark.parametrize("cell", RESUMED)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resume_is_exact_under_every_strategy(matrix, strategy, cell):
    resumed, whole = numbers(matrix[strategy][cell + ", resumed"]), numbers(matrix[strategy][cell])
    if "offload" in strategy:  # DeepSpeed's Adam for CPUs multiplies its bias correction up step by step
        assert resumed == [pytest.approx(step, rel=1e-5) for step in whole]
    else:
        assert resumed == whole


@pytest.mark.parametrize("cell, flag, line", [
    (cell, flag, line) for cell in RESUMED for flag, line in (
        ("learning_rate", "learning_rate: 0.005 in the checkpoint, 1e-05 now"), ("model_name_or_path", "base model: "),
        ("lora_alpha", "lora_alpha: 16 in the checkpoint, 64 now"), ("lora_r", "lora_r: 8 in the checkpoint, 16 now"))
    if "LoRA" in cell or "lora" not in flag])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_run_is_not_resumed(matrix, strategy, cell, flag, line):
    assert line in matrix[strategy][f"{cell}, {flag}"]["error"]


def matrix_table():
    """The table of docs/gpus.md."""
    rows = ["| | " + " | ".join(METHODS) + " |", "|---|" + "---|" * len(METHODS)]
    for strategy in STRATEGIES:
        cells = ["refused" if (strategy, method) in REFUSED else "yes" for method in METHODS]
        rows.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_the_page_shows_this_matrix():
    assert matrix_table() in (ROOT / "docs/gpus.md").read_text(encoding="utf-8")


def test_tokens_are_made_once_and_read_by_the_other_ranks(make_model, tmp_path):
    argv = cell_argv("DDP", "LoRA", make_model(), tmp_path / "out", tmp_path / "cache")
    run = torchrun(["finetune.py", *argv, "--max_steps", "1"])
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 1
    assert run.stdout.count("First sample") == 1 and run.stdout.count("Done:") == 1  # only rank 0 speaks


def test_another_number_of_ranks_goes_on_by_the_command_that_the_refusal_names(matrix, make_model, cache_dir, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(matrix["ZeRO-2"]["full, chat"]["out"], out)
    shutil.rmtree(out / f"checkpoint-{STEPS}")
    argv = cell_argv("ZeRO-2", "full", make_model(base=False), out, cache_dir)
    argv[argv.index("--gradient_accumulation_steps") + 1] = "4"
    refused = torchrun(["finetune.py", *argv], ranks=1)
    assert refused.returncode == 2 and "ranks: 2 in the checkpoint, 1 now" in refused.stderr
    [command] = [line for line in refused.stderr.splitlines() if "ds_to_universal" in line]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True, capture_output=True, cwd=ROOT)
    config = {**json.loads((ROOT / "ds_config_zero2.json").read_text()), "checkpoint": {"load_universal": True}}
    (tmp_path / "universal.json").write_text(json.dumps(config))
    went_on = torchrun(["finetune.py", *argv, "--deepspeed", tmp_path / "universal.json"], ranks=1)
    assert went_on.returncode == 0, went_on.stderr
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    for found, expected in zip(numbers({"log": log}), numbers(matrix["ZeRO-2"]["full, chat"]), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("flags, message", [
    (["--fsdp", "full_shard"], "--fsdp needs GPUs"),
    (["--deepspeed", "own.json"], "gradient_clipping"),
])
def test_what_cannot_work_is_refused_before_anything_loads(flags, message, make_model, cache_dir, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 7,
                                                   "train_micro_batch_size_per_gpu": "auto"}))
    flags = [str(tmp_path / flag) if flag == "own.json" else flag for flag in flags]
    argv = cell_argv("DDP", "LoRA", make_model(), tmp_path / "out", cache_dir)
    run = torchrun(["finetune.py", *argv, *flags])
    assert run.returncode == 2 and message in run.stderr
    assert run.stderr.count("error: ") <= 2 and "ChildFailedError" not in run.stderr and "Traceback" not in run.stderr
    assert "Data (train)" not in run.stdout


def test_the_tutorials_configuration_under_the_deepspeed_launcher(make_model, cache_dir, tmp_path):
    """ZeRO-2, both offloads, AdamW, WarmupDecayLR, fp16 auto, as DeepSpeed's and Hugging Face's tutorials have it.

    Its Adam for CPUs is compiled on the first run, which takes minutes.
    """
    offload = {"device": "cpu", "pin_memory": True}
    (tmp_path / "cfg.json").write_text(json.dumps({
        "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {"type": "AdamW", "params": {
            "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
        "scheduler": {"type": "WarmupDecayLR", "params": {
            "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "offload_optimizer": offload, "offload_param": offload},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto"}))
    launcher = Path(sys.executable).parent / "deepspeed"
    run = subprocess.run(
        [str(launcher), "--num_gpus", "2", "--master_port", "29761", "finetune.py", "--deepspeed",
         str(tmp_path / "cfg.json"), "--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"),
         "--output_dir", str(tmp_path / "out"), "--cache_dir", str(cache_dir), "--max_steps", "4",
         "--logging_steps", "1", "--warmup_steps", "2", "--learning_rate", "1e-3", "--lr_scheduler_type", "cosine"],
        capture_output=True, text=True, timeout=1800, cwd=ROOT,
        env={**os.environ, "PATH": f"{launcher.parent}:{os.environ['PATH']}"})
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "has its own optimizer, AdamW: --optim adamw_torch_fused has no effect" in run.stdout
    assert "has its own scheduler, WarmupDecayLR: --lr_scheduler_type cosine has no effect" in run.stdout
    assert "2 x cpu, ZeRO-2" in run.stdout
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_rank_that_cannot_write_its_part_ends_no_run(make_model, cache_dir, tmp_path):
    """DeepSpeed's ranks wait for each other while they save: the one whose disk is full goes on as the others do."""
    program, out = tmp_path / "full.py", tmp_path / "out"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import finetune, torch
save = torch.save

def full(state, path, **options):
    if "checkpoint-1/" in str(path) and "zero_pp_rank_1" in str(path):
        open(path, "wb").write(b"half of it")
        raise OSError(28, "No space left on device")
    save(state, path, **options)

torch.save = full
finetune.main(sys.argv[1:])
""")
    run = torchrun([program, *cell_argv("ZeRO-2", "LoRA", make_model(), out, cache_dir), "--max_steps", 2,
                    "--save_steps", 1])
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stdout + run.stderr
    assert (f"note: {out}/checkpoint-1 is not saved: No space left on device; there is none before it. "
            "Training goes on") in run.stdout.splitlines()
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not isinstance(checkpoints.read_manifest(str(out / "checkpoint-2")), str)


def test_ranks_with_weights_in_bf16_round_alike(make_model, cache_dir, tmp_path):
    """Their generators differ, as they do after dropout; the weights must not, and are those of one process."""
    program = tmp_path / "digests.py"
    program.write_text(f"""
import hashlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
import finetune, torch
from accelerate.utils import gather_object
seeded = finetune.load_model
finetune.load_model = lambda *args: (seeded(*args), torch.manual_seed(args[1].process_index))[0]
trainer = finetune.train(sys.argv[1:])
weights = b"".join(weight.float().detach().numpy().tobytes() for weight in trainer.model.parameters())
digests = gather_object([hashlib.sha256(weights).hexdigest()])
if trainer.args.process_index == 0:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("RESULT", json.dumps([digests, losses]))
""")
    results = []
    for ranks, strategy in ((2, "DDP"), (1, "one process")):
        argv = cell_argv(strategy, "full", make_model(), tmp_path / strategy, cache_dir)
        run = torchrun([program, *argv, "--bf16", "--trained_weights", "bf16", "--max_steps", 3], ranks=ranks)
        assert run.returncode == 0, run.stdout + run.stderr
        results.append(json.loads(run.stdout.partition("RESULT ")[2].splitlines()[0]))
    (digests, losses), (_, of_one) = results
    assert len(digests) == 2 and digests[0] == digests[1] and losses == pytest.approx(of_one, rel=1e-2)


def test_small_gradients_of_many_batches_are_not_lost_under_deepspeed(tmp_path):
    """16 batches in bf16, one with a gradient of 256 and 15 with 0.5, which a sum in bf16 would leave out."""
    configs, result = sorted(map(str, ROOT.glob("ds_config_*.json"))), tmp_path / "sums.json"
    run = torchrun([ROOT / "tests/ranks/sums.py", result, *configs], CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(result.read_text()) == dict.fromkeys(configs, 256 + 15 * 0.5) and len(configs) == 4


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_under_fsdp_is_that_of_the_whole_model(make_model, tmp_path, tied):
    """--fsdp needs a GPU; its wrapping does not."""
    run = torchrun(["tests/ranks/fsdp.py", make_model(tie_word_embeddings=tied), tmp_path / "results.json"])
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results.keys() == {"1", "2"}
    for result in results.values():
        assert 0.4 < result["share of the weights here"] < 0.6
        assert result["loss"] == pytest.approx(result["expected"], rel=1e-6)
        assert result["furthest gradient"] < 1e-5
