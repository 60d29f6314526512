"""run_gptq.py and Q-LoRA on what it makes: quantized, measured, trained on, reloaded; nothing broken gets a name."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2MoeConfig, Qwen3MoeConfig

import finetune
import run_gptq
from examples.make_tiny_model import EXAMPLES
from mechanisms import fitting, memory, summary
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line

ROOT = Path(finetune.__file__).parent
PERSONA = str(EXAMPLES / "persona.jsonl")
FILES = {"config.json", "quantize_config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
         "chat_template.jinja", "model.safetensors", "README.md"}
Q_LORA = ["--q_lora", "--lora_r", 8, "--lora_alpha", 32, "--max_steps", 6, "--save_steps", 3, "--learning_rate", "1e-2",
          "--gradient_checkpointing", "True"]


@pytest.fixture(scope="module")
def train(cache_dir):
    """train(model, output_dir, *flags) -> Trainer."""

    def run(model, out, *flags, data=EXAMPLES / "data"):
        return finetune.train(prepare_command_line(finetune.__file__, [str(word) for word in (
            "--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--cache_dir", cache_dir,
            "--logging_steps", 1, "--per_device_train_batch_size", 6, "--model_max_length", 512, *flags)]))

    return run


@pytest.fixture(scope="module")
def trained(make_model, train, tmp_path_factory):
    """A tiny model that has learned the persona by heart."""
    out = tmp_path_factory.mktemp("trained") / "haru"
    train(make_model(base=False), out, "--max_steps", 75, "--learning_rate", "1e-2", "--lr_scheduler_type", "cosine",
          "--save_strategy", "no", data=PERSONA)
    return out


def quantize(model, out, *flags, data=PERSONA):
    """What run_gptq.py prints."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_gptq.run(prepare_command_line(run_gptq.__file__, [str(word) for word in (
            "--model_name_or_path", model, "--data_path", data, "--out_path", out, "--max_len", 512, *flags)]))
    return output.getvalue()


@pytest.fixture(scope="module")
def quantized(trained, tmp_path_factory):
    """{bits: (folder, output)}. Nothing else is written, not where the user stands either."""
    parent, here = tmp_path_factory.mktemp("quantized"), set(os.listdir())
    (parent / "int4.unfinished").mkdir()
    (parent / "int4.unfinished" / "config.json").write_text("left by a killed run")
    (parent / "int8").mkdir()  # an empty folder is as good as none
    made = {4: (parent / "int4", quantize(trained, parent / "int4", "--group-size", 32)),
            8: (parent / "int8", quantize(trained, parent / "int8", "--bits", 8, "--group_size", 64, "--desc_act"))}
    assert "logs" not in set(os.listdir()) - here
    return made


def answers(folder):
    """The greedy answers to the persona's questions."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    said = []
    for line in Path(PERSONA).read_text(encoding="utf-8").splitlines()[::3]:
        turns = [turn for turn in json.loads(line)["messages"] if turn["role"] != "assistant"][:1]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        said.append(tokenizer.decode(model.generate(**ids, max_new_tokens=30, do_sample=False, use_cache=True)[0]))
    return said


@pytest.mark.parametrize("bits", [4, 8])
def test_the_folder_is_whole_and_measured(trained, quantized, bits):
    folder, output = quantized[bits]
    assert {path.name for path in folder.iterdir()} == FILES
    assert not list(folder.parent.glob("*.unfinished"))
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["bits"] == bits and config["quantization_config"]["sym"]
    assert config["quantization_config"]["desc_act"] == (bits == 8)
    for name in ("config.json", "quantize_config.json"):
        assert str(folder.parent) not in (folder / name).read_text()
    tokenizer, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(trained)
    assert tokenizer.chat_template == original.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(folder).eos_token_id
    before, after, factor = (float(word.strip("()x")) for line in output.splitlines()
                             if line.startswith("  perplexity") for word in line.split()[2:] if word != "(x")
    assert 1 < before < 2 and factor == pytest.approx(after / before, abs=1e-3)
    assert factor < (1.2 if bits == 4 else 1.01)
    assert "size after" in output and f"vllm serve {folder}" in output
    assert "base_model:" in (folder / "README.md").read_text() and f"{after:.4f}" in (folder / "README.md").read_text()
    assert "layer 2/2  left 0:00:00" in output and "INFO" not in output and "▓" not in output


def test_eight_bits_answer_word_for_word(trained, quantized):
    original = answers(trained)
    assert any("Haru" in answer for answer in original)  # it has learned something
    assert answers(quantized[8][0]) == original


def numbers(trainer):
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def logits(model, folder):
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("Who are you?")["input_ids"]])
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def test_q_lora_on_gptq_after_and_before_other_models_in_one_process(train, quantized, make_model, tmp_path, capfd):
    int4 = quantized[4][0]
    train(make_model(base=False), tmp_path / "lora", "--use_lora", "--max_steps", 1)
    out = tmp_path / "out"
    trainer = train(int4, out, *Q_LORA)
    whole = numbers(trainer)
    assert whole[-1][0] < whole[0][0] - 0.1
    adapted = {name.split(".")[-4] for name, _ in trainer.model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    reloaded = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    # gptqmodel's kernel for inference on a CPU computes in bf16, the one for training in fp32
    trained = logits(trainer.model, out)
    assert (logits(reloaded, out) - trained).norm() < 0.05 * trained.norm()
    with reloaded.disable_adapter():
        assert not torch.allclose(logits(reloaded, out), logits(trainer.model, out), atol=0.5)
    shutil.rmtree(out / "checkpoint-6")
    (out / "adapter_model.safetensors").unlink()
    assert numbers(train(int4, out, *Q_LORA)) == whole
    for method in ("--use_lora", "--q_lora"):  # NF4
        train(make_model(base=False), tmp_path / method, method, "--max_steps", 1)
    written = "".join(capfd.readouterr())
    assert "Resuming from" in written
    for noise in ("INFO", "loss_type", "multiple devices", "▓", "Extension load"):
        assert noise not in written


def test_the_table_counts_packed_weights_and_biases(train, make_model, tmp_path, capsys):
    """As many as in the 16-bit model, in one with biases."""
    model = make_model(model_type="qwen2")
    quantize(model, tmp_path / "int4", "--group-size", 32)
    capsys.readouterr()
    tables = []
    for folder, method in ((model, "--use_lora"), (tmp_path / "int4", "--q_lora")):
        train(folder, tmp_path / method, method, "--lora_embeddings", "none", "--max_steps", 1)
        said = capsys.readouterr().out
        tables.append(re.findall(r"^  (?:trained )?parameters .*", said, re.MULTILINE))
        assert ("--base_model THE_16_BIT_MODEL\n" in said) == (folder != model)
    assert tables[0] == tables[1] and len(tables[0]) == 2


@pytest.mark.parametrize("base, original", [
    ("Qwen/Qwen-7B-Chat-Int4", "Qwen/Qwen-7B-Chat"), ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8", "Qwen/Qwen2.5-7B-Instruct"),
    ("Qwen/Other", "THE_16_BIT_MODEL"), ("models/mine-Int4/", "THE_16_BIT_MODEL")])
def test_the_command_that_merges_names_the_16_bit_model(base, original):
    command = "python merge_lora.py --adapter_path 'my out' --output_dir 'my out-merged'"
    assert summary.merge_command("my out") == command
    assert summary.merge_command("my out", base) == f"{command} --base_model {original}"


@pytest.mark.parametrize("precision", [["--bf16"], []])
def test_memory_is_counted_with_packed_weights_which_autograd_keeps_unpacked(train, quantized, tmp_path, monkeypatch,
                                                                             precision):
    """From the config alone, against all that the real model holds and saves."""
    setups = []

    def decide(plan):
        setups.append(plan.setup)
        return plan._replace(checkpointing=False), "for this test"

    monkeypatch.setattr(fitting, "decide", decide)
    flags = ["--q_lora", "--max_steps", 1, "--save_strategy", "no", *precision]
    model = train(quantized[4][0], tmp_path / "out", *flags).model
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *(
        buffer for name, buffer in model.named_buffers() if name.endswith(("qweight", "qzeros", "scales", "g_idx")))]}
    assert memory.training_state(setups[0]).weights == pytest.approx(sum(weights.values()), rel=1e-3)
    saved = {}

    def count(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=bool(precision)):
        model.train().get_base_model().base_model(
            input_ids=torch.zeros(1, 100, dtype=torch.long), use_cache=False, cu_seq_lens_q=torch.tensor([0, 100]),
            max_length_q=100)
    real = sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
    assert memory.activation_bytes(setups[0], 100)[0] == pytest.approx(real, rel=0.05)


def test_q_lora_on_int8_trains(train, quantized, tmp_path):
    losses = [loss for loss, _ in numbers(train(quantized[8][0], tmp_path / "out", *Q_LORA))]
    assert losses[-1] < losses[0] - 0.1


def test_an_evaluation_before_training_leaves_the_gradients_as_they_are(train, quantized, tmp_path):
    """gptqmodel's own choice of a kernel for the CPU loses them then, and says nothing."""
    flags = [*Q_LORA, "--lora_dropout", 0, "--save_strategy", "no", "--eval_ratio", 0.1]
    plain = train(quantized[4][0], tmp_path / "plain", *flags)
    evaluated = train(quantized[4][0], tmp_path / "evaluated", *flags, "--eval_on_start", "True", "--eval_strategy",
                      "steps", "--eval_steps", 2)
    assert numbers(evaluated) == numbers(plain)


def test_two_ranks_train_to_the_numbers_of_one(train, quantized, cache_dir, tmp_path):
    flags = [*Q_LORA, "--lora_dropout", 0, "--save_strategy", "no", "--max_grad_norm", 1]
    alone = numbers(train(quantized[4][0], tmp_path / "alone", *flags))
    common = ["--model_name_or_path", quantized[4][0], "--data_path", EXAMPLES / "data", "--cache_dir", cache_dir,
              "--logging_steps", 1, "--per_device_train_batch_size", 3, "--model_max_length", 512, *flags]
    cells = {name: {"argv": [str(word) for word in (*common, "--output_dir", tmp_path / name, *more)]}
             for name, more in (("DDP", []), ("ZeRO-2", ["--deepspeed", "ds_config_zero2.json"]))}
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    run = subprocess.run([sys.executable, "mechanisms/torchrun.py", "--nproc_per_node", "2", "tests/ranks/cells.py",
                          str(tmp_path / "cells.json"), str(tmp_path / "results.json")],
                         capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    for name, wrapper in (("DDP", "DistributedDataParallel"), ("ZeRO-2", "DeepSpeedEngine")):
        assert "error" not in results[name], results[name]["error"]
        assert results[name]["wrapped"] == wrapper
        found = [(entry["loss"], entry["grad_norm"]) for entry in results[name]["log"] if "loss" in entry]
        for two, one in zip(found, alone, strict=True):
            assert two == pytest.approx(one, rel=1e-4)
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)


def test_full_training_of_a_quantized_model_is_refused(train, quantized, tmp_path):
    for flags in ([], ["--use_lora"]):
        with pytest.raises(UserError, match="--q_lora"):
            train(quantized[4][0], tmp_path / "out", *flags)


@pytest.mark.parametrize("flags, message", [
    (["--bits", 5], "--bits 5: GPTQ has 8, 4, 3, 2"),
    (["--group-size", 128], "--group-size 128 .* widths of 64, 192; possible: 16, 32, 64, -1"),
    (["--max_samples", 0], "--max_samples 0: at least 1"),
    (["--out_path", "FULL"], "--out_path .* is not empty"),
    (["--data_path", "nowhere.json"], "no such file, folder or match: nowhere.json"),
    (["--data_path", "EMPTY"], "the file is empty"),
    (["--data_path", "BAD"], "bad.json:1 .*record 1"),
    (["--data_path", "ONE"], "1 different conversation"),
    (["--model_name_or_path", "INT4"], r"quantized already \(GPTQ\)"),
    (["--model_name_or_path", "ADAPTER"], "merge_lora.py --adapter_path .*adapter --output_dir .*adapter-merged"),
    (["--model_name_or_path", "nowhere"], "nowhere: no such folder"),
    (["--group-sise", 64], "did you mean --group_size"),
])
def test_refusals_come_before_any_weight_is_loaded(trained, quantized, tmp_path, monkeypatch, flags, message):
    good = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Haru."}]}
    for name, text in (("empty.json", ""), ("bad.json", '{"messages": 1}\n'), ("one.json", json.dumps(good) + "\n" +
                       json.dumps(good)), ("full/file", ""), ("adapter/adapter_config.json", "{}")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    known = {"FULL": tmp_path / "full", "EMPTY": tmp_path / "empty.json", "BAD": tmp_path / "bad.json",
             "ONE": tmp_path / "one.json", "INT4": quantized[4][0], "ADAPTER": tmp_path / "adapter"}
    monkeypatch.setattr(run_gptq, "measure", None)
    with pytest.raises(UserError, match=message):
        quantize(trained, tmp_path / "out", *(["--group-size", 32] if "--group" not in flags[0] else []),
                 *[known.get(flag, flag) for flag in flags])
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_before_the_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="--out_path: 0.0 GB are needed there, and 0.0 GB are free"):
        quantize(trained, tmp_path / "out", "--group-size", 32)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [Qwen2MoeConfig, Qwen3MoeConfig])
def test_mixtures_of_experts_are_refused(config, make_model, tmp_path):
    """transformers would load random experts."""
    folder = tmp_path / "moe"
    shutil.copytree(make_model(), folder)
    config(num_hidden_layers=1, hidden_size=64, num_experts=4, moe_intermediate_size=88).save_pretrained(folder)
    with pytest.raises(UserError, match="mixture of experts"):
        quantize(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_skipped_records_are_written_down(trained, quantized, tmp_path, monkeypatch):
    data = tmp_path / "data.jsonl"
    data.write_text(Path(PERSONA).read_text(encoding="utf-8") + '{"foo": 1}\n', encoding="utf-8")
    monkeypatch.setattr(run_gptq, "quantize", copy_of(quantized[4][0]))
    quantize(trained, tmp_path / "out", "--group-size", 32, "--skip_bad_rows", 1, data=data)
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["line"] == 19


def copy_of(folder, damage=None):
    """Stands in for `run_gptq.quantize`: the same result without the work, with damaged scales."""

    def copy(path, target, *_, **options):
        for name in ("config.json", "quantize_config.json", "model.safetensors"):
            shutil.copy(folder / name, target)
        if damage is not None:
            weights = load_file(folder / "model.safetensors")
            weights = {name: torch.full_like(tensor, damage) if name.endswith("down_proj.scales") else tensor
                       for name, tensor in weights.items()}
            save_file(weights, Path(target) / "model.safetensors", metadata={"format": "pt"})

    return copy


@pytest.mark.parametrize("damage", [0, math.nan])
def test_a_broken_result_gets_no_name(trained, quantized, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.setattr(run_gptq, "quantize", copy_of(quantized[4][0], damage))
    with pytest.raises(SystemExit) as end:
        run_gptq.main(["--model_name_or_path", str(trained), "--data_path", PERSONA, "--out_path",
                       str(tmp_path / "out"), "--group_size", "32"])
    captured = capsys.readouterr()
    assert end.value.code == 1 and "error: the quantized model is broken: its perplexity" in captured.err
    assert "Done" not in captured.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize("stop, code, line", [
    (signal.SIGKILL, -signal.SIGKILL, "layer 1/2"), (signal.SIGINT, 130, "layer 1/2"), (signal.SIGINT, 130, None)])
def test_a_stop_leaves_nothing_that_looks_complete(trained, wait_for, tmp_path, stop, code, line):
    """While layers are quantized, and (line None) while libraries are imported."""
    run = subprocess.Popen(
        [sys.executable, "run_gptq.py", "--model_name_or_path", str(trained), "--data_path", PERSONA, "--out_path",
         str(tmp_path / "out"), "--group-size", "32"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    wait_for(run, line)
    run.send_signal(stop)
    errors = run.communicate(timeout=100)[1]
    assert run.returncode == code
    assert [path.name for path in tmp_path.iterdir()] == (["out.unfinished"] if line else [])
    if stop == signal.SIGINT:
        assert errors.endswith("\ninterrupted\n") and "Traceback" not in errors


@pytest.mark.parametrize("module, function, call", [
    ("run_gptq", "measure", 1), ("run_gptq", "quantize", 1), ("shutil", "copy", 3), ("run_gptq", "complete", 1),
    ("run_gptq", "write", 1), ("run_gptq", "measure", 2), ("run_gptq", "write", 2), ("os", "replace", 1)])
def test_a_kill_between_two_files_leaves_nothing_that_looks_complete(trained, quantized, tmp_path, monkeypatch, module,
                                                                     function, call):
    """Cut off at any step, as nothing is done after it."""
    class Killed(BaseException):
        pass

    monkeypatch.setattr(run_gptq, "quantize", copy_of(quantized[4][0]))
    monkeypatch.setattr(run_gptq, "measure", lambda folder, samples: (1.5, 1000))
    whole, calls = getattr(sys.modules[module], function), []

    def cut_off(*arguments, **options):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return whole(*arguments, **options)

    monkeypatch.setattr(sys.modules[module], function, cut_off)
    with pytest.raises(Killed):
        quantize(trained, tmp_path / "out", "--group-size", 32)
    assert [path.name for path in tmp_path.iterdir()] == ["out.unfinished"]
    monkeypatch.setattr(sys.modules[module], function, whole)
    quantize(trained, tmp_path / "out", "--group-size", 32)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def test_the_library_leaves_logging_and_folders_alone():
    """The user's own logging works after it, and what reads the environment later finds Hugging Face's folders."""
    code = ("import logging, os\nimport mechanisms.gptq\nbefore = set(os.environ)\n"
            "mechanisms.gptq.import_gptqmodel()\n"
            "print(*(name for name in set(os.environ) - before if name.startswith(('HF_', 'TRANSFORMERS_'))))\n"
            "logging.basicConfig(level=logging.INFO, format='seen %(message)s')\nlogging.info('by the user')")
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env={name: value for name, value in os.environ.items() if not name.startswith("HF_")})
    assert run.returncode == 0 and not run.stdout.strip(), run.stdout + run.stderr
    assert "seen by the user" in run.stderr


def test_flags_are_answered_before_torch_is_imported(tmp_path):
    start = time.time()
    run = subprocess.run([sys.executable, "run_gptq.py", "--model", "x"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "unknown flag --model" in run.stderr and "Traceback" not in run.stderr
    assert time.time() - start < 5
    shown = subprocess.run([sys.executable, "run_gptq.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"--{flag}" in shown for flag in ("group_size", "max_samples", "desc_act", "bits"))
