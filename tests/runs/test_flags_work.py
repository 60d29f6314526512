"""Flags of transformers.TrainingArguments have their effect: one of each group. All: python -m tests.sweep flags."""

import pytest
import torch

import finetune
from mechanisms.errors import UserError
from tests import flag_cases

GROUPS = {
    "optimizer": "optim_args", "schedule": "lr_scheduler_kwargs", "loss": "label_smoothing_factor",
    "memory": "activation_checkpointing_kwargs", "logging": "logging_first_step", "trackers": "run_name",
    "evaluation": "eval_on_start", "checkpoints": "save_only_model", "best checkpoint": "load_best_model_at_end",
    "chance": "data_seed", "determinism": "full_determinism", "data loader": "dataloader_persistent_workers",
    "order": "train_sampling_strategy", "nodes": "log_on_each_node", "DDP": "ddp_bucket_cap_mb",
    "profiling": "skip_memory_metrics", "debugging": "debug"}


@pytest.fixture(scope="module")
def run(make_model, cache_dir, tmp_path_factory):
    return flag_cases.Runner(make_model(), tmp_path_factory.mktemp("runs"), cache_dir)


@pytest.mark.parametrize("name", GROUPS.values(), ids=GROUPS)
def test_a_flag_has_its_effect(run, name):
    assert flag_cases.result_of(run, name, flag_cases.CASES[name]) == (True, "has its effect")


def test_a_flag_without_an_effect_is_seen(run):
    for effect in (flag_cases.other_losses, flag_cases.other_weights, flag_cases.other_rates):
        assert flag_cases.result_of(run, "seed", flag_cases.Case("--seed 42", effect)) == (False, "has no effect")


@pytest.mark.parametrize("words", ["--neftune_noise_alpha 5", "--lr_scheduler_type warmup_stable_decay", "--seed -1"])
def test_a_refusal_comes_before_the_data_are_read(run, words):
    assert words.split()[0] in run.refusal(words)
    assert run.refusal("--seed 1") is None  # the data would be read


@pytest.mark.skipif(torch.cuda.is_available(), reason="they work with a GPU")
@pytest.mark.parametrize("name", flag_cases.REFUSED_HERE)
def test_flags_that_need_a_gpu_or_ranks_are_refused_without(run, name):
    words = flag_cases.REFUSED_HERE[name]
    assert words.split()[0] in run.refusal(words)


def test_fewer_samples_than_a_batch_are_never_all_dropped(run, monkeypatch):
    monkeypatch.setattr(finetune, "load_weights", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"--dataloader_drop_last drops all \d+ items"):
        run("--dataloader_drop_last --per_device_train_batch_size 1000")


@pytest.mark.parametrize("method", ["", "--use_lora --lora_dropout 0"])
def test_a_smoothed_loss_is_the_same_with_and_without_all_logits(run, method, monkeypatch):
    """With an adapter on the output layer, the logits of the labelled positions are all there."""
    words = f"--label_smoothing_factor 0.2 --learning_rate 0 {method}"
    here = run(words)
    monkeypatch.setattr("mechanisms.trainer.output_linear", lambda model: None)
    full = run(words)
    assert full.trainer.head_loss is None and here.trainer.head_loss is not None
    assert full.logged("loss") == pytest.approx(here.logged("loss"), rel=1e-5)
    assert full.logged("grad_norm") == pytest.approx(here.logged("grad_norm"), rel=1e-4)
    assert full.logged("loss") != pytest.approx(run.plain.logged("loss"), rel=1e-3)
