"""Flags that would not do what they say are refused by name, all at once, before the data are read."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import refusals, trials
from mechanisms.declarations import PUBLIC, read_flags
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line
from tests import flag_cases

FLAGS = {flag.name: flag for group in read_flags(finetune.__file__).values() for flag in group}
EVALUATED = "--eval_ratio 0.1 --eval_strategy epoch"


def parse(words):
    argv = ["--data_path", str(EXAMPLES / "data"), *words.split()]
    return finetune.parse_arguments(prepare_command_line(finetune.__file__, argv))[2]


def problems(words):
    with pytest.raises(UserError) as error:
        parse(words)
    return str(error.value).split("\n       ")


# -- the tables -------------------------------------------------------------------------------------------------------

def test_tables_name_flags_and_values_that_there_are():
    fields = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    for row in refusals.REFUSED:
        for name in row.flags.split():
            assert name in fields and not row.why.endswith(".")
            assert not FLAGS[name].choices or set(row.values) <= set(FLAGS[name].choices), name
    limited = [name for *_, names in refusals.LIMITS for name in names.split()]
    assert all(FLAGS[name].type in ("int", "float") for name in limited)
    for name, needed in refusals.NEEDS.items():
        for words in needed:
            flag, _, value = words.removeprefix("--").partition(" ")
            flag = FLAGS[{public: field for field, public in PUBLIC.items()}.get(flag, flag)]
            assert name in FLAGS and (not flag.choices or not value or value in flag.choices)


@pytest.mark.parametrize("row", refusals.REFUSED, ids=lambda row: row.flags.split()[0])
def test_each_refused_value_is_named_with_the_reason(row):
    for name, value, words in flag_cases.refused_values([row]):
        assert problems(words) == [f"--{name} {value}: {row.why}" if row.values else f"--{name}: {row.why}"]


def test_what_is_refused_may_be_given_with_its_default():
    words = [f"--{name} {FLAGS[name].default}" for row in refusals.REFUSED if row.values == refusals.OTHERS
             for name in row.flags.split() if FLAGS[name].default is not None]
    assert len(words) > 10
    parse(" ".join(words) + " --do_train --greater_is_better False --max_steps -1 --report_to none")


def test_a_flag_without_a_value_and_one_with_no_in_front_are_values_too():
    assert problems("--torch_compile")[0].startswith("--torch_compile: the network is not tested compiled")
    assert problems("--no_average_tokens_across_devices")[0].startswith("--no_average_tokens_across_devices: the loss")
    assert problems("--do_train no")[0].startswith("--do_train False: finetune.py always trains")


def test_a_refusal_may_depend_on_another_flag():
    parse("--do_eval False")
    assert problems("--do_eval False --eval_ratio 0.1")[0].startswith("--do_eval False: evaluated is")


def test_the_last_value_counts():
    parse("--torch_compile True --torch_compile False --seed -1 --seed 1")


def test_a_token_is_not_repeated():
    assert "hf_secret" not in problems("--hub_token hf_secret")[0]


@pytest.mark.parametrize("words, line", [
    ("--seed -1", "--seed -1: at least 0"), ("--seed 4294967296", "--seed 4294967296: below 4,294,967,296"),
    ("--data_seed -1", "--data_seed -1: at least 0"), ("--num_train_epochs 0", "--num_train_epochs 0: more than 0"),
    ("--adam_beta2 1", "--adam_beta2 1: below 1"), ("--save_total_limit 0", "--save_total_limit 0: at least 1"),
    ("--learning_rate nan", "--learning_rate takes a number, not 'nan'"),
    ("--learning_rate inf", "--learning_rate takes a number, not 'inf'"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0: at least 1"),
    ("--lora_r 0 --use_lora", "--lora_r 0: at least 1"), ("--model_max_length 0", "--model_max_length 0: at least 1"),
    ("--lr_scheduler_kwargs {bad", """--lr_scheduler_kwargs takes JSON such as {"key": 1}, not '{bad'"""),
    ("--lr_scheduler_kwargs bad", """--lr_scheduler_kwargs takes JSON such as {"key": 1}, not 'bad'"""),
    ("--do_eval", "--do_eval has no effect without --eval_data_path or --eval_ratio"),
    ("--eval_on_start", "--eval_on_start has no effect without --eval_data_path or --eval_ratio"),
    (f"{EVALUATED} --eval_steps 3", "--eval_steps has no effect without --eval_strategy steps"),
    ("--run_name x", "--run_name has no effect without --report_to"),
    ("--metric_for_best_model loss", "--metric_for_best_model has no effect without --eval_strategy"),
    ("--dataloader_persistent_workers",
     "--dataloader_persistent_workers has no effect without --dataloader_num_workers"),
    ('--gradient_checkpointing_kwargs {"every_n_layers":2}',
     "--gradient_checkpointing_kwargs has no effect without --gradient_checkpointing True"),
])
def test_numbers_and_flags_that_need_others(words, line):
    assert problems(words) == [line]


def test_a_config_file_is_checked_as_well(tmp_path):
    (tmp_path / "run.yaml").write_text("torch_compile: true\nseed: -1\n")
    with pytest.raises(UserError) as error:
        prepare_command_line(finetune.__file__, [str(tmp_path / "run.yaml"), "--data_path", str(EXAMPLES / "data")])
    first, second = str(error.value).split("\n       ")
    assert first.startswith(f"{tmp_path}/run.yaml: torch_compile: the network is not")
    assert second == f"{tmp_path}/run.yaml: seed -1: at least 0"


# -- what only trying shows -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words, part", [
    ("--lr_scheduler_type warmup_stable_decay", "missing 1 required positional argument: 'num_decay_steps'. What it "
                                                "needs stands in --lr_scheduler_kwargs, as JSON"),
    ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
    ("--lr_scheduler_type cosine_warmup_with_min_lr", "One of min_lr or min_lr_rate should be set"),
    ("--lr_scheduler_type reduce_lr_on_plateau", "requires an eval strategy"),
    ("--lr_scheduler_type greedy", "requires an eval strategy"),
    ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}', """--lr_scheduler_kwargs '{"cycles": 2}': """),
    ('--lr_scheduler_type constant --lr_scheduler_kwargs {"num_cycles":2}',
     "--lr_scheduler_kwargs has no effect with --lr_scheduler_type constant"),
    ("--optim adamw_torch --optim_args momentum=0.9", "--optim_args momentum=0.9: --optim adamw_torch does not take"),
    ("--optim sgd --optim_args momentum", "--optim_args momentum: write name=value"),
    ("--optim sgd --optim_args momentum=x", "--optim sgd --optim_args momentum=x: could not convert"),
    ("--report_to loglog", "--report_to loglog: no such tracker. There are azure_ml"),
    (f"{EVALUATED} --metric_for_best_model accuracy", "--metric_for_best_model accuracy: an evaluation gives the loss"),
    (f"{EVALUATED} --load_best_model_at_end", "--load_best_model_at_end requires the save and eval strategy to match"),
    ("--save_strategy best", "--save_strategy best needs --eval_strategy"),
    ("--local_rank 3", "--local_rank 3: torchrun says it"),
    ("--ddp_backend gloo", "--ddp_backend gloo has no effect in a single process"),
    ('--gradient_checkpointing --gradient_checkpointing_kwargs {"a":1}', "got an unexpected keyword argument 'a'"),
])
def test_what_training_would_end_with_is_found_before(words, part):
    [line] = problems(words)
    assert part in line and line.startswith("--")


@pytest.mark.parametrize("words", [
    'warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":3}',
    'cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.1}',
    'cosine_warmup_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.1}',
    f'reduce_lr_on_plateau {EVALUATED} --lr_scheduler_kwargs {{"patience":1}}', f"greedy {EVALUATED}",
    'cosine_with_restarts --lr_scheduler_kwargs {"num_cycles":2}', "polynomial", "inverse_sqrt",
    "constant_with_warmup --warmup_steps 2"])
def test_schedules_with_what_they_need(words):
    assert not trials.without_effect(parse(f"--lr_scheduler_type {words}"))


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow", "trackio", "flyte"])
def test_a_tracker_that_is_not_installed(tracker, monkeypatch):
    monkeypatch.setattr(trials, "get_available_reporting_integrations", lambda: [])
    assert problems(f"--report_to {tracker}") == [
        f"--report_to {tracker}: its package is not installed: pip install {tracker}"]
    monkeypatch.setattr(trials, "get_available_reporting_integrations", lambda: [tracker])
    monkeypatch.setenv("WANDB_MODE", "offline")
    parse(f"--report_to {tracker} --run_name x")


def test_the_local_rank_that_a_launcher_gives_is_taken(monkeypatch):
    args = parse("")
    args.local_rank = 3
    assert trials.failing(args)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert not trials.failing(args)


def test_an_optimizer_that_fails_here_is_refused_whatever_it_says(monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel image is available\nfor execution")

    monkeypatch.setattr(trials.Trainer, "get_optimizer_cls_and_kwargs", fail)
    assert problems("--optim paged_adamw_8bit") == ["--optim paged_adamw_8bit: no kernel image is available"]


@pytest.mark.parametrize("words, expected", [
    ("--optim sgd --adam_beta2 0.95", ["--adam_beta2 has no effect with --optim sgd"]),
    ("--optim lion_32bit --adam_beta2 0.95 --adam_epsilon 1e-6",
     ["--adam_epsilon has no effect with --optim lion_32bit"]),
    ("--adam_beta2 0.95 --adam_epsilon 1e-6", []),
    ("--lr_scheduler_type constant --warmup_steps 3",
     ["--warmup_steps has no effect with --lr_scheduler_type constant"]),
    ("--lr_scheduler_type constant", []),
])
def test_flags_that_the_optimizer_or_schedule_does_not_use_are_said(words, expected):
    assert trials.without_effect(parse(words)) == expected


def test_the_optimizer_and_scheduler_of_a_deepspeed_config_are_not_tried_here():
    args = parse("--optim sgd --adam_beta2 0.95 --lr_scheduler_type constant --warmup_steps 3")
    args.optim_args, args.lr_scheduler_kwargs = "wrong=1", {"wrong": 1}
    assert len(trials.failing(args)) == len(trials.without_effect(args)) == 2
    args.deepspeed, args.hf_deepspeed_config = "own.json", SimpleNamespace(config={"optimizer": {}, "scheduler": {}})
    assert trials.failing(args) == trials.without_effect(args) == []


def test_everything_that_is_wrong_with_the_arguments_is_named_at_once():
    found = problems("--fp16 --eval_strategy epoch --load_best_model_at_end --tf32 True --use_liger_kernel --lora_r 3 "
                     "--lr_scheduler_type cosine_with_min_lr --report_to loglog --packing --lazy_preprocess")
    for part in ("--fp16 needs a GPU", "--load_best_model_at_end requires", "--tf32 requires", "--use_liger_kernel "
                 "needs a GPU", "--lora_r has no effect", "min_lr", "--report_to loglog", "--packing and",
                 "--eval_strategy epoch needs --eval_data_path"):
        assert sum(part in line for line in found) == 1, part
    assert len(found) == 9


def test_save_strategy_best_keeps_the_lowest_loss():
    args = parse(f"{EVALUATED} --save_strategy best")
    assert args.metric_for_best_model == "loss" and args.greater_is_better is False


# -- every flag -------------------------------------------------------------------------------------------------------

def test_every_flag_of_transformers_has_a_case_or_is_refused():
    """A flag that a new transformers brings has to be looked at: does it work here?"""
    known = [*flag_cases.CASES, *flag_cases.REFUSED_HERE, *flag_cases.ELSEWHERE, *refusals.never_taken(),
             *PUBLIC.values()]
    assert sorted(known) == sorted(flag_cases.FIELDS)


def test_cases_give_the_flag_another_value_than_its_default():
    for name, case in flag_cases.CASES.items():
        if name != "output_dir":
            assert f"--{name}" in case.words or f"--{PUBLIC.get(name)}" in case.words or f"--no_{name}" in case.words
        assert FLAGS[name].default in (None, "") or f" --{name} {FLAGS[name].default} " not in f" {case.words} "
    for name, file in flag_cases.ELSEWHERE.items():
        assert f'"--{name}"' in (Path(finetune.__file__).parent / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("tracker, netrc", [("wandb", ".netrc"), ("swanlab", ".swanlab/.netrc")])
def test_a_tracker_without_a_login(tracker, netrc, tmp_path, monkeypatch):
    """It would ask for one, or fail, after the model is loaded."""
    key, mode = f"{tracker.upper()}_API_KEY", f"{tracker.upper()}_MODE"
    monkeypatch.setattr(trials, "get_available_reporting_integrations", lambda: [tracker])
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (key, mode):
        monkeypatch.delenv(name, raising=False)
    [problem] = problems(f"--report_to {tracker}")
    assert f"--report_to {tracker}: nobody is logged in: {tracker} login, or {key}=" in problem and mode in problem
    for name, value in ((key, "secret"), (mode, "offline")):
        with monkeypatch.context() as here:
            here.setenv(name, value)
            parse(f"--report_to {tracker}")
    (tmp_path / netrc).parent.mkdir(exist_ok=True)
    (tmp_path / netrc).write_text(f"machine api.{tracker}.{'ai' if tracker == 'wandb' else 'cn'} login user password x")
    parse(f"--report_to {tracker}")
