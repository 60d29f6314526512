"""Whole runs of finetune.py in this process, on tiny models: what is trained, saved, reloaded and resumed."""

import json
import math
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import finetune
from examples.make_tiny_model import EXAMPLES
from finetune import ConversationEncoder, load_tokenizer
from mechanisms import checkpoints
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line

DATA = str(EXAMPLES / "data")
FEW_STEPS = ["--max_steps", "6", "--save_steps", "3", "--logging_steps", "1", "--per_device_train_batch_size", "8",
             "--learning_rate", "1e-2", "--model_max_length", "512"]
LORA = ["--lora_r", "8", "--lora_alpha", "64"]
METHODS = {"full": [], "lora": ["--use_lora", *LORA], "qlora": ["--q_lora", *LORA]}


@pytest.fixture
def train(make_model, cache_dir, tmp_path):
    """train(*flags, model=folder) -> Trainer, writing to tmp_path / "out" unless told otherwise."""

    def run(*flags, model=None, data=DATA):
        out = [] if "--output_dir" in flags else ["--output_dir", str(tmp_path / "out")]
        return finetune.train(prepare_command_line(finetune.__file__, [
            "--model_name_or_path", str(model or make_model()), "--data_path", data, "--cache_dir", str(cache_dir),
            *FEW_STEPS, *out, *map(str, flags)]))

    return run


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def probe_logits(model, tokenizer):
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}], add_generation_prompt=True,
                                        return_tensors="pt", return_dict=False)
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def check_result(folder, trainer):
    """The folder loads with nothing but its name, says what the trained model says, has all that inference needs."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    adapter = (folder / "adapter_config.json").exists()
    loader = AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32)
    trained = trainer.model
    assert torch.allclose(probe_logits(model, tokenizer), probe_logits(trained, tokenizer), atol=1e-5)
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.chat_template
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(folder).eos_token_id
    assert "base_model:" in (folder / "README.md").read_text(encoding="utf-8")
    assert not list(folder.glob("*.bin.unfinished")) and list(folder.glob("*.safetensors"))
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_its_result_loads(train, method, checkpointing, tmp_path):
    trainer = train(*METHODS[method], "--gradient_checkpointing", checkpointing)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    out = tmp_path / "out"
    if method == "qlora":  # the 4-bit base is not what AutoPeft loads; the adapter's own tensors must be the same
        assert (out / "adapter_model.safetensors").exists()
        AutoPeftModelForCausalLM.from_pretrained(out)
    else:
        check_result(out, trainer)
        assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}
        check_result(out / "checkpoint-6", trainer)
    assert not isinstance(checkpoints.read_manifest(out / "checkpoint-3"), str)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embeddings, quantized", [("auto", []), ("full", []), ("chatml", []), ("none", []),
                                                   ("auto", ["--q_lora"]), ("full", ["--q_lora"])])
def test_lora_on_a_base_model_keeps_its_embeddings(train, make_model, embeddings, quantized, tied, tmp_path, capsys):
    base = make_model(base=True, tie_word_embeddings=tied)
    trainer = train("--use_lora", "--lora_r", 4, "--lora_embeddings", embeddings, *quantized, model=base)
    output = capsys.readouterr().out
    chosen = {"auto": "chatml" if quantized else "full"}.get(embeddings, embeddings)
    if embeddings == "auto":
        assert "Base model: its name" in output or "Base model: its generation config" in output
        assert f"is '{chosen}'" in output
    before = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    if quantized:
        after = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        after = check_result(tmp_path / "out", trainer)
    merged = after.merge_and_unload()
    for name in ("get_input_embeddings", "get_output_embeddings"):
        changed = (getattr(merged, name)().weight.float() - getattr(before, name)().weight).abs().amax(dim=1) > 1e-6
        rows = set(changed.nonzero().flatten().tolist())
        if chosen == "none":
            assert not rows
        elif chosen == "chatml":
            assert rows == set(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]))
        else:
            assert len(rows) > 10
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_resume_continues_with_the_same_numbers(train, method, tmp_path, capsys):
    whole = losses(train(*METHODS[method]))
    out = tmp_path / "out"
    for left_by_a_kill in (out / "checkpoint-6", *out.glob("*.safetensors"), out / "config.json"):
        if left_by_a_kill.is_dir():
            shutil.rmtree(left_by_a_kill)
        else:
            left_by_a_kill.unlink(missing_ok=True)
    resumed = train(*METHODS[method])
    assert "Resuming from" in capsys.readouterr().out
    assert losses(resumed) == whole  # the first three are in the state that was resumed, the others trained again
    assert list(out.glob("*.safetensors"))


def test_the_same_command_after_the_end_changes_nothing(train, tmp_path):
    train()
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert train().state.global_step == 6
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_half_written_checkpoints_are_passed_over(train, tmp_path, capsys):
    whole = losses(train("--save_steps", 2))
    out = tmp_path / "out"
    (out / "checkpoint-6" / checkpoints.MANIFEST).unlink()
    weights = out / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert losses(train("--save_steps", 2)) == whole
    output = capsys.readouterr().out
    assert "checkpoint-6 is skipped: no complete.json" in output
    assert "checkpoint-4 is skipped: model.safetensors has" in output
    assert "Resuming from" in output and "checkpoint-2" in output


def test_start_over_does_not_mix(train, tmp_path):
    train()
    with pytest.raises(UserError, match="already holds results"):
        train("--resume_from_checkpoint", "False")
    with pytest.raises(UserError, match="no such folder"):
        train("--resume_from_checkpoint", tmp_path / "nowhere")
    with pytest.raises(UserError, match="must be|no complete checkpoint"):
        train("--resume_from_checkpoint", "True", "--output_dir", tmp_path / "empty")
    with pytest.raises(UserError, match="seed: 42 in the checkpoint, 1 now"):
        train("--seed", "1")


def test_save_total_limit_never_leaves_less_than_one(train, tmp_path):
    train("--save_steps", 2, "--save_total_limit", 1)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-6"]


def test_lora_weight_path_continues_an_adapter(train, make_model, tmp_path):
    first = train("--use_lora", *LORA, "--output_dir", tmp_path / "first")
    second = train("--use_lora", "--lora_weight_path", tmp_path / "first", "--output_dir", tmp_path / "second")
    assert losses(second)[0] < losses(first)[0] - 0.2
    check_result(tmp_path / "second", second)
    with pytest.raises(UserError, match="--lora_r"):
        train("--use_lora", "--lora_r", 4, "--lora_weight_path", tmp_path / "first", "--output_dir", tmp_path / "third")


def test_lazy_and_eager_give_identical_batches(train, make_model, cache_dir, tmp_path):
    from finetune import PaddingFreeCollator, parse_arguments, prepare_datasets

    tokenizer = load_tokenizer(str(make_model()))
    batches = {}
    for lazy in (False, True):
        _, data_args, training_args, _ = parse_arguments([
            "--data_path", DATA, "--lazy_preprocess", str(lazy), "--model_max_length", "60", "--eval_ratio", "0.2",
            "--cache_dir", str(cache_dir), "--output_dir", str(tmp_path)])
        datasets = prepare_datasets(data_args, training_args, tokenizer)[:2]
        batches[lazy] = [[dataset[i] for i in range(len(dataset))] for dataset in datasets]
    for eager, lazy in zip(batches[False], batches[True]):
        assert len(eager) == len(lazy)
        collate = PaddingFreeCollator()
        for start in range(0, len(eager), 4):
            one, other = collate(eager[start:start + 4]), collate(lazy[start:start + 4])
            assert one.keys() == other.keys()
            assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
            assert one["input_ids"].shape[1] == sum(len(sample["input_ids"]) for sample in eager[start:start + 4])
    trained = losses(train("--output_dir", tmp_path / "eager"))
    assert losses(train("--lazy_preprocess", "True", "--output_dir", tmp_path / "lazy")) == trained


def test_accumulation_equals_one_large_batch(train, tmp_path):
    """The loss is a mean over the tokens of a step, however the step is cut."""
    logs = []
    for batch, accumulation in ((1, 4), (4, 1), (2, 2)):
        trainer = train("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
                        "--output_dir", tmp_path / f"{batch}x{accumulation}")
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    for other in logs[1:]:
        for one, two in zip(logs[0], other):
            assert one == pytest.approx(two, rel=1e-5)


def test_an_evaluation_before_training_changes_no_4_bit_gradient(train, tmp_path):
    logs = [train(*METHODS["qlora"], "--lora_dropout", 0, "--max_steps", 3, "--logging_steps", 1, "--eval_ratio", 0.2,
                  "--output_dir", tmp_path / out, *flags).state.log_history
            for out, flags in (("plain", []), ("evaluated", ["--eval_on_start", "True", "--eval_strategy", "steps"]))]
    plain, evaluated = ([(entry["loss"], entry["grad_norm"]) for entry in log if "loss" in entry] for log in logs)
    assert evaluated == plain and len(plain) == 3


def test_evaluation_and_its_split(train, tmp_path, capsys):
    trainer = train("--eval_ratio", 0.1, "--eval_strategy", "steps", "--eval_steps", 3)
    evaluated = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == [3, 6]  # that of the last step serves for the result
    assert "held out" in capsys.readouterr().out
    held_out, kept = trainer.eval_dataset, trainer.train_dataset
    assert len(held_out) + len(kept) == len(held_out.dataset) and len(held_out) == round(0.1 * len(held_out.dataset))
    assert not set(held_out.dataset.digests[held_out.indices]) & set(kept.dataset.digests[kept.indices])
    again = train("--eval_ratio", 0.1, "--seed", 7, "--output_dir", tmp_path / "other seed")
    assert again.eval_dataset.indices == held_out.indices


def test_a_lost_loss_stops_the_run(train, make_model, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(make_model(), broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(broken)
    for logging_steps in (1, 100):  # seen when it is logged, or at the latest before a checkpoint is written
        with pytest.raises(UserError, match="NaN or infinite"):
            train("--logging_steps", logging_steps, model=broken)
        assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_skipped_rows_are_written_down(train, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    good = [{"instruction": f"question {n}", "output": f"answer {n}"} for n in range(20)]
    bad = [{"instruction": "x"}, {"foo": 1}]
    data.write_text("\n".join(map(json.dumps, good[:3] + bad + good[3:] + good[:2])))
    with pytest.raises(UserError, match="--skip_bad_rows 2"):
        train(data=str(data))
    assert not (tmp_path / "out" / "rejected.jsonl").exists()
    for _ in range(2):  # the second time from the cache
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        train("--skip_bad_rows", 2, data=str(data))
        rejected = [json.loads(line) for line in open(tmp_path / "out" / "rejected.jsonl", encoding="utf-8")]
        assert [(row["line"], row["data"]) for row in rejected] == [(4, bad[0]), (5, bad[1])]
        assert "duplicates among the kept" in (output := capsys.readouterr().out) and "2\n" in output


def test_nothing_left_to_learn_stops(train, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "word " * 50, "output": "x"}]))
    with pytest.raises(UserError, match="left to learn"):
        train("--model_max_length", 20, data=str(data))


@pytest.fixture(scope="module")
def tiny_qwen2_real(real_data, tmp_path_factory):
    """A tiny Qwen2 network with the real Qwen2.5 tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("real") / "tiny-instruct"
    tokenizer = AutoTokenizer.from_pretrained(real_data / "tokenizers/qwen2.5")
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=151936, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, max_position_embeddings=2048)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conversations/xiaozhi_chat.json", "alpaca/huanhuan.json",
                                  "messages/tinker_cookbook_conversations.jsonl",
                                  "sharegpt/fastchat_dummy_conversation.json"])
def test_real_data_with_the_real_tokenizer(train, real_data, tiny_qwen2_real, name, method, tmp_path):
    trainer = train(*METHODS[method], "--learning_rate", "2e-2", "--model_max_length", 128,
                    "--per_device_train_batch_size", 2, "--save_steps", 100, model=tiny_qwen2_real,
                    data=str(real_data / "datasets" / name))
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.03
    if method == "qlora":
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    else:
        check_result(tmp_path / "out", trainer)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path / "out").chat_template, str)
    assert ConversationEncoder(load_tokenizer(str(tmp_path / "out")), 512)
