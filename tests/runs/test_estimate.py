"""estimate_memory.py: what fits, from a config.json alone, and said as the start of a training would decide it.

At the end: which method fits on which card, as the original's documentation has it for Qwen-1 and rows of 512 tokens.
"""

import json
import os
import re
import sys

import pytest
import torch

import estimate_memory
from mechanisms import fitting, memory

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "vocab_size": 2000, "max_position_embeddings": 4096, "torch_dtype": "bfloat16"}
QWEN2 = {**SMALL, "model_type": "qwen2", "num_key_value_heads": 2}
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}}
QWEN1 = {**SMALL, "model_type": "qwen", "intermediate_size": 1024, "kv_channels": 64, "layer_norm_epsilon": 1e-6,
         "rotary_emb_base": 10000, "seq_length": 2048, "no_bias": True}
HYBRID = {"model_type": "qwen3_5", "text_config": {
    **SMALL, "model_type": "qwen3_5_text", "num_key_value_heads": 2, "head_dim": 64,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"]}}
MOE = {**QWEN2, "model_type": "qwen3_moe", "head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 128}
LORA = "--use_lora", "--deepspeed", "none"


@pytest.fixture
def estimate(tmp_path, capsys):
    """estimate(config, *flags) -> {(method, strategy): way} as --json has them, for a folder with a config.json alone.
    """
    def run(config, *flags, name="Tiny-Instruct"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        estimate_memory.run([str(folder), "--json", *map(str, flags)])
        [model] = json.loads(capsys.readouterr().out)
        return {(way["method"], way["strategy"]): way for way in model["ways"]}

    return run


def test_every_method_under_every_strategy_that_finetune_has(estimate):
    alone = estimate(QWEN2)
    assert list(alone) == [
        ("full-parameter", "one GPU"), ("full-parameter", "weights in bf16"), ("full-parameter", "ZeRO-2, offload"),
        ("full-parameter", "ZeRO-3, offload"), ("LoRA", "one GPU"), ("LoRA", "ZeRO-2, offload"),
        ("LoRA", "ZeRO-3, offload"), ("Q-LoRA", "one GPU"), ("Q-LoRA", "ZeRO-2, offload")]
    shared = estimate(QWEN2, "--gpus", 4)
    assert [strategy for method, strategy in shared if method == "LoRA"] == [
        "DDP", "ZeRO-2", "ZeRO-3", "ZeRO-2, offload", "ZeRO-3, offload"]
    assert not {strategy for method, strategy in shared if method == "Q-LoRA"} & {"ZeRO-3", "ZeRO-3, offload"}
    assert shared["Q-LoRA", "ZeRO-2"]["flags"] == "--q_lora --deepspeed ds_config_zero2.json"
    weights = {strategy: way["gb"]["weights"] for (method, strategy), way in shared.items() if method == "LoRA"}
    assert weights["ZeRO-3, offload"] < weights["ZeRO-3"] <= weights["ZeRO-2"] == weights["DDP"]


def test_the_parts_are_those_that_training_counts(tmp_path):
    """At the size of real models, by the functions that decide at the start of a training."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN2))
    argv = [str(tmp_path), "--use_lora", "--lora_embeddings", "none", "--lora_r", "8", "--model_max_length", "1000",
            "--per_device_train_batch_size", "3", "--deepspeed", "none"]
    argv = estimate_memory.prepare_command_line(estimate_memory.__file__, argv, estimate_memory.FINETUNE)
    _, _, groups = estimate_memory.parse_arguments(argv)
    [found] = estimate_memory.Model(str(tmp_path), groups).estimates(1, [24])
    setup = found.way.setup
    assert (setup.adapter.r, setup.trained, setup.device.type) == (8, torch.float32, "cuda")
    plan = fitting.Plan(setup, None, 3, 1, lambda items: 1000 * items, True, 24e9, None)
    need = fitting.Need.of(plan)
    assert found.total == pytest.approx(need.total(True)) and found.cards == {24: "fits"}
    frozen = memory.training_state(setup._replace(adapter=None, trained=torch.bfloat16)).weights
    assert found.parts["weights"] == frozen and found.parts["adapters"] == need.state.weights - frozen > 0
    assert found.parts["reserve"] == pytest.approx(memory.RESERVE * (found.total + found.parts["reserve"]))


def test_a_card_is_judged_by_the_function_that_decides_at_the_start(estimate):
    flags = "--trained_weights", "bf16", "--per_device_train_batch_size", 64
    way = "full-parameter", "weights in bf16"
    total = sum(size for name, size in estimate(QWEN2, *flags)[way]["gb"].items() if name != "reserve")
    for share, verdict in ((0.9, "does not fit"), (1.05, "tight"), (1.3, "fits")):
        assert list(estimate(QWEN2, *flags, "--gpu_memory", total * share)[way]["cards"].values()) == [verdict]


def test_flags_of_finetune_choose_and_count(estimate, tmp_path):
    data = tmp_path / "chats.jsonl"
    data.write_text("{}")
    pasted = "--use_lora --learning_rate 3e-4 --num_train_epochs 3 --gradient_checkpointing False".split()
    ways = estimate(QWEN2, "--data_path", data, "--output_dir", tmp_path / "out", *pasted)
    assert {method for method, _ in ways} == {"LoRA"} and not ways["LoRA", "one GPU"]["gradient_checkpointing"]
    assert list(estimate(QWEN2, "--trained_weights", "bf16")) == [("full-parameter", "weights in bf16")]
    assert list(estimate(QWEN2, "--q_lora", "--gpus", 2, "--deepspeed", "ds_config_zero2.json")) == [
        ("Q-LoRA", "ZeRO-2")]
    own = tmp_path / "own.json"
    own.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    way = estimate(QWEN2, "--use_lora", "--gpus", 2, "--deepspeed", own)["LoRA", "ZeRO-3, offload"]
    assert way["flags"] == f"--use_lora --deepspeed {own}" and way["gb"]["optimizer"] == 0 < way["gb"]["weights"]
    small, large = (estimate(QWEN2, *LORA, "--model_max_length", length)["LoRA", "one GPU"]["gb"]
                    for length in (512, 4096))
    assert large["activations"] > 4 * small["activations"] and large["weights"] == small["weights"]


def test_models_of_other_kinds(estimate, tmp_path):
    assert list(estimate({**QWEN2, **GPTQ})) == [("Q-LoRA", "one GPU"), ("Q-LoRA", "ZeRO-2, offload")]
    for config, methods in ((MOE, {"full-parameter", "LoRA"}), (HYBRID, {"full-parameter", "LoRA", "Q-LoRA"})):
        assert {method for method, _ in estimate(config, "--deepspeed", "none")} == methods
    first = estimate(QWEN1, *LORA, "--lora_target_modules", "c_attn", "w1")
    assert first == estimate({**QWEN2, "num_key_value_heads": 4}, *LORA, "--lora_target_modules", "q_proj", "k_proj",
                             "v_proj", "up_proj")
    base, chat = (estimate(QWEN2, *LORA, name=name)["LoRA", "one GPU"]["gb"] for name in ("Tiny-Base", "Tiny-Chat"))
    assert base["adapters"] > chat["adapters"]
    assert os.listdir(tmp_path / "Tiny-Base") == ["config.json"]


def test_real_configs(real_data, capsys):
    for name in ("checkpoints/Qwen-tiny-Chat", "checkpoints/Qwen-tiny-Chat-Int4"):
        estimate_memory.run([str(real_data / name)])
        lines = capsys.readouterr().out.splitlines()
        assert ("full-parameter" in lines) == ("Int4" not in name) and "Q-LoRA" in lines


def test_eighty_columns_and_colour_only_on_a_terminal(tmp_path, capsys, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({**QWEN2, "hidden_size": 8192, "intermediate_size": 29568,
                                                      "num_attention_heads": 64,
                                                      **GPTQ}))
    monkeypatch.chdir(tmp_path)
    command = [".", "--gpus", "8"]
    estimate_memory.run(command)
    plain = capsys.readouterr().out
    assert max(map(len, plain.splitlines())) <= 80 and "\033" not in plain
    assert re.search(r"^  DDP +[\d.]+ +W+", plain, re.MULTILINE)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    estimate_memory.run(command)
    coloured = capsys.readouterr().out
    assert "\033[44mW" in coloured and re.sub(r"\033\[\d+m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    estimate_memory.run(command)
    assert capsys.readouterr().out == plain


# -- the original's table ------------------------------------------------------------------------------------------

QWEN1_SIZES = {"1_8B": (2048, 11008, 24, 16), "7B": (4096, 22016, 32, 32), "14B": (5120, 27392, 40, 40),
         "72B": (8192, 49152, 80, 64)}


@pytest.mark.parametrize("card, gpus, model, flags", [
    (24, 1, "1_8B", "--trained_weights bf16"), (24, 1, "7B", "--use_lora"), (24, 1, "14B", "--q_lora"),
    (24, 4, "14B", "--use_lora --deepspeed ds_config_zero3.json"),
    (80, 1, "1_8B", "--trained_weights fp32"), (80, 1, "14B", "--use_lora"), (80, 1, "72B", "--q_lora"),
    (80, 2, "7B", "--deepspeed ds_config_zero3.json"), (80, 2, "14B", "--use_lora --deepspeed ds_config_zero2.json"),
    (80, 4, "7B", "--deepspeed ds_config_zero2.json"), (80, 4, "14B", "--deepspeed ds_config_zero3.json"),
    (80, 4, "72B", "--use_lora --deepspeed ds_config_zero3.json")])
def test_what_the_original_says_fits_does(card, gpus, model, flags, tmp_path, capsys):
    hidden, mlp, layers, heads = QWEN1_SIZES[model]
    folder = tmp_path / f"Qwen-{model}-Chat"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "qwen", "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "kv_channels": 128, "vocab_size": 152064 if model != "1_8B" else 151936,
        "layer_norm_epsilon": 1e-6, "rotary_emb_base": 10000, "seq_length": 8192, "no_bias": True,
        **(GPTQ if flags == "--q_lora" else {})}))
    estimate_memory.run([str(folder), "--json", "--gpus", str(gpus), "--gpu_memory", str(card), "--model_max_length",
                         "512", *flags.split()])
    way = json.loads(capsys.readouterr().out)[0]["ways"][0]
    with capsys.disabled():
        print(f"\n{card} GB x {gpus}, {model} {flags}: {sum(way['gb'].values()):.1f} GB with a reserve", end=" ")
    assert way["cards"][str(card)] in ("fits", "tight")
