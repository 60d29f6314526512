"""Batches in whole runs: what packed rows, evaluation and an adapter on the output layer train and report."""

import pytest
import torch

from finetune import PaddingFreeCollator


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
