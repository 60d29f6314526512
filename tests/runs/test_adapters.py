"""Adapters of other programs: what fits the model is continued and merged, others are refused everywhere alike."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import chat
import finetune
import merge_lora
from examples.make_tiny_model import EXAMPLES
from mechanisms import loading
from mechanisms.errors import UserError


@pytest.fixture(scope="module")
def foreign(make_model, tmp_path_factory):
    """foreign(settings, model=..., kind=LoraConfig) -> a new folder with an adapter, as peft alone saves it."""

    def make(settings=None, model=None, kind=LoraConfig, rows=None):
        folder = tmp_path_factory.mktemp("foreign") / "adapter"
        network = AutoModelForCausalLM.from_pretrained(model or make_model())
        if rows:
            network.resize_token_embeddings(rows)
        usual = {"r": 4, "target_modules": ["q_proj", "v_proj"]} if kind is LoraConfig else {}
        network = get_peft_model(network, kind(task_type="CAUSAL_LM", **{**usual, **(settings or {})}))
        torch.manual_seed(0)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn_like(parameter)
        network.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make


@pytest.fixture(scope="module")
def plain(foreign):
    return foreign()


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def renamed(tensors):
    return {name.replace(".model.model.", ".model.model.language_model."): tensor for name, tensor in tensors.items()}


TENSOR_FAULTS = {
    "names of another program": (renamed, "missing in it"),
    "half the layers": (lambda tensors: {name: tensor for name, tensor in tensors.items() if ".1." not in name},
                        "4 tensors of this model's layers are missing in it"),
    "a surplus tensor": (lambda tensors: {**tensors, "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight":
                                          torch.ones(4, 64)}, "in it belong to no layer of this model"),
    "empty tensors of ZeRO-3": (lambda tensors: {name: torch.empty(0) for name in tensors}, "holds empty tensors")}
OTHER_FAULTS = {
    "a deeper model": lambda foreign, make_model: (foreign(model=make_model(num_layers=4)), "belong to no layer"),
    "another hidden size": lambda foreign, make_model: (foreign(model=make_model(hidden_size=128)), "size mismatch"),
    "other rows of embeddings": lambda foreign, make_model: (
        foreign({"modules_to_save": ["embed_tokens", "lm_head"]}, make_model(tie_word_embeddings=False), rows=600),
        "size mismatch"),
    "prompt tuning": lambda foreign, make_model: (
        foreign({"num_virtual_tokens": 3}, kind=PromptTuningConfig), "is of the kind PROMPT_TUNING"),
    "IA3": lambda foreign, make_model: (
        foreign({"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}, kind=IA3Config),
        "is of the kind IA3"),
    "a part of the base in it": lambda foreign, make_model: (
        foreign({"init_lora_weights": "pissa"}), "took part of the base model's weights into itself")}


def rank_as_text(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": "4"}))


@pytest.mark.parametrize("fault", [*TENSOR_FAULTS, *OTHER_FAULTS, "a rank that is a text"])
def test_an_adapter_that_does_not_fit_is_refused_alike(fault, plain, foreign, make_model, cache_dir, tmp_path, capsys,
                                                       monkeypatch):
    if fault in OTHER_FAULTS:
        made, message = OTHER_FAULTS[fault](foreign, make_model)
    for module in (finetune, loading):
        monkeypatch.setattr(module, "load_weights", lambda *_, **__: pytest.fail("weights were loaded"))
    adapter, model = tmp_path / "adapter", make_model(tie_word_embeddings=False) if "rows" in fault else make_model()
    if fault in OTHER_FAULTS:
        shutil.copytree(made, adapter)
    else:
        shutil.copytree(plain, adapter)
        if fault in TENSOR_FAULTS:
            change, message = TENSOR_FAULTS[fault]
            change_tensors(adapter, change)
        else:
            rank_as_text(adapter)
            message = '"r": "4" is no number'
    said = []
    for main, words in (
            (finetune.main, ["--model_name_or_path", model, "--data_path", EXAMPLES / "data", "--output_dir",
                             tmp_path / "out", "--cache_dir", cache_dir, "--use_lora", "--lora_weight_path", adapter]),
            (merge_lora.main, ["--adapter_path", adapter, "--output_dir", tmp_path / "merged", "--base_model", model]),
            (chat.main, [adapter, "--message", "Hello", "--base_model", model])):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        assert stop.value.code == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        said.append(line)
    assert message in said[0] and len(set(said)) == 1, said
    assert not (tmp_path / "merged").exists()


def to_bin(folder):
    file = folder / "adapter_model.safetensors"
    torch.save(load_file(file), folder / "adapter_model.bin")
    file.unlink()


GOOD = {
    "a pattern": {"target_modules": r".*\.self_attn\.(q|v)_proj"},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "a .bin file": {},
    "rank patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "embeddings saved, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "both embeddings saved, tied": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "rows of tokens": {"trainable_token_indices": {"embed_tokens": [3, 5]}},
    "some layers": {"layers_to_transform": [1]},
    "all linear layers": {"target_modules": "all-linear"}}


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_adapter_is_continued_and_merged(kind, foreign, train, tmp_path, capsys):
    adapter = foreign(GOOD[kind])
    if kind == "a .bin file":
        to_bin(adapter)
    train("--use_lora", "--lora_weight_path", adapter, "--max_steps", 1)
    before, after = (load_file(folder / "adapter_model.safetensors") if kind != "a .bin file" or folder != adapter
                     else torch.load(folder / "adapter_model.bin") for folder in (adapter, tmp_path / "out"))
    for name in before.keys() & after.keys():
        assert (after[name] - before[name]).abs().max() < 0.005  # one step on from where it was
    assert before.keys() <= after.keys() and any(not after[name].equal(before[name]) for name in before)
    merge_lora.merge(["--adapter_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "merged")])
    assert "The same as base and adapter" in capsys.readouterr().out


KINDS = {  # the first flag is the one that is missing when the run is resumed with other settings
    "a pattern": [["--lora_target_modules", r"model\.layers\.1\.(self_attn|mlp)\..*"]],
    "DoRA": [["--use_dora"]],
    "DoRA on 4 bits": [["--use_dora"], ["--q_lora"]],
    "PiSSA, on a base model": [["--init_lora_weights", "pissa_niter_4"], ["--lora_embeddings", "full"]],
    "OLoRA, rsLoRA": [["--init_lora_weights", "olora"], ["--use_rslora"]]}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_resumed_and_merged_and_named(kind, train, tmp_path, capsys):
    """The result is a plain adapter, and with its base model what was trained: merge_lora.py proves that."""
    out, given = tmp_path / "out", [word for flag in KINDS[kind] for word in flag]
    flags = ["--use_lora", "--lora_r", 4, "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2]
    trainer = train(*flags, *given)
    half = load_file(out / "checkpoint-2/adapter_model.safetensors")
    whole = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    twice = "--init_lora_weights" in given
    assert config["r"] == (8 if twice else 4) and config["init_lora_weights"] is True
    if twice:  # the second half subtracts the start, and stays as it is
        for name, tensor in whole.items():
            if "lora_" in name:
                dim = 0 if "lora_A" in name else 1
                assert tensor.chunk(2, dim)[1].equal(half[name].chunk(2, dim)[1])
                assert not tensor.chunk(2, dim)[0].equal(half[name].chunk(2, dim)[0])
    logits = trainer.model.eval()(torch.arange(20)[None]).logits
    card = (out / "README.md").read_text()
    assert all(f"| {word.lstrip('-')} | " in card for word in given if word.startswith("--"))
    shutil.rmtree(out / "checkpoint-4")
    with pytest.raises(UserError, match=f"{given[0].lstrip('-')}: .* in the checkpoint"):
        train(*flags, *given[len(KINDS[kind][0]):])
    train(*flags, *given)
    again = load_file(out / "adapter_model.safetensors")
    assert again.keys() == whole.keys() and all(again[name].equal(tensor) for name, tensor in whole.items())
    if kind == "a pattern":
        assert {name.split(".layers.")[1][0] for name in whole} == {"1"}
    if "--q_lora" not in given:  # which is trained on 4 bits
        alone = AutoPeftModelForCausalLM.from_pretrained(out).eval()
        assert torch.allclose(alone(torch.arange(20)[None]).logits, logits, atol=1e-5)
    capsys.readouterr()
    merge_lora.merge(["--adapter_path", str(out), "--output_dir", str(tmp_path / "merged")])
    assert "The same as base and adapter" in capsys.readouterr().out


def test_biases_are_trained_saved_and_merged(train, make_model, tmp_path, capsys):
    base, out = make_model(model_type="qwen2"), tmp_path / "out"
    train("--model_name_or_path", base, "--use_lora", "--lora_bias", "lora_only", "--max_steps", 2)
    biases = {name: tensor for name, tensor in load_file(out / "adapter_model.safetensors").items() if "bias" in name}
    layers = ("q_proj", "k_proj", "v_proj")
    assert len(biases) == 2 * len(layers) and all(name.split(".")[-3] in layers for name in biases)
    merge_lora.merge(["--adapter_path", str(out), "--output_dir", str(tmp_path / "merged")])
    assert "The same as base and adapter" in capsys.readouterr().out
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "merged/model.safetensors")
    for name, tensor in before.items():
        if name.endswith(".bias"):
            assert not after[name].equal(tensor)
