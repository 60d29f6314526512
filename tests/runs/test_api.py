"""finetune.py as a module, for notebooks and inspection: it does what the command does and leaves the rest alone."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms.errors import UserError

ROOT = Path(finetune.__file__).parent
IMPORTED = """
import logging, os, signal, sys, warnings
before = dict(os.environ), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers)
import finetune, chat, merge_lora, run_gptq
finetune.parse_arguments(["--data_path", "x", "--deepspeed", "ds_config_zero2.json"])
now = dict(os.environ), signal.getsignal(signal.SIGINT), list(logging.getLogger().handlers)
assert before == now, (set(now[0].items()) ^ set(before[0].items()), now[1:])
logging.basicConfig(level=logging.INFO)
logging.info("seen")
"""


def test_import_leaves_environment_signals_and_logging_alone():
    run = subprocess.run([sys.executable, "-c", IMPORTED], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "INFO:root:seen" in run.stderr


@pytest.fixture
def words(make_model, tmp_path, cache_dir):
    return ["--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"), "--output_dir",
            str(tmp_path / "out"), "--cache_dir", str(cache_dir), "--max_steps", "2", "--logging_steps", "1",
            "--model_max_length", "256", "--gradient_checkpointing", "True", "--warmup_ratio", "0.5"]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_train_takes_the_words_of_the_command_line(words, tmp_path):
    """Documented names included; and the command gives the same numbers."""
    trainer = finetune.train(words)
    assert trainer.args.gradient_checkpointing and trainer.model.model.layers[0].gradient_checkpointing
    assert trainer.args.warmup_steps == 0.5
    command = [sys.executable, "finetune.py", *words, "--output_dir", str(tmp_path / "other")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [f" {loss:.4f} " in run.stdout for loss in losses(trainer)] == [True, True]
    with pytest.raises(UserError, match="unknown flag --bogus"):
        finetune.train([*words, "--bogus", "1"])


@pytest.mark.parametrize("flags", [[], ["--eval_ratio", "0.2"], ["--packing"], ["--deepspeed", "ds_config_zero3.json"],
                                   ["--eval_data_path", str(EXAMPLES / "persona.jsonl")]])
def test_prepare_gives_what_is_trained_on(words, flags, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "load_weights", lambda *_, **__: pytest.fail("loaded"))
        tokenizer, train, evaluation, reports = finetune.prepare([*words, *flags])
    assert tokenizer.eos_token == "<|im_end|>"
    assert reports["train"].kept == len(train) + (len(evaluation) if "--eval_ratio" in flags else 0)
    assert reports.keys() == ({"train", "eval"} if "--eval_data_path" in flags else {"train"})
    if "--deepspeed" in flags:
        return
    trainer = finetune.train([*words, *flags, "--max_steps", "1"])
    rows = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    trained = [sample for row in rows for sample in (row if "--packing" in flags else [row])]
    for own, others in ((trained, train), (list(trainer.eval_dataset or []), evaluation or [])):
        own, others = (sorted((sample["input_ids"].tolist(), sample["labels"].tolist()) for sample in samples)
                       for samples in (own, [others[index] for index in range(len(others))]))
        assert own == others
    sample = train[0]
    assert sample.keys() == {"input_ids", "labels"}
    assert (sample["input_ids"].dtype, sample["labels"].dtype) == (np.int32, np.int32)
