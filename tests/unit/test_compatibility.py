"""Saved folders mean the same under the names of transformers 4.x as under today's, and no more is changed."""

import json
import logging

import pytest
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config

from mechanisms.compatibility import add_former_names

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def as_read(config):
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


@pytest.mark.parametrize("config, former", [
    (Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, dtype="bfloat16"),
     {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16"}),
    (Qwen3Config(rope_parameters={**YARN, "rope_theta": 1e6}, max_position_embeddings=2048),
     {"rope_theta": 1e6, "rope_scaling": YARN}),
    (Qwen3NextConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.5}),
     {"rope_theta": 1e7, "partial_rotary_factor": 0.5, "rope_scaling": None}),
    (Qwen3MoeConfig(num_experts=4), {"num_experts": 4})])
def test_a_config_has_both_names_and_is_read_as_before(config, former, tmp_path, caplog, monkeypatch):
    config.use_cache = False  # as it is in training
    config.save_pretrained(tmp_path)
    before, wanted = read_json(tmp_path / "config.json"), as_read(AutoConfig.from_pretrained(tmp_path))
    add_former_names(tmp_path)
    after = read_json(tmp_path / "config.json")
    assert {name: after.get(name) for name in former} == former and after["use_cache"] is True
    assert {name: after[name] for name in before if name != "use_cache"} == \
        {name: value for name, value in before.items() if name != "use_cache"}
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    assert as_read(AutoConfig.from_pretrained(tmp_path)) == {**wanted, "use_cache": True}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    add_former_names(tmp_path)
    assert read_json(tmp_path / "config.json") == after


def test_a_config_inside_a_config_has_both_names(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}
    config = Qwen3_5Config(text_config={"rope_parameters": rope, "dtype": "bfloat16", "use_cache": False})
    config.save_pretrained(tmp_path)
    wanted = as_read(AutoConfig.from_pretrained(tmp_path))
    wanted["text_config"]["use_cache"] = True
    add_former_names(tmp_path)
    text = read_json(tmp_path / "config.json")["text_config"]
    assert (text["rope_theta"], text["partial_rotary_factor"], text["torch_dtype"]) == (1e7, 0.25, "bfloat16")
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": [11, 11, 10]}
    assert as_read(AutoConfig.from_pretrained(tmp_path)) == wanted


def same_tokenizer(one, other):
    return all(getattr(one, name) == getattr(other, name) for name in (
        "extra_special_tokens", "special_tokens_map", "chat_template", "all_special_ids", "model_max_length")) and \
        one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()


def test_a_tokenizer_has_names_that_both_read(make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(make_model())
    tokenizer.chat_template = {"default": "一{{ messages }}", "tools": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path)
    before = read_json(tmp_path / "tokenizer_config.json")
    add_former_names(tmp_path)
    after = read_json(tmp_path / "tokenizer_config.json")
    assert before.pop("extra_special_tokens") == after.pop("additional_special_tokens") == [
        "<|im_start|>", "<|im_end|>"]
    assert after.pop("chat_template") == "一{{ messages }}" and after == before
    assert same_tokenizer(AutoTokenizer.from_pretrained(tmp_path), tokenizer)


def test_a_class_that_only_transformers_5_has_gets_its_former_name(make_model, tmp_path):
    AutoTokenizer.from_pretrained(make_model()).save_pretrained(tmp_path)
    settings = {**read_json(tmp_path / "tokenizer_config.json"), "tokenizer_class": "TokenizersBackend"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    add_former_names(tmp_path)
    assert read_json(tmp_path / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert same_tokenizer(AutoTokenizer.from_pretrained(tmp_path), tokenizer)


def test_real_tokenizers_and_configs(real, real_data, tmp_path):
    name, tokenizer, _ = real
    config = AutoConfig.from_pretrained(real_data / "tokenizers" / name)
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wanted = as_read(AutoConfig.from_pretrained(tmp_path))
    published = read_json(real_data / "tokenizers" / name / "config.json")
    add_former_names(tmp_path)
    saved = read_json(tmp_path / "config.json")
    former = "rope_theta", "rope_scaling", "torch_dtype", "use_cache"
    assert [saved.get(key) for key in former] == [published.get(key) for key in former]
    assert same_tokenizer(AutoTokenizer.from_pretrained(tmp_path), tokenizer)
    assert as_read(AutoConfig.from_pretrained(tmp_path)) == wanted
