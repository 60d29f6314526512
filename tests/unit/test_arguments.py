"""The command line: what it understands, and one clear message with exit code 2 for every mistake."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import finetune
from examples.make_tiny_model import EXAMPLES
from finetune import parse_arguments
from mechanisms import strategies
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line
from mechanisms.loading import check_trainable, fit_arguments

ROOT = Path(finetune.__file__).parent
GOOD = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def prepare(*argv):
    return prepare_command_line(finetune.__file__, [str(word) for word in argv])


def run(*argv):
    return subprocess.run([sys.executable, str(ROOT / "finetune.py"), *map(str, argv)], capture_output=True, text=True,
                          timeout=120)


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("flags", [["--learning_rat", "1e-4", "--bogus=3"], ["--help"]])
def test_a_wrong_flag_and_help_are_answered_at_once(flags):
    before = cpu_seconds()
    result = run(*flags)
    assert cpu_seconds() - before < 3
    if flags == ["--help"]:
        assert result.returncode == 0
        ours = [field.name for cls in (finetune.ModelArguments, finetune.DataArguments, finetune.LoraArguments)
                for field in cls.__dataclass_fields__.values()]
        for flag in [*ours, "model_max_length", "use_lora", "per_device_train_batch_size"]:
            assert flag in result.stdout
        for group in ("Model:", "Data:", "Training:", "Lora:"):
            assert f"\n{group}\n" in result.stdout
    else:
        assert result.returncode == 2 and not result.stdout
        assert "unknown flag --learning_rat (did you mean --learning_rate?)" in result.stderr
        assert "unknown flag --bogus" in result.stderr and "Traceback" not in result.stderr


def test_help_cut_by_a_pipe_says_nothing_else():
    result = subprocess.run(f"'{sys.executable}' finetune.py --help | head -n 1", shell=True, cwd=ROOT,
                            capture_output=True, text=True)
    assert result.stdout.count("\n") == 1 and not result.stderr


def test_every_flag_of_ours_has_a_help_text():
    from dataclasses import fields

    for cls in (finetune.ModelArguments, finetune.DataArguments, finetune.LoraArguments):
        assert all(field.metadata.get("help") for field in fields(cls))
    own = finetune.TrainingArguments.__annotations__
    assert all(field.metadata.get("help") for field in fields(finetune.TrainingArguments) if field.name in own)


@pytest.mark.parametrize("ending", ["yaml", "json"])
def test_config_file_and_command_line_wins(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b c.json"):
        Path(name).touch()
    config = tmp_path / f"run.{ending}"
    values = {"data_path": ["a.json", "b c.json"], "learning_rate": 1e-5, "use_lora": True, "eval_strategy": "no",
              "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}, "lora_r": 8,
              "output_dir": str(tmp_path)}
    if ending == "json":
        config.write_text(json.dumps(values))
    else:
        config.write_text("data_path: [a.json, b c.json]\nlearning_rate: 1e-5\nuse_lora: true\neval_strategy: no\n"
                          f"lr_scheduler_type: cosine\nlr_scheduler_kwargs: {{num_cycles: 2}}\nlora_r: 8\n"
                          f"output_dir: {tmp_path}\n")
    _, data, training, lora = parse_arguments(prepare(config, "--lora_r", "16"))
    assert data.data_path == ["a.json", "b c.json"] and training.learning_rate == 1e-5 and training.use_lora
    assert training.eval_strategy == "no" and training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert lora.lora_r == 16


@pytest.mark.parametrize("text, message", [("- a\n- b", "mapping"), ("a: [", "not valid YAML"),
                                           ("lora_rr: 1\nfoo: 2", "did you mean --lora_r")])
def test_bad_config_files(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        prepare(tmp_path / "run.yaml")
    with pytest.raises(UserError, match="cannot read"):
        prepare(tmp_path / "none.yaml")


def test_names_of_the_original_are_understood(capsys):
    argv = prepare("--data_path", EXAMPLES / "data", "--evaluation_strategy", "no", "--warmup_ratio=0.01",
                   "--gradient-checkpointing")
    _, _, training, _ = parse_arguments(argv)
    assert training.warmup_steps == 0.01 and training.activation_checkpointing is True
    assert "--warmup_ratio is read as --warmup_steps" in capsys.readouterr().err


def test_defaults_of_the_original():
    _, data, training, lora = parse_arguments(["--data_path", "x"])
    assert (training.optim, training.model_max_length, training.use_lora) == ("adamw_torch_fused", 8192, False)
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout, lora.lora_bias) == (64, 16, 0.05, "none")
    assert lora.q_lora is False
    assert data.lazy_preprocess is False
    assert parse_arguments(["--data_path", "x", "--q_lora"])[2].use_lora  # q_lora implies use_lora


def test_all_wrong_combinations_are_named_at_once():
    with pytest.raises(UserError) as error:
        parse_arguments(["--eval_ratio", "1.5", "--eval_data_path", "e", "--lora_r", "3", "--lora_alpha", "1"])
    for part in ("--data_path is missing", "--eval_ratio 1.5", "exclude each other", "--lora_r has no effect",
                 "--lora_alpha has no effect"):
        assert part in str(error.value)


@pytest.mark.parametrize("argv, message", [
    (["--fp16"], "--fp16 needs a GPU"), (["--fp16", "--bf16"], "exclude each other"),
    (["--num_train_epochs", "many"], "invalid float value: 'many'"),
    (["--loss_on", "user"], "invalid choice: 'user'"), (["stray"], "unexpected argument 'stray'"),
    (["--deepspeed", "no.json"], "--deepspeed no.json: no such file"),
    (["--eval_strategy", "epoch"], "--eval_strategy epoch needs --eval_data_path or --eval_ratio"),
])
def test_wrong_values(argv, message):
    with pytest.raises(UserError) as error:
        data = prepare("--data_path", EXAMPLES / "data")
        parse_arguments(data + argv if argv != ["stray"] else argv + data)
    assert message in str(error.value)


def bad_data(folder):
    line = json.dumps(GOOD)
    return {
        "missing file": (None, "no such file"),
        "empty file": (b"", "the file is empty"),
        "broken json": (f"{line}\n{line[:-3]}".encode(), "data:2 (record 2): not valid JSON"),
        "wrong encoding": ('{"instruction": "你", "output": "好"}'.encode("gb18030"), "not UTF-8"),
        "unknown shape": (b'{"q": "a", "response": "b"}', "unknown shape"),
        "empty conversation": (b'{"messages": []}', "empty conversation"),
        "roles out of order": (b'{"messages": [{"role": "assistant", "content": "x"}]}', "roles out of order"),
        "content": (b'{"messages": [{"role": "user", "content": 1}]}', "content is not a string"),
        "no assistant": (b'{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
    }


@pytest.mark.parametrize("case", list(bad_data(None)))
def test_bad_data_stops_before_any_weight_is_loaded(case, tmp_path, make_model, cache_dir, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "load_weights", lambda *_, **__: pytest.fail("loaded"))
    content, message = bad_data(tmp_path)[case]
    if content is not None:
        (tmp_path / "data").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--model_name_or_path", str(make_model()), "--data_path", str(tmp_path / "data"),
                       "--output_dir", str(tmp_path / "out"), "--cache_dir", str(cache_dir)])
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors and str(tmp_path / "data") in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case, message", [
    ("nowhere/at/all", "no such folder"), ("no config", "holds no usable model"),
    ("no tokenizer", "no usable tokenizer"),
    ("no weights", "cannot be loaded"), ("cut weights", "cannot be loaded"), ("adapter", "--lora_weight_path")])
def test_models_that_are_not_there(case, message, tmp_path, make_model, cache_dir, capsys):
    model = tmp_path / "model"
    shutil.copytree(make_model(), model)
    if case == "nowhere/at/all":
        model = case
    elif case == "no config":
        (model / "config.json").unlink()
    elif case == "no tokenizer":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).unlink()
    elif case == "adapter":
        (model / "config.json").rename(model / "adapter_config.json")
    else:
        weights = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").unlink()
        if case == "cut weights":
            (model / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(SystemExit) as stop:
        finetune.main(["--model_name_or_path", str(model), "--data_path", str(EXAMPLES / "data"), "--output_dir",
                       str(tmp_path / "out"), "--cache_dir", str(cache_dir), "--max_steps", "1"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    (lambda folder, tokenizer: change_config(folder, vocab_size=2048),
     "vocab_size is 2,048 in its config.json, and model.embed_tokens.weight in model.safetensors has 1,0"),
    (lambda folder, tokenizer: tokenizer.add_tokens([f"<|place_{number}|>" for number in range(99)]), None),
    (lambda folder, tokenizer: tokenizer.add_tokens([f"word{number}" for number in range(99)]), None),
    (lambda folder, tokenizer: setattr(tokenizer, "chat_template", tokenizer.chat_template + "{# <|place_98|> #}") or
     tokenizer.add_tokens([f"<|place_{number}|>" for number in range(99)]), "1 of its tokenizer's lie beyond, from")])
def test_a_vocabulary_that_is_not_that_of_the_weights(change, message, tmp_path, make_model, cache_dir, monkeypatch):
    """Tokens without an embedding are refused if they can occur: in the chat template, or with --keep_added_tokens."""
    monkeypatch.setattr(finetune, "load_weights", lambda *_, **__: pytest.fail("weights were loaded"))
    folder = tmp_path / "model"
    shutil.copytree(make_model(), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    change(folder, tokenizer)
    tokenizer.save_pretrained(folder)
    words = ["--model_name_or_path", str(folder), "--data_path", str(EXAMPLES / "data"), "--cache_dir", str(cache_dir)]
    if message is None:
        finetune.prepare(words)
        words, message = [*words, "--keep_added_tokens"], "of its tokenizer's lie beyond, from"
    with pytest.raises(UserError, match=message):
        finetune.prepare(words)


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


@pytest.mark.parametrize("flags, message", [
    (["--use_lora", "--lora_target_modules", "q_proj", "c_fc"], "--lora_target_modules c_fc: no such layers"),
    (["--use_lora", "--lora_weight_path", "nowhere"], "no such folder"),
])
def test_lora_flags_the_model_cannot_do(flags, message, make_model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        finetune.main(["--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"),
                       "--output_dir", str(tmp_path), *flags])
    assert message in capsys.readouterr().err


def test_a_single_process_uses_one_gpu_and_says_so(monkeypatch, tmp_path):
    argv = ["--data_path", "x", "--output_dir", str(tmp_path)]
    args = parse_arguments(argv)[2]
    assert args.visible_gpus <= 1 and strategies.idle_gpus(args) == []
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", property(lambda self: self.__dict__.get("_n_gpu", 4)))
    monkeypatch.delattr(transformers.TrainingArguments, "_setup_devices")
    monkeypatch.setattr(transformers.TrainingArguments, "device", torch.device("cpu"))
    args = parse_arguments(argv)[2]
    assert args.n_gpu == 1
    [line] = strategies.idle_gpus(args)
    assert line.startswith("4 GPUs are here and this run uses one") and "--nproc_per_node 4" in line


def test_liger_needs_a_gpu():
    with pytest.raises(UserError, match="--use_liger_kernel needs a GPU"):
        parse_arguments(["--data_path", "x", "--use_liger_kernel"])


def test_layers_that_would_mix_samples_are_refused():
    config = transformers.Qwen3NextConfig(num_hidden_layers=4)
    config.layer_types[0] = "conv"
    _, _, training, lora = parse_arguments(["--data_path", "x"])
    with pytest.raises(UserError, match="layers of the kind conv:"):
        check_trainable("x", config, training, lora)


def test_yarn_extends_the_longest_sample():
    training, lora = parse_arguments(["--data_path", "x", "--model_max_length", "300"])[2:]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    fit_arguments(transformers.Qwen2Config(max_position_embeddings=64, rope_parameters=rope), training, lora)
    assert training.model_max_length == 256
