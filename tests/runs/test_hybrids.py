"""Hybrids and mixtures of experts as they are published: trained, resumed, saved, merged, and asked."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

import chat
import finetune
import merge_lora
import run_gptq
from examples.make_tiny_model import EXAMPLES
from mechanisms import checkpoints, memory, report, wrapper
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line
from mechanisms.loading import fit_arguments, load_config, load_to_answer, load_weights
from mechanisms.lora import empty_network, expert_parameters, experts_of
from mechanisms.memory import Setup

SIZES = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
         "max_position_embeddings": 1024, "tie_word_embeddings": False, "initializer_range": 0.1}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 32}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
          "num_position_embeddings": 16, "deepstack_visual_indexes": []}


OTHER = re.compile(r"model\.visual\.|mtp\.")
PROCESSORS = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def in_wrapper(outer, **text):
    return outer(text_config=text, vision_config=VISION, tie_word_embeddings=False)


CONFIGS = {
    "qwen2_moe": lambda **ends: transformers.Qwen2MoeConfig(**SIZES, **SHARED, **ends),
    "qwen3_moe": lambda **ends: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, **ends),
    "qwen3_next": lambda **ends: transformers.Qwen3NextConfig(**SIZES, **LINEAR, **SHARED, **ends),
    "qwen3_5": lambda **ends: in_wrapper(transformers.Qwen3_5Config, **SIZES, **LINEAR, intermediate_size=96, **ends),
    "qwen3_5_moe": lambda **ends: in_wrapper(transformers.Qwen3_5MoeConfig, **SIZES, **LINEAR, **SHARED, **ends),
    "qwen3_5_text": lambda **ends: transformers.Qwen3_5TextConfig(**SIZES, **LINEAR, intermediate_size=96, **ends)}


FAMILIES = {"qwen2_moe": "Qwen1.5-MoE", "qwen3_moe": "Qwen3-30B-A3B, Qwen3-Coder", "qwen3_next": "Qwen3-Next",
            "qwen3_5": "Qwen3.5, 3.6, 3.8, dense", "qwen3_5_moe": "Qwen3.5-35B-A3B and larger"}
METHODS = {"full": ["--gradient_accumulation_steps", 2, "--packing"], "LoRA": ["--use_lora"],
           "LoRA on experts": ["--use_lora", "--lora_experts", "--lora_dropout", 0, "--lora_r", 8],
           "Q-LoRA": ["--q_lora"]}


def refused(family, method):
    """What the table of docs/models.md says instead of "yes", or None."""
    config = CONFIGS[family]().get_text_config()
    hybrid, experts = hasattr(config, "linear_num_key_heads"), hasattr(config, "num_experts")
    return {"LoRA on experts": None if experts else "has none",
            "Q-LoRA": "refused: experts would stay in 16 bits" if experts else None,
            "GPTQ": "refused: linear attention" if hybrid else "refused: experts"}.get(method)


CELLS = [(family, method) for family in FAMILIES for method in METHODS if not refused(family, method)]


def some_of(cells, short):
    """Cells as parameters of a test; those that are not in `short` are run by python -m tests.sweep families."""
    assert set(short) <= set(cells)
    return [pytest.param(*cell, marks=() if cell in short else pytest.mark.long) for cell in cells]


@pytest.fixture(scope="module")
def make_published(make_model, tmp_path_factory):
    """make_published(kind) -> folder as it is published: the wrapped ones with a vision tower and an MTP layer."""
    made = {}

    def make(kind):
        if kind not in made:
            folder, plain = tmp_path_factory.mktemp("published") / kind, make_model()
            tokenizer = transformers.AutoTokenizer.from_pretrained(plain)
            config = CONFIGS[kind](vocab_size=load_config(str(plain)).vocab_size, pad_token_id=tokenizer.pad_token_id,
                                   eos_token_id=tokenizer.eos_token_id)
            torch.manual_seed(0)
            wrapped = config.get_text_config() is not config
            auto = transformers.AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
            model = auto.from_config(config, dtype=torch.bfloat16 if wrapped else torch.float32)
            model.generation_config = transformers.GenerationConfig.from_pretrained(plain)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if wrapped:
                publish(folder)
            made[kind] = folder
        return made[kind]

    return make


def publish(folder):
    """What transformers saved of a wrapped model, as it is published: two files, routed experts in one tensor for a
    layer, A_log in fp32, an MTP layer, the settings of the processors."""
    tensors = {**load_file(folder / "model.safetensors"), "mtp.fc.weight": torch.randn(64, 128).bfloat16()}
    experts = [tensors.pop(name) for name in list(tensors) if ".experts." in name]  # of each: down, gate, up
    for layer in range(SIZES["num_hidden_layers"] if experts else 0):
        own = experts[layer * 12:layer * 12 + 12]
        name = f"model.language_model.layers.{layer}.mlp.experts"
        tensors[f"{name}.down_proj"] = torch.stack(own[::3])
        tensors[f"{name}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(own[1::3], own[2::3])])
    for name, tensor in tensors.items():
        if name.endswith("A_log"):
            tensors[name] = tensor.float() * 1.001
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[:len(names) // 2], names[len(names) // 2:]), 1):
        file = f"model.safetensors-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in PROCESSORS:
        (folder / name).write_text(f'{{"image_processor_type": "{name}"}}')


def stored(folder):
    """{name: tensor} of all files of weights in a folder, which hold each once, and as the index says."""
    tensors, places = {}, {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys()
        tensors |= part
        places |= dict.fromkeys(part, file.name)
    index = folder / "model.safetensors.index.json"
    assert len(set(places.values())) == 1 or json.loads(index.read_text())["weight_map"] == places
    return tensors


def same_bytes(one, other):
    one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


@pytest.fixture
def run(make_published, cache_dir, tmp_path):
    """run(kind, *flags) -> Trainer."""

    def train(kind, *flags):
        return finetune.train(prepare_command_line(finetune.__file__, [str(word) for word in (
            "--model_name_or_path", make_published(kind), "--data_path", EXAMPLES / "data", "--cache_dir", cache_dir,
            "--output_dir", tmp_path / "out", "--per_device_train_batch_size", 2, "--logging_steps", 1,
            "--save_strategy", "no", "--model_max_length", 128, "--learning_rate", "1e-3", "--max_steps", 4, *flags)]))

    return train


@pytest.mark.parametrize("family, method", some_of([*CELLS, ("qwen3_5_text", "full")], [
    ("qwen2_moe", "LoRA on experts"), ("qwen3_moe", "full"), ("qwen3_next", "LoRA on experts"), ("qwen3_5", "full"),
    ("qwen3_5", "Q-LoRA"), ("qwen3_5_moe", "LoRA")]))
def test_the_road_of_a_model(run, family, method, make_published, tmp_path, capsys):
    """Train, resume to the same bits, load with the stock classes, merge, answer, and train on."""
    out, again = tmp_path / "out", tmp_path / "again"
    run(family, "--save_strategy", "steps", "--save_steps", 2, *METHODS[method])
    run(family, "--output_dir", again, "--resume_from_checkpoint", out / "checkpoint-2", *METHODS[method])
    results = [stored(folder) for folder in (out, again)]
    base = stored(make_published(family))
    assert results[0].keys() == results[1].keys()
    assert [key for key, tensor in results[0].items() if not torch.equal(tensor, results[1][key])] == []
    if method == "full":
        assert results[0].keys() == base.keys()
        assert any(not torch.equal(base[key], results[0][key]) for key in base if not OTHER.match(key))
    stock = (AutoModelForCausalLM if method == "full" else AutoPeftModelForCausalLM).from_pretrained(out).eval()
    model, tokenizer = load_to_answer(str(out))
    ids = torch.tensor([tokenizer("Who are you?")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, model(ids).logits)
    if method != "full":
        assert ("mlp.experts" in "".join(results[0])) == (method == "LoRA on experts")
        assert all(tensor.any() for tensor in results[0].values())
        merge_lora.merge(["--adapter_path", str(out), "--output_dir", str(tmp_path / "merged")])
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        more = tmp_path / "more"
        run(family, "--q_lora" if method == "Q-LoRA" else "--use_lora", "--lora_weight_path", out, "--output_dir", more,
            "--max_steps", 1)
        for key, tensor in load_file(more / "adapter_model.safetensors").items():
            assert 0 < (tensor - results[0][key]).abs().max() < 0.005, key  # one step on from where it was
    capsys.readouterr()
    chat.main([str(out), "--message", "Who are you?", "--do_sample", "False", "--max_new_tokens", "4"])
    assert capsys.readouterr().out.strip()


def test_an_adapter_on_experts_by_their_former_names_is_continued_and_merged(run, make_published, tmp_path):
    """peft turns them into the fused weights of today, gate and up with twice the rank."""
    network = AutoModelForCausalLM.from_pretrained(make_published("qwen3_moe"))
    network = get_peft_model(network, LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"],
        init_lora_weights=False))
    network.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)
    run("qwen3_moe", "--use_lora", "--lora_weight_path", tmp_path / "foreign", "--max_steps", 1)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("foreign", "out"))
    assert before.keys() == after.keys() and {len(tensor) for key, tensor in after.items() if "experts.base" in key
                                              and "lora_A" in key} == {4 * 2 * 4}
    assert all(0 < (after[key] - before[key]).abs().max() < 0.005 for key in before)
    merge_lora.merge(["--adapter_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "merged")])


def test_merges_of_mixtures_are_proved_though_rounding_changes_experts(make_published, tmp_path, monkeypatch):
    """In bf16 a few tokens go to other experts after the merge; an adapter that is lost changes most."""
    base = AutoModelForCausalLM.from_pretrained(make_published("qwen3_5_moe"))
    transformers.set_seed(0)
    network = get_peft_model(base, LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["in_proj_qkv", "out_proj", "o_proj"], init_lora_weights=False))
    network.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    transformers.AutoTokenizer.from_pretrained(make_published("qwen3_5_moe")).save_pretrained(tmp_path / "adapter")
    merge_lora.merge(["--adapter_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "merged")])
    monkeypatch.setattr(merge_lora, "merge_weights", lambda model: model.unload())
    with pytest.raises(UserError, match="of their spread away from those of base and adapter"):
        merge_lora.merge(["--adapter_path", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "lost")])


def family_table():
    """The table of docs/models.md."""
    rows = ["| | " + " | ".join([*METHODS, "GPTQ"]) + " |", "|---|" + "---|" * (len(METHODS) + 1)]
    for family, names in FAMILIES.items():
        cells = [refused(family, method) or "yes" for method in [*METHODS, "GPTQ"]]
        rows.append(f"| {names} (`{family}`) | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_the_page_shows_what_these_tests_run():
    assert family_table() in (Path(finetune.__file__).parent / "docs/models.md").read_text(encoding="utf-8")


def test_q_lora_of_a_hybrid_quantizes_its_linear_layers_and_stays_exact_after_an_evaluation(run, tmp_path):
    logs = []
    for name, flags in (("plain", []), ("evaluated", ["--eval_on_start", "True", "--eval_strategy", "steps"])):
        trainer = run("qwen3_5", "--q_lora", "--lora_dropout", 0, "--eval_ratio", 0.2, "--max_steps", 2,
                      "--output_dir", tmp_path / name, *flags)
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1] and len(logs[0]) == 2
    layer = trainer.model.get_base_model().model.layers[0]
    packed = {name.split(".")[1] for name, weight in layer.named_parameters() if hasattr(weight, "quant_state")}
    assert packed == {"in_proj_qkv", "in_proj_z", "out_proj", "in_proj_a", "in_proj_b", "gate_proj", "up_proj",
                      "down_proj"}
    assert layer.linear_attn.conv1d.weight.dtype == layer.linear_attn.A_log.dtype == torch.float32


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_a_wrapped_model_stays_whole(run, kind, make_published, tmp_path):
    """Full result and merged folder: trained text part, all else to the byte, and what loads the base loads them."""
    published, full, adapter = make_published(kind), tmp_path / "full", tmp_path / "adapter"
    trainer = run(kind, "--output_dir", full)
    run(kind, "--output_dir", adapter, "--use_lora")
    merge_lora.merge(["--adapter_path", str(adapter), "--output_dir", str(tmp_path / "merged")])
    ids, base = torch.tensor([[5, 6, 7, 8]]), stored(published)
    for folder in full, tmp_path / "merged":
        found = stored(folder)
        assert {name: tensor.shape for name, tensor in found.items()} == \
            {name: tensor.shape for name, tensor in base.items()}
        assert [name for name in base if OTHER.match(name) and not same_bytes(base[name], found[name])] == []
        assert all((folder / name).read_bytes() == (published / name).read_bytes() for name in PROCESSORS)
        before, after = (json.loads((place / "config.json").read_text()) for place in (published, folder))
        for config in (before, after):
            config["dtype"] = config["text_config"]["dtype"] = "that of the trained weights"
        assert after == before
        whole, info = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            text = AutoModelForCausalLM.from_pretrained(folder)
            assert torch.equal(whole(ids).logits, text(ids).logits)
        if folder == full:
            trained, loaded = trainer.model.state_dict(), text.state_dict()
            assert [name for name in trained if not torch.equal(trained[name], loaded[name])] == []
    states = [name for name in base if name.endswith("A_log")]
    assert len(states) == 3 and all(same_bytes(base[name], found[name]) for name in states)  # of the merged folder
    again = run(kind, "--model_name_or_path", full, "--output_dir", tmp_path / "again", "--max_steps", 1)
    assert stored(tmp_path / "again").keys() == base.keys() and again.state.global_step == 1


def test_the_text_alone_and_the_whole_in_turn(run, make_published, tmp_path, monkeypatch):
    """One takes the place of the other; a kill on the way leaves the earlier result, or nothing that passes for one."""
    out, names = tmp_path / "out", stored(make_published("qwen3_5")).keys()
    text = {name for name in names if not OTHER.match(name)}
    run("qwen3_5", "--text_only", "--max_steps", 1)

    def result():
        return {path.name: path.read_bytes() for path in out.iterdir()
                if path.is_file() and path.name not in (report.PAGE, report.METRICS)}  # of the newest run

    before = result()
    assert stored(out).keys() == text and "Qwen3_5ForCausalLM" in before["config.json"].decode()
    assert "pipeline_tag: text-generation" in before["README.md"].decode() and PROCESSORS[0] not in before

    def killed(*arguments):
        raise KeyboardInterrupt

    for module, function in ((wrapper, "save_file"), (wrapper, "write_json"), (checkpoints, "settle")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, function, killed)
            run("qwen3_5", "--max_steps", 1)
        assert result() == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda source, target: killed() if target == str(out / "config.json")
                      else os.rename(source, target))
        run("qwen3_5", "--max_steps", 1)
    assert not (out / "config.json").exists()
    run("qwen3_5", "--max_steps", 1)
    assert stored(out).keys() == names and not (out / "model.safetensors").exists()
    assert "pipeline_tag: image-text-to-text" in (out / "README.md").read_text()


def test_an_adapter_says_where_it_has_no_effect(run, make_published, tmp_path, capsys):
    """On a wrapper that alone says that the output layer is the embedding: its adapter is merged, and says how."""
    tied, tensors = tmp_path / "tied", stored(make_published("qwen3_5"))
    shutil.copytree(make_published("qwen3_5"), tied, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
              tied / "model.safetensors", {"format": "pt"})
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    run("qwen3_5", "--model_name_or_path", tied, "--use_lora", "--max_steps", 1)
    command = f"python merge_lora.py --adapter_path {tmp_path / 'out'} --output_dir {tmp_path / 'out'}-merged"
    said, card = capsys.readouterr().out, (tmp_path / "out/README.md").read_text()
    assert command in said and command in card and "vllm serve" not in said
    assert "ignores adapters of its text part without a word" in said and "ignores adapters" in card
    flags = ["--adapter_path", str(tmp_path / "out"), "--output_dir"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="not those of .*: mtp.fc.weight"):
        patch.setattr(wrapper.Wrapper, "differences", lambda *arguments: ["mtp.fc.weight"])
        merge_lora.merge([*flags, str(tmp_path / "wrong")])
    assert not (tmp_path / "wrong").exists()
    merge_lora.merge([*flags, str(tmp_path / "whole")])
    merge_lora.merge([*flags, str(tmp_path / "text"), "--text_only"])
    assert "vision tower and others" in capsys.readouterr().out
    whole, text = stored(tmp_path / "whole"), stored(tmp_path / "text")
    assert whole.keys() == tensors.keys() - {"lm_head.weight"}
    assert text.keys() == {name for name in whole if not OTHER.match(name)}
    for folder in "whole", "text":
        model, _ = load_to_answer(str(tmp_path / folder))
        assert model.lm_head.weight is model.model.embed_tokens.weight
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and model.lm_head.weight is model.get_input_embeddings().weight


def test_conversions_that_loading_had_no_use_for_are_not_undone(make_published, tmp_path, monkeypatch):
    """Under ZeRO-3 transformers keeps them too: here as there."""
    plain = AutoModelForCausalLM.from_pretrained

    def keeping_all(*arguments, **options):
        model, info = plain(*arguments, **options)
        model._weight_conversions += [conversion for conversion in get_model_conversion_mapping(model)
                                      if isinstance(conversion, WeightConverter)]
        return model, info

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", keeping_all)
    load_weights(str(make_published("qwen3_5_moe"))).save_pretrained(tmp_path)
    assert stored(tmp_path).keys() == {name for name in stored(make_published("qwen3_5_moe")) if not OTHER.match(name)}


@pytest.fixture
def completed(make_published, tmp_path):
    """(Wrapper, folder): the text part of a published model, one of its A_log changed, in the wrapper again."""
    folder, whole = tmp_path / "completed", wrapper.Wrapper(str(make_published("qwen3_5")))
    model = AutoModelForCausalLM.from_pretrained(whole.folder)
    with torch.no_grad():
        model.model.layers[1].linear_attn.A_log += 1
    model.save_pretrained(folder)
    whole.complete(str(folder))
    return whole, folder


def test_tensors_keep_a_wider_type_than_the_models(completed, make_published):
    found, base = stored(completed[1]), stored(make_published("qwen3_5"))
    name = "model.language_model.layers.1.linear_attn.A_log"
    assert [key for key in base if not same_bytes(base[key], found[key])] == [name]
    assert torch.equal(found[name], (base[name].bfloat16() + 1).float())


@pytest.mark.parametrize("change", [
    lambda tensors: tensors["mtp.fc.weight"].view(torch.int16).flatten()[5].bitwise_xor_(1),
    lambda tensors: tensors.pop("mtp.fc.weight"),
    lambda tensors: tensors.update({"mtp.fc.weight": tensors["mtp.fc.weight"].float()})], ids=["bit", "lost", "type"])
def test_other_tensors_than_the_bases_are_found(completed, change):
    whole, folder = completed
    assert whole.differences(str(folder)) == []
    [file] = [file for file in folder.glob("*.safetensors") if "mtp.fc.weight" in load_file(file)]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    assert whole.differences(str(folder)) == ["mtp.fc.weight"]


def test_a_wrapper_is_refused_before_training(run, make_published, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(make_published("qwen3_5"), broken)
    file = sorted(broken.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="the weights in .*broken cannot be loaded: model.safetensors-00002-of-00002"):
        run("qwen3_5", "--model_name_or_path", broken)
    with pytest.raises(UserError, match="--text_only: .* is a text model"):
        run("qwen3_moe", "--text_only")
    with pytest.raises(UserError, match="--text_only has no effect on an adapter"):
        run("qwen3_5", "--text_only", "--use_lora")


def test_a_wrapper_on_the_hub(make_published, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached, published = tmp_path / "models--Qwen--Qwen3.5-tiny", make_published("qwen3_5")
    shutil.copytree(published, cached / "snapshots" / "0123456789abcdef")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123456789abcdef")
    assert wrapper.is_wrapped("Qwen/Qwen3.5-tiny", str(tmp_path))
    whole = wrapper.Wrapper("Qwen/Qwen3.5-tiny", str(tmp_path))
    assert whole.folder == str(cached / "snapshots" / "0123456789abcdef")
    assert whole.size == sum(tensor.nbytes for name, tensor in stored(published).items() if OTHER.match(name))


def test_a_text_part_with_other_names_is_not_put_into_the_wrapper(make_published, tmp_path):
    """A file for each expert, and the base has one for all of a layer: neither would read the other's."""
    model = AutoModelForCausalLM.from_config(load_config(str(make_published("qwen3_5_moe"))))
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="are not those of the text part"):
        wrapper.Wrapper(str(make_published("qwen3_5_moe"))).complete(str(tmp_path))


@pytest.mark.parametrize("kind, reached, missed", [
    ("qwen3_moe", ["self_attn.q_proj x 4", "self_attn.o_proj x 4"], ["mlp.experts.gate_up_proj x 4"]),
    ("qwen2_moe", ["self_attn.q_proj x 4", "mlp.shared_expert.up_proj x 4"], ["mlp.experts.down_proj x 4"]),
    ("qwen3_5", ["linear_attn.in_proj_qkv x 3", "linear_attn.out_proj x 3", "mlp.up_proj x 4", "self_attn.q_proj x 1"],
     ["linear_attn.in_proj_a x 3"]),
    ("qwen3_5_moe", ["linear_attn.in_proj_z x 3", "mlp.shared_expert.down_proj x 4"], ["mlp.experts.down_proj x 4"]),
    ("qwen3_next", ["linear_attn.in_proj_qkvz x 3", "self_attn.k_proj x 1"], ["mlp.shared_expert.gate_proj x 4"])])
def test_adapters_are_where_the_table_says(run, kind, reached, missed, capsys):
    trainer = run(kind, "--use_lora", "--max_steps", 1)
    above, below = capsys.readouterr().out.split("Adapters:\n")[1].split("\n\n")[0].split("not reached")
    adapted = [name.removesuffix(".lora_A.default") for name, _ in trainer.model.named_modules()
               if name.endswith(".lora_A.default")]
    for line in reached:
        layer, count = line.split(" x ")
        assert line in above and sum(name.endswith(layer) for name in adapted) == int(count)
    for line in missed:
        assert line in below and not any(name.endswith(line.split(" x ")[0]) for name in adapted)


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe"])
def test_adapters_on_experts_are_counted_before_training(kind, make_published, capsys):
    """By hand: rank times (inputs + outputs) for each matrix of each of 4 experts, gate and up being one, in 4 layers;
    and, where peft takes shared experts for routed ones, for the three matrices of the shared one."""
    lora = finetune.LoraArguments(lora_experts=True, lora_r=8)
    fit_arguments(load_config(str(make_published(kind))), finetune.TrainingArguments(use_lora=True), lora)
    table = capsys.readouterr().out
    shared = 3 * (64 + 32) if kind == "qwen3_next" else 0
    assert f"trained on experts  {4 * 8 * (4 * (64 + 64 + 32 + 64) + shared):,}" in table
    above, below = table.split("not reached")
    assert "mlp.experts.gate_up_proj x 4" in above and "expert.gate_proj" not in below and "mlp.experts" not in below


def test_a_router_loss_is_switched_off(run, make_published, tmp_path, capsys):
    folder = make_published("qwen3_moe")
    plain = run("qwen3_moe", "--max_steps", 1).state.log_history[0]["loss"]
    other = tmp_path / "router"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "output_router_logits": True}))
    trainer = run("qwen3_moe", "--model_name_or_path", other, "--output_dir", tmp_path / "second", "--max_steps", 1)
    assert "loss of its routers: it is switched off" in capsys.readouterr().out
    assert trainer.state.log_history[0]["loss"] == plain


@pytest.mark.parametrize("kind, flags, message", [
    ("qwen3_moe", ["--q_lora"], "--q_lora: this model is a mixture of experts, and 98,304 of its .* weights"),
    ("qwen3_next", ["--use_lora", "--lora_target_modules", "shared_expert.gate_proj"], "adapts the routed experts"),
    ("qwen3_5", ["--use_lora", "--lora_experts", "--lora_dropout", 0], "this model has no routed experts"),
    ("qwen3_moe", ["--use_lora", "--lora_experts"], "adapters on experts cannot have dropout: add --lora_dropout 0"),
    ("qwen3_moe", ["--use_lora", "--lora_experts", "--lora_dropout", 0, "--use_dora"],
     "--use_dora: not with --lora_experts"),
    ("qwen3_moe", ["--use_lora", "--lora_experts", "--lora_dropout", 0, "--init_lora_weights", "pissa",
                   "--weight_decay", 0], "--lora_experts: not with --init_lora_weights pissa")])
def test_what_would_be_missed_in_silence_is_refused(run, kind, flags, message):
    with pytest.raises(UserError, match=message):
        run(kind, *flags)


@pytest.mark.parametrize("config, message", [
    (transformers.Qwen2_5_VLConfig, "qwen2_5_vl model"), (transformers.Qwen3VLConfig, "qwen3_vl model"),
    (transformers.Qwen2AudioConfig, "qwen2_audio model"), (transformers.Qwen2_5OmniConfig, "qwen2_5_omni model"),
    (transformers.Qwen4ExpConfig, "read across the samples of a row")])
def test_families_that_cannot_be_trained_are_refused_by_name(config, message, tmp_path):
    config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_of_all_of_them_is_refused(family, make_published, tmp_path):
    reason = {"refused: linear attention": "layers of linear attention", "refused: experts": "a mixture of experts"}
    with pytest.raises(UserError, match=reason[refused(family, "GPTQ")]):
        run_gptq.run(["--model_name_or_path", str(make_published(family)), "--data_path", str(EXAMPLES / "data"),
                      "--out_path", str(tmp_path / "int4")])


@pytest.mark.parametrize("kind", CONFIGS)
def test_memory_is_counted_over_all_kinds_of_layers(make_published, kind):
    """Eight layers of a hybrid are two periods of four: what they keep is counted, not continued from the first two."""
    config = load_config(str(make_published(kind)))
    setup = Setup(config, device=torch.device("cpu"), compute=torch.float32)
    hybrid = hasattr(config, "linear_num_key_heads")
    assert memory._period(setup) == (4 if hybrid else 1)
    stored, recomputed = memory.activation_bytes(setup, 256)
    assert stored == pytest.approx(memory._run(setup, 4, 256)[0], rel=1e-6) and recomputed < stored


def test_memory_counts_adapters_on_experts(make_published):
    """Each layer adds them to all its experts for a row, and autograd keeps the sum."""
    config = load_config(str(make_published("qwen3_moe")))
    network, kept = empty_network(config), []
    for parameters in ([], expert_parameters(network)):
        adapter = LoraConfig(target_modules=["q_proj"], target_parameters=parameters, r=4)
        setup = Setup(config, adapter, device=torch.device("cpu"), compute=torch.float32)
        kept.append(memory.activation_bytes(setup, 256)[0])
    assert kept[1] - kept[0] >= sum(weight.nbytes for weight in experts_of(network).values())
