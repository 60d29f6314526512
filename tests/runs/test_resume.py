"""The same command resumes; another one is refused with the difference named, or changes only what it may."""

import shutil

import pytest
import transformers

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms.errors import UserError

METHODS = {"full": [], "lora": ["--use_lora", "--lora_r", "4", "--lora_alpha", "16", "--lora_dropout", "0"]}


@pytest.fixture(scope="module")
def killed(make_model, cache_dir, tmp_path_factory):
    """killed(method) -> (flags, folder of a run killed after checkpoint-2 of 4 steps, losses of the whole run)."""
    made = {}

    def make(method):
        if method not in made:
            out = tmp_path_factory.mktemp(method) / "out"
            flags = ["--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"), "--cache_dir",
                     str(cache_dir), "--output_dir", str(out), "--max_steps", "4", "--save_steps", "2",
                     "--logging_steps", "1", "--learning_rate", "1e-3", "--model_max_length", "256", *METHODS[method]]
            whole = losses(finetune.train(flags))
            shutil.rmtree(out / "checkpoint-4")
            for result in [path for path in out.iterdir() if path.is_file()]:
                result.unlink()
            made[method] = flags, out, whole
        return made[method]

    return make


@pytest.fixture
def again(killed, tmp_path):
    """again(method, *flags) -> Trainer of the command given again with these flags behind, in a copy of the folder."""

    def run(method, *flags):
        words, out, _ = killed(method)
        shutil.copytree(out, tmp_path / "out", dirs_exist_ok=True)
        return finetune.train([*words, "--output_dir", str(tmp_path / "out"), *map(str, flags)])

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def other_model(make_model, tmp_path):
    """A model of the same shape with other weights."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    shutil.copytree(make_model(), folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_tied_output_layer_is_not_called_missing(again, monkeypatch):
    said = []
    monkeypatch.setattr(transformers.trainer.logger, "warning", said.append)
    trainer = again("full")
    assert "lm_head.weight" in trainer.model.all_tied_weights_keys and not any("missing keys" in line for line in said)
    name = "model.norm.weight"
    trainer._issue_warnings_after_load(trainer.model.load_state_dict({}, strict=False))
    [line] = [line for line in said if "missing keys" in line]
    assert name in line and "lm_head.weight" not in line


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("flag, value, before", [
    ("learning_rate", "1e-5", "0.001"), ("weight_decay", "0.5", "0.0"), ("optim", "adafactor", "'adamw_torch_fused'"),
    ("data_seed", "7", "None"), ("bf16", "True", "False"), ("max_steps", "3", "4"), ("lr_scheduler_type", "cosine",
    "'linear'"), ("loss_on", "last", "'assistant'"), ("packing", "True", "False")])
def test_another_setting_is_refused_with_both_values(again, method, flag, value, before):
    fact = {"max_steps": "steps"}.get(flag, flag)
    with pytest.raises(UserError) as error:
        again(method, f"--{flag}", value)
    [line] = [line for line in str(error.value).splitlines() if line.strip().startswith(f"{fact}: ")]
    assert f"{fact}: {before} in the checkpoint, " in line


@pytest.mark.parametrize("flag, value, before", [("lora_alpha", "64", "16"), ("lora_r", "16", "4"),
                                                 ("lora_embeddings", "chatml", "'auto'")])
def test_another_adapter_is_refused(again, flag, value, before):
    with pytest.raises(UserError, match=f"{flag}: {before} in the checkpoint, '?{value}'? now"):
        again("lora", f"--{flag}", value)


@pytest.mark.parametrize("method", METHODS)
def test_another_base_model_of_the_same_shape_is_refused(again, other_model, method):
    with pytest.raises(UserError, match=f"base model: .*in the checkpoint, '{other_model}' .* now"):
        again(method, "--model_name_or_path", other_model)


def test_another_chat_template_is_refused(again, make_model, tmp_path):
    folder = tmp_path / "other template"
    shutil.copytree(make_model(), folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a helpful assistant.", "You are Lumi."))
    with pytest.raises(UserError, match="chat template: "):
        again("full", "--model_name_or_path", folder)


@pytest.mark.parametrize("method", METHODS)
def test_what_may_change_changes_no_number(again, killed, make_model, method, tmp_path):
    """All of it at once: the numbers are those of the run that was never stopped."""
    moved = tmp_path / "moved"
    shutil.copytree(make_model(), moved)
    trainer = again(
        method, "--model_name_or_path", moved, "--cache_dir", tmp_path / "cache", "--save_steps", 3,
        "--save_total_limit", 1, "--logging_first_step", "True", "--log_level", "info", "--disable_tqdm", "True",
        "--eval_data_path", EXAMPLES / "persona.jsonl", "--eval_strategy", "steps", "--eval_steps", 1,
        "--per_device_eval_batch_size", 3, "--dataloader_num_workers", 1, "--gradient_checkpointing", "True",
        "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2, "--lazy_preprocess", "True",
        "--skip_memory_metrics", "False", "--skip_bad_rows", 5)
    assert losses(trainer)[:2] == killed(method)[2][:2]
    assert losses(trainer) == pytest.approx(killed(method)[2], rel=1e-5)  # half batches: another order of sums


def test_more_steps_are_said_and_taken(again, capsys):
    assert again("full", "--max_steps", 6).state.global_step == 6
    assert "note: steps: 4 in the checkpoint, 6 now" in capsys.readouterr().out


def test_a_checkpoint_without_an_optimizer_is_not_resumed(again, killed, tmp_path, capsys):
    words, _, whole = killed("full")
    out = tmp_path / "out"
    finetune.train([*words, "--output_dir", str(out), "--save_only_model", "True"])
    shutil.rmtree(out / "checkpoint-4")
    capsys.readouterr()
    with pytest.raises(UserError, match="cannot be resumed: it holds no optimizer"):
        finetune.train([*words, "--output_dir", str(out), "--resume_from_checkpoint", str(out / "checkpoint-2")])
    trainer = finetune.train([*words, "--output_dir", str(out), "--save_only_model", "True"])
    output = capsys.readouterr().out
    assert "checkpoint-2 is skipped: it holds no optimizer (--save_only_model)" in output and "Resuming" not in output
    assert losses(trainer) == whole


def test_the_card_says_what_was_done(again, killed):
    again("lora")
    card = (killed("lora")[1].parent / "out" / "checkpoint-2" / "README.md").read_text(encoding="utf-8")
    for row in ("learning_rate | 0.001", "lora_r | 4", "lora_alpha | 16", "max_steps | 4",
                "model_max_length | 256", "loss_on | assistant"):
        assert f"| {row} |" in card
