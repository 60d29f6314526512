"""Numbers that are not finite: no step, nothing saved with them, exit code 3, and the records are named."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import checkpoints, trainer
from mechanisms.finite import NotFinite, all_finite
from mechanisms.flags import prepare_command_line

RARE = "葡"  # a character that the data below has only where it is planted


@pytest.fixture
def train(make_model, cache_dir, tmp_path):
    def run(*flags, model=None, data=EXAMPLES / "data"):
        return finetune.train(prepare_command_line(finetune.__file__, [
            "--model_name_or_path", str(model or make_model()), "--data_path", str(data), "--cache_dir",
            str(cache_dir), "--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--save_steps", "1",
            "--logging_steps", "1", "--per_device_train_batch_size", "4", *map(str, flags)]))

    return run


@pytest.fixture
def records(tmp_path):
    """records(n, rare=line) -> a file of n records; that on `rare` has a character of its own."""

    def write(n, rare=None, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps({"instruction": f"question {line}", "output": f"answer {line}"
                                              + RARE * (line == rare)}) for line in range(1, n + 1)))
        return path

    return write


@pytest.fixture
def poisoned(make_model, tmp_path):
    """A model that gives nan for every text with the rare character."""
    folder = tmp_path / "poisoned"
    shutil.copytree(make_model(tie_word_embeddings=False), folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    common = set(tokenizer("question answer 0123456789 <|im_start|>system\nYou are a helpful assistant.")["input_ids"])
    [*_, token] = [token for token in tokenizer(RARE)["input_ids"] if token not in common]
    model.get_input_embeddings().weight.data[token] = math.nan
    model.save_pretrained(folder)
    return folder


def whole(out):
    return sorted(path.name for path in out.glob("checkpoint-*") if isinstance(checkpoints.read_manifest(path), dict))


def test_a_learning_rate_that_destroys_the_model_ends_with_3_and_leaves_whole_checkpoints(make_model, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, finetune.__file__, "--model_name_or_path", str(make_model()), "--data_path",
               str(EXAMPLES / "data"), "--output_dir", str(out), "--learning_rate", "1e6", "--max_steps", "3",
               "--save_steps", "1", "--save_total_limit", "1", "--logging_steps", "1", "--cache_dir", str(tmp_path)]
    for _ in range(2):  # the second goes on from where the first stopped, and stops there too
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 3 and "Traceback" not in run.stderr, run.stderr
        assert re.search(r"became NaN or infinite \((nan|inf)\) at step [23], learning rate \S+", run.stderr)
        assert re.search(r"Records of that step: \S+\.jsonl?:\d+, ", run.stderr)
        assert not list(out.glob("*.safetensors"))
        [last] = whole(out)
        assert all_finite(AutoModelForCausalLM.from_pretrained(out / last).parameters())


@pytest.mark.parametrize("flags, named", [
    (["--per_device_train_batch_size", 4], 4), (["--lazy_preprocess", "True"], 4),
    (["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 4], 1),
    (["--packing", "True", "--model_max_length", 128, "--per_device_train_batch_size", 1], 3)])
def test_the_records_of_a_lost_loss_are_named(train, records, poisoned, tmp_path, flags, named):
    data = records(24, rare=7)
    with pytest.raises(NotFinite) as stopped:
        train("--max_steps", 20, "--save_strategy", "no", *flags, model=poisoned, data=data)
    message = str(stopped.value)
    assert "the loss became NaN or infinite (nan) at step" in message and f"{data}:7" in message
    [line] = [line for line in message.split("\n") if "Records" in line]
    assert line.count("data.jsonl:") == named


def test_a_gradient_that_is_lost_behind_a_good_loss_stops_the_run(train, tmp_path, monkeypatch):
    def no_step(*_):
        raise AssertionError("a step was made")

    def lose(model, inputs, *args):
        loss = plain(model, inputs, *args)
        if model_trainer[0].state.global_step == 2:
            next(model.parameters()).grad.fill_(math.inf)
            model_trainer[0].optimizer.step = no_step
        return loss

    model_trainer, create = [], trainer.SafeTrainer.create_optimizer

    def remember(self, *args):
        nonlocal plain
        model_trainer.append(self)
        plain, self.training_step = self.training_step, lose
        return create(self, *args)

    plain = None
    monkeypatch.setattr(trainer.SafeTrainer, "create_optimizer", remember)
    with pytest.raises(NotFinite, match=r"gradient norm became NaN or infinite \((inf|nan)\) at step 3"):
        train()
    assert whole(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


def test_what_the_scaler_of_fp16_skips_is_counted(train, monkeypatch, capsys):
    """A gradient that is too large for the scale; the loss is good."""
    step = trainer.SafeTrainer.training_step

    def overflow(self, model, inputs, *args):
        loss = step(self, model, inputs, *args)
        if self.state.global_step == 1:
            next(model.parameters()).grad.fill_(math.inf)
            self.optimizer.step = lambda: None  # as the scaler does it
        elif self.state.global_step == 2:
            del self.optimizer.step
        return loss

    monkeypatch.setattr(trainer.SafeTrainer, "training_step", overflow)
    monkeypatch.setattr(trainer.SafeTrainer, "_scales_the_loss", lambda self: True)
    assert train().skipped_steps == 1
    assert re.search(r"skipped by fp16's loss scaler +1\n", capsys.readouterr().out)


def test_weights_that_the_last_step_lost_are_not_saved(train, tmp_path, monkeypatch):
    class Lose(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 4:
                next(model.parameters()).data.flatten()[0] = math.nan

    make = trainer.SafeTrainer.__init__

    def with_fault(self, *args, **kwargs):
        make(self, *args, **kwargs)
        self.add_callback(Lose)

    monkeypatch.setattr(trainer.SafeTrainer, "__init__", with_fault)
    for flags in ([], ["--save_strategy", "no"]):
        with pytest.raises(NotFinite, match="weights are not numbers any more at step 4"):
            train(*flags)
        assert whole(tmp_path / "out") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
        assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_lost_evaluation_is_no_result(train, records, poisoned, tmp_path):
    with pytest.raises(NotFinite, match=r"loss in evaluation is NaN or infinite \(nan\) at step 4"):
        train("--save_strategy", "no", "--eval_data_path", records(3, rare=2, name="eval.jsonl"), model=poisoned,
              data=records(24))
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("packing", [False, True])
def test_the_records_of_a_spike_are_named(train, records, tmp_path, capsys, packing):
    data = tmp_path / "spike.jsonl"
    lines = records(200).read_text().split("\n")
    lines[76] = json.dumps({"instruction": "question 77", "output": RARE * 100})
    data.write_text("\n".join(lines))
    flags = ["--packing", "True", "--model_max_length", 256] if packing else []
    train("--max_steps", 100, "--save_strategy", "no", "--loss_spike_factor", 2, "--learning_rate", "1e-2", *flags,
          data=data)
    said = [line for line in capsys.readouterr().out.split("\n") if "times the median" in line]
    assert said and all(f"{data}:77" in line for line in said)


def test_all_finite_sees_every_number():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for lost in (math.nan, math.inf, -math.inf):
            tensor = torch.zeros(3, 5, dtype=dtype)
            assert all_finite([tensor, torch.arange(3), torch.zeros(0)])
            tensor[1, 2] = lost
            assert not all_finite([torch.zeros(2), tensor])
