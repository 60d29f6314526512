"""--dry_run: everything once, on the longest rows, and nothing is left behind."""

import pytest

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import trainer as trainer_module
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line


@pytest.fixture
def train(make_model, cache_dir, tmp_path):
    def run(*flags):
        return finetune.train(prepare_command_line(finetune.__file__, [
            "--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"), "--cache_dir",
            str(cache_dir), "--output_dir", str(tmp_path / "out"), "--max_steps", "6", "--save_steps", "3",
            "--logging_steps", "1", "--per_device_train_batch_size", "4", *map(str, flags)]))

    return run


@pytest.mark.parametrize("flags", [[], ["--use_lora"], ["--q_lora"], ["--packing", "--model_max_length", 128],
                                   ["--eval_ratio", 0.2], ["--gradient_accumulation_steps", 3],
                                   ["--lazy_preprocess", "True"], ["--save_only_model", "True"]])
def test_a_dry_run_leaves_nothing_behind(train, flags, tmp_path, capsys, monkeypatch):
    seen = []
    step = trainer_module.SafeTrainer.training_step
    monkeypatch.setattr(trainer_module.SafeTrainer, "training_step", lambda self, model, inputs, *args: (
        seen.append(inputs["cu_seq_lens_q"].diff().tolist()), step(self, model, inputs, *args))[1])
    assert train("--dry_run", *flags) is None
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "Dry run: trained one step on the longest rows" in said and "  steps of the whole run       6\n" in said
    assert "Data (train)" in said and ("eval loss" in said) == ("--eval_ratio" in flags)
    assert len(seen) == (3 if "--gradient_accumulation_steps" in flags else 1)
    taken = sorted((length for row in seen for length in row), reverse=True)
    if "--lazy_preprocess" not in flags and "--packing" not in flags:
        dataset = train("--max_steps", 1, "--save_strategy", "no", *flags[:2]).train_dataset
        assert taken == sorted(dataset.lengths.tolist(), reverse=True)[:len(taken)]


def test_a_dry_run_in_the_folder_of_a_run_changes_nothing_there(train, tmp_path):
    train("--max_steps", 6, "--save_total_limit", 1)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    train("--dry_run", "--save_total_limit", 1)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    with pytest.raises(UserError, match="seed: 42 in the checkpoint, 1 now"):
        train("--dry_run", "--seed", 1)


def test_a_dry_run_that_cannot_save_fails(train, tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trainer_module.SafeTrainer, "_complete", full)
    with pytest.raises(UserError, match="the checkpoint could not be saved"):
        train("--dry_run")
    assert not (tmp_path / "out").exists()


def test_everything_that_is_wrong_is_said_at_once(train, tmp_path):
    """What one check finds does not keep the others from being made."""
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    data.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
                    '{"text": "no conversation"}\n')
    model.mkdir()
    (model / "config.json").write_text('{')
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        train("--dry_run", "--model_name_or_path", model, "--data_path", data, "--resume_from_checkpoint",
              tmp_path / "out" / "checkpoint-1")
    message = str(raised.value)
    assert "checkpoint-1: cannot be resumed" in message and "holds no usable model" in message
    assert f"{data}:2" in message and f"{data}:1" not in message
