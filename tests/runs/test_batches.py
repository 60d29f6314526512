"""Batches in whole runs: what packed rows, evaluation and an adapter on the output layer train and report."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen3ForCausalLM

from finetune import PaddingFreeCollator
from mechanisms import fitting, memory
from mechanisms.memory import Setup


def logged(trainer, *names):
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if "loss" in entry]


def test_packing_trains_every_sample_once_an_epoch_and_says_what_it_does(train, capsys):
    trainer = train("--packing", "--num_train_epochs", 2, "--gradient_accumulation_steps", 2)
    dataset, samples = trainer.train_dataset, trainer.train_dataset.dataset
    batches = list(trainer.get_train_dataloader())
    assert sum(len(batch["cu_seq_lens_q"]) - 1 for batch in batches) == len(samples)
    assert max(batch["input_ids"].shape[1] for batch in batches) > 256  # two rows
    steps = trainer.state.global_step
    assert steps == 2 * -(-len(batches) // 2) < len(samples)
    output = capsys.readouterr().out
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    assert f"{len(dataset):,} of 256 tokens, {tokens / len(dataset) / 256:.1%} filled with {len(samples)}" in output
    assert f"  steps               {steps}\n" in output
    assert logged(trainer, "learning_rate")[-1][0] == pytest.approx(1e-3 / steps)  # linear, to 0 after the last step


def test_a_packed_step_equals_the_same_samples_one_by_one(train, monkeypatch):
    """All samples in one step: rows of several, or batches of one."""
    once = ["--max_steps", 1]
    packed = train("--packing", "--gradient_accumulation_steps", 100, *once)
    alone = train("--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 100, *once)
    together = train("--per_device_train_batch_size", 100, *once)
    expected = logged(alone, "loss", "grad_norm")
    for other in (packed, together):
        assert logged(other, "loss", "grad_norm")[0] == pytest.approx(expected[0], rel=1e-5)


@pytest.mark.parametrize("batch", [1, 7])
def test_eval_loss_is_the_mean_over_tokens(train, batch):
    trainer = train("--eval_ratio", 0.3, "--max_steps", 1, "--per_device_eval_batch_size", batch)
    total = tokens = 0
    for sample in trainer.eval_dataset:
        row = PaddingFreeCollator()([sample])
        with torch.no_grad():
            total += trainer.model(**row).loss.item() * row["shift_labels"].numel()
        tokens += row["shift_labels"].numel()
    assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_an_output_layer_with_an_adapter_gets_its_logits(train, capsys):
    trainer = train("--use_lora", "--lora_target_modules", "q_proj", "lm_head", "--max_steps", 2)
    assert "full logits" in capsys.readouterr().out
    assert logged(trainer, "grad_norm")[0][0] > 0


def test_batches_of_a_step_computed_together_are_the_same_step(train, monkeypatch):
    """Four batches a step, two in the last of an epoch. A run that was begun so goes on so, to the last bit, though
    fewer would fit by now; or without, to the same numbers."""
    passes, plain = [], Qwen3ForCausalLM.forward
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", lambda *arguments, **options: (
        passes.append(options["input_ids"].shape[1]), plain(*arguments, **options))[1])
    flags = ["--gradient_accumulation_steps", 4, "--num_train_epochs", 2, "--save_strategy", "steps"]
    alone = train(*flags, "--save_steps", 1000)
    one_by_one = list(passes)
    steps, names = alone.state.global_step, ("loss", "grad_norm", "learning_rate", "epoch", "num_input_tokens_seen")
    assert len(one_by_one) == 2 * len(alone.get_train_dataloader()) != 4 * steps
    wanted = logged(alone, *names)

    passes.clear()
    shutil.rmtree(alone.args.output_dir)
    joined = train(*flags, "--save_steps", 3, "--join_batches", "True")
    assert len(passes) == steps and sum(passes) == sum(one_by_one)
    monkeypatch.setattr(fitting, "FULL", 1)
    resumed = []
    for more in (["--join_batches", "True"], []):
        for checkpoint in Path(joined.args.output_dir).glob("checkpoint-*"):
            if checkpoint.name != "checkpoint-3":
                shutil.rmtree(checkpoint)
        resumed.append(train(*flags, "--save_steps", 3, *more))
    assert logged(resumed[0], *names) == logged(joined, *names)
    for trainer in (joined, *resumed):
        for found, expected in zip(logged(trainer, *names), wanted, strict=True):
            assert found == pytest.approx(expected, rel=1e-4)


def test_only_as_many_batches_are_joined_as_fit(make_model):
    config = AutoConfig.from_pretrained(make_model())
    plan = fitting.Plan(Setup(config, device=torch.device("cpu")), False, 2, 12, lambda items: 300 * items, True, 1e12,
                        None, together=12)
    assert fitting.decide(plan)[0].together == 12  # 7,200 tokens
    assert fitting.decide(plan._replace(longest=lambda items: 500 * items))[0].together == 6  # 8 does not divide 12
    assert fitting.decide(plan._replace(together=1))[0].together == 1
    for most in (4, 1):
        need = fitting.Need.of(plan._replace(items=2 * most)).total(False) / (1 - memory.RESERVE)
        assert fitting.decide(plan._replace(limit=need * 1.0001))[0].together == most
