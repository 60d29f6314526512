"""Full fine-tuning with weights in bf16: it moves them as fp32 would, resumes to the last bit, and is small."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from finetune import parse_arguments
from mechanisms.errors import UserError
from mechanisms.frugal import SMALL, SeededAdamW
from tests.runs.test_batches import logged

BF16 = ["--bf16", "--trained_weights", "bf16"]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_small_updates_move_weights_on_average():
    """By a tenth of the distance of two bf16 numbers: rounded to the nearest, none moves."""
    rate = 0.1 * 2 ** -7
    moved = []
    for seed in range(2):
        weight = torch.nn.Parameter(torch.ones(1 << 16, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        SeededAdamW([weight], seed, lr=rate, weight_decay=0).step()
        assert set(weight.unique().tolist()) == {1 - 2 ** -8, 1.0}
        assert (1 - weight.float()).mean().item() == pytest.approx(rate, rel=0.05)
        moved.append(weight.detach())
    assert not torch.equal(*moved)


def test_weights_are_held_in_bf16_and_learn_as_in_fp32(train):
    frugal = train(*BF16, "--max_steps", 12)
    for weight in frugal.model.parameters():
        if weight.numel() >= SMALL:
            moments = [frugal.optimizer.state[weight][moment] for moment in ("exp_avg", "exp_avg_sq")]
            assert sum(each.codes.nbytes + each.scale.nbytes for each in moments) < 2.1 * weight.numel()
    assert logged(frugal, "loss")[0] == pytest.approx(logged(train("--bf16", "--max_steps", 12), "loss")[0], rel=0.01)


def test_a_resumed_run_is_one_that_was_never_stopped_and_auto_keeps_to_its_weights(train, capsys, tmp_path):
    flags = ["--bf16", "--save_strategy", "steps", "--save_steps", 2, "--lr_scheduler_type", "constant"]
    bf16 = ["--trained_weights", "bf16"]
    wanted = weights(train(*flags, *bf16, "--max_steps", 4, "--output_dir", tmp_path / "whole"))
    train(*flags, *bf16, "--max_steps", 2)
    resumed = train(*flags, "--max_steps", 4)  # fp32 would fit here
    assert "Resuming from" in capsys.readouterr().out and resumed.args.trained_weights == "bf16"
    assert_equal(weights(resumed), wanted)
    with pytest.raises(UserError, match="trained weights: 'bf16' in the checkpoint, None now"):
        train(*flags, "--trained_weights", "fp32", "--max_steps", 6)


@pytest.mark.parametrize("flags, words", [
    (["--bf16", "--use_lora"], "is for full fine-tuning"), ([], "needs --bf16"),
    (["--bf16", "--optim", "adamw_8bit"], "has its own optimizer"),
    (["--bf16", "--deepspeed", "ds_config_zero2.json"], "has no effect under DeepSpeed")])
def test_where_it_makes_no_sense_it_is_refused(flags, words):
    with pytest.raises(UserError, match=words):
        parse_arguments(["--data_path", "x.jsonl", "--trained_weights", "bf16", *flags])


@pytest.mark.parametrize("flags, dtype", [
    ([], torch.float32), (["--save_dtype", "bfloat16"], torch.bfloat16),
    (["--bf16", "--trained_weights", "bf16"], torch.float32)])
def test_results_are_saved_in_the_precision_of_the_base_or_that_asked_for(train, tmp_path, flags, dtype):
    """Of the tiny model that is fp32; checkpoints keep what is trained."""
    trainer = train("--max_steps", 2, "--save_strategy", "steps", "--save_steps", 2, *flags)
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert result.dtype == dtype
    for name, weight in trainer.model.named_parameters():
        assert weight.dtype == dtype and torch.equal(result.get_parameter(name), weight)
    with safe_open(tmp_path / "out/checkpoint-2/model.safetensors", "pt") as tensors:
        kept = {str(tensors.get_tensor(name).dtype) for name in tensors.keys()}
    assert kept == ({"torch.float32", "torch.bfloat16"} if "--trained_weights" in flags else {"torch.float32"})


def test_a_precision_that_would_have_no_effect_is_refused():
    with pytest.raises(UserError, match="adapters are saved as they are"):
        parse_arguments(["--data_path", "x.jsonl", "--use_lora", "--save_dtype", "bfloat16"])
