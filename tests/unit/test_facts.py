"""What a resumed run must share with its checkpoint: every flag, but for those that are named, one test each."""

import copy
import dataclasses
import json
import shutil
import typing

import numpy as np
import pytest
import transformers

from finetune import DataArguments, LoraArguments, ModelArguments, TrainingArguments, parse_arguments
from mechanisms import checkpoints, facts
from mechanisms.errors import UserError
from mechanisms.tokenizer import load_tokenizer

CLASSES = ModelArguments, DataArguments, TrainingArguments, LoraArguments
FIELDS = {field.name: (number, field) for number, cls in enumerate(CLASSES) for field in dataclasses.fields(cls)}


class Data:
    """A dataset as facts see it."""

    lengths, digests, fill = np.full(40, 10), np.arange(40, dtype=np.uint64), None

    def __len__(self):
        return len(self.lengths)


@pytest.fixture(scope="module")
def model(make_model):
    return str(make_model())


@pytest.fixture(scope="module")
def of(model):
    """of(arguments, dataset) -> facts"""
    config, tokenizer = transformers.AutoConfig.from_pretrained(model), load_tokenizer(model)
    return lambda arguments, dataset=None: facts.run_facts(arguments, dataset or Data(), config, tokenizer)


@pytest.fixture(scope="module")
def arguments(model):
    return parse_arguments(["--data_path", "x", "--model_name_or_path", model, "--use_lora"])


def changed(arguments, name):
    """The same arguments with another value of one field."""
    arguments = copy.copy(list(arguments))
    number, field = FIELDS[name]
    arguments[number] = copy.copy(arguments[number])
    value = getattr(arguments[number], name)
    choices = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    if choices:
        value = next(choice for choice in choices if choice != value)
    elif isinstance(value, bool):
        value = not value
    elif isinstance(value, (int, float)):
        value = value + 1
    elif isinstance(value, list):
        value = [*value, "other"]
    else:
        value = "other"
    setattr(arguments[number], name, value)
    return arguments


def test_every_name_that_is_excepted_is_a_flag():
    assert facts.MAY_CHANGE | facts.BY_CONTENT | facts.TOGETHER <= FIELDS.keys()
    assert not facts.MAY_CHANGE & facts.BY_CONTENT and not facts.TOGETHER & (facts.MAY_CHANGE | facts.BY_CONTENT)


@pytest.mark.parametrize("name", sorted(facts.MAY_CHANGE))
def test_a_field_that_may_change(of, arguments, name):
    assert of(changed(arguments, name)) == of(arguments)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - facts.MAY_CHANGE - facts.BY_CONTENT - {"max_steps"}))
def test_any_other_field_counts_and_both_values_are_named(of, arguments, name):
    before, now = of(arguments), of(changed(arguments, name))
    assert before != now
    forbidden, notes = checkpoints.differences(before, now, facts.default_values(arguments))
    fact = {"per_device_train_batch_size": "samples per step", "gradient_accumulation_steps": "samples per step",
            "num_train_epochs": "steps"}.get(name, name)
    [line] = [line for line in forbidden + notes if line.startswith(f"{fact}: ")]
    assert " in the checkpoint, " in line and " now" in line


def test_facts_are_json(of, arguments):
    assert json.loads(json.dumps(of(arguments))) == of(arguments)


def test_content_counts_and_not_its_name(of, arguments, model, make_model, tmp_path):
    moved, other = tmp_path / "moved", make_model(tie_word_embeddings=False)
    shutil.copytree(model, moved)
    before = of(arguments)

    def differences(**fields):
        now = copy.deepcopy(list(arguments))
        for name, value in fields.items():
            setattr(now[FIELDS[name][0]], name, str(value))
        return checkpoints.differences(before, of(now), {})[0]

    assert not differences(model_name_or_path=moved)
    [line] = differences(model_name_or_path=other)
    assert line.startswith("base model: ") and model in line and str(other) in line
    weights = bytearray((moved / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # one bit of the last weight: a model of the same shape
    (moved / "model.safetensors").write_bytes(weights)
    assert differences(model_name_or_path=moved)
    [line] = differences(lora_weight_path=moved)
    assert line.startswith("adapter to continue: ")


def test_a_deepspeed_config_counts_by_its_settings(of, arguments, tmp_path):
    config = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "steps_per_print": 10}

    def of_config(config):
        (tmp_path / "config.json").write_text(json.dumps(config))
        now = copy.deepcopy(list(arguments))
        now[2].deepspeed = str(tmp_path / "config.json")
        return of(now)

    before = of_config(config)
    for name in facts.DEEPSPEED_MAY_CHANGE:
        assert of_config({**config, name: {"load_universal": True}}) == before
    now = of_config({"zero_optimization": {"stage": 3, "overlap_comm": True}})
    [line] = checkpoints.differences(before, now, {})[0]
    assert line == "deepspeed zero_optimization.stage: 2 in the checkpoint, 3 now"


def test_more_steps_are_allowed_and_said_fewer_are_not(of, arguments):
    few, many = of(changed(arguments, "max_steps")), of(arguments)  # -1 + 1: as many as the epochs have
    assert few == many
    few = {**many, "steps": many["steps"] - 1}
    assert checkpoints.differences(many, few, {})[0] and not checkpoints.differences(many, few, {})[1]
    assert not checkpoints.differences(few, many, {})[0]
    [note] = checkpoints.differences(few, many, {})[1]
    assert "steps: " in note and "learning rate" in note


def test_a_flag_that_the_checkpoint_does_not_know_must_have_its_default(of, arguments):
    before, now, defaults = of(arguments), of(arguments), facts.default_values(arguments)
    del before["weight_decay"]
    assert not checkpoints.differences(before, now, defaults)[0]
    assert checkpoints.differences(before, {**now, "weight_decay": 0.5}, defaults)[0] == [
        "weight_decay: 0.0 in the checkpoint, 0.5 now"]


def test_the_card_shows_own_flags_and_those_that_are_not_as_they_come(model):
    words = ["--data_path", "x", "--model_name_or_path", model, "--adam_beta2", "0.95", "--save_steps", "7"]
    shown = facts.settings(parse_arguments(words))
    assert shown["adam_beta2"] == 0.95 and "adam_beta1" not in shown and "save_steps" not in shown
    assert shown["loss_on"] == "assistant" and "lora_r" not in shown
    assert facts.settings(parse_arguments([*words, "--use_lora"]))["lora_r"] == 64


def test_a_changed_field_of_the_past_is_named(tmp_path, of, arguments):
    (tmp_path / "file").write_text("x")
    checkpoints.write_manifest(tmp_path, of(arguments))
    assert checkpoints.check_same_run(tmp_path, of(arguments), {}) == []
    with pytest.raises(UserError) as error:
        checkpoints.check_same_run(tmp_path, of(changed(changed(arguments, "learning_rate"), "lora_alpha")), {})
    assert "learning_rate: 5e-05 in the checkpoint, 1.00005 now" in str(error.value)
    assert "lora_alpha: 16 in the checkpoint, 17 now" in str(error.value)
