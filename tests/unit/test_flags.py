"""What `prepare_command_line` makes of a command line, and `--help`, both without importing torch."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from transformers.debug_utils import DebugOption
from transformers.hf_argparser import string_to_bool

import chat
import finetune
import merge_lora
import run_gptq
from examples.make_tiny_model import EXAMPLES
from mechanisms import declarations, hints
from mechanisms.errors import UserError
from mechanisms.flags import BOOLEANS, RENAMED, make_parser, prepare_command_line
from mechanisms.paths import source_name
from mechanisms.tokenizer import is_base_model

ROOT = Path(finetune.__file__).parent
DATA = str(EXAMPLES / "data")
PROGRAMS = {
    finetune: (finetune.ModelArguments, finetune.DataArguments, finetune.TrainingArguments, finetune.LoraArguments),
    chat: (chat.ChatArguments, chat.SamplingArguments), merge_lora: (merge_lora.MergeArguments,),
    run_gptq: (run_gptq.QuantizeArguments,)}
IN_EVERY_README_COMMAND = (
    "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps",
    "lr_scheduler_type", "save_steps", "save_total_limit", "eval_strategy", "deepspeed")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def prepare(*argv, data=("--data_path", DATA), program=finetune):
    return prepare_command_line(program.__file__, [*map(str, argv), *data])


def error(*argv, **options):
    with pytest.raises(UserError) as caught:
        prepare(*argv, **options)
    return str(caught.value)


def names(program):
    """{name that a user may write} of a program's flags."""
    flags = {flag.name for group in declarations.read_flags(program.__file__).values() for flag in group}
    return flags | (RENAMED.keys() | set(declarations.PUBLIC.values()) if program is finetune else set())


# -- what the fields say ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_flags_are_read_as_the_parser_makes_them(program):
    read = {flag.name: flag for group in declarations.read_flags(program.__file__).values() for flag in group}
    types = {"int": int, "float": float, "bool": string_to_bool}
    made = {action.option_strings[0].removeprefix("--"): action for action in make_parser(PROGRAMS[program])._actions}
    assert made.keys() - read.keys() == {"-h", *(declarations.PUBLIC.values() if program is finetune else ())}
    assert read.keys() <= made.keys() and len(read) > 5
    for name, flag in read.items():
        action = made[name]
        assert flag.nargs == action.nargs and flag.required >= action.required, name
        choices = DebugOption if action.type is DebugOption else action.choices or ()
        if not name.startswith("log_level"):  # transformers computes theirs
            assert list(flag.choices) == [getattr(choice, "value", choice) for choice in choices], name
        if not choices and flag.nargs != 0:
            assert types.get(flag.type) == (action.type if action.type in types.values() else None), name


def test_words_for_true_and_false_are_those_of_the_parser():
    assert [string_to_bool(word) for word in BOOLEANS] == [True] * 5 + [False] * 5
    for word in ("on", "off", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            string_to_bool(word)
        assert f"--use_lora takes True or False, not {word!r}" in error("--use_lora", word)


def test_trainers_flags_that_are_declared_for_their_help_are_those_of_transformers():
    own, theirs = ({field.name: field for field in dataclasses.fields(cls)}
                   for cls in (finetune.TrainingArguments, transformers.TrainingArguments))
    hints_of_types = finetune.TrainingArguments.__annotations__, transformers.TrainingArguments.__annotations__
    for name in IN_EVERY_README_COMMAND:
        assert hints_of_types[0][name] == hints_of_types[1][name], name
        assert own[name].default == theirs[name].default, name
        assert own[name].metadata["help"] != theirs[name].metadata["help"]


def test_torch_is_not_imported_for_any_of_this(tmp_path):
    code = ("import sys\nfrom mechanisms.errors import UserError\nfrom mechanisms.flags import prepare_command_line\n"
            "try:\n    prepare_command_line('finetune.py', sys.argv[1:])\nexcept UserError as error: print(error)\n"
            "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()")
    start = time.time()
    done = subprocess.run([sys.executable, "-c", code, "--data_path", "nowhere.json", "--lora_r", "x", "--lr", "1"],
                          cwd=ROOT, capture_output=True, text=True)
    assert time.time() - start < 2
    assert done.returncode == 0, done.stderr
    for part in ("no such file, folder or match: nowhere.json", "--lora_r takes a whole number", "--lr: write"):
        assert part in done.stdout


def test_a_python_without_transformers_is_told_so(monkeypatch):
    declarations.read_flags.cache_clear()
    monkeypatch.setattr(declarations.importlib.util, "find_spec", lambda name: None)
    assert "transformers is not installed for" in error()


# -- help -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shown():
    """shown[program]: its help without a terminal."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return {program: subprocess.run([sys.executable, program.__file__, "--help"], env=environment, capture_output=True,
                                    text=True, check=True).stdout for program in PROGRAMS}


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_help_fits_into_80_columns_and_shows_every_flag_with_its_value(program, shown):
    assert max(map(len, shown[program].splitlines())) <= 80
    for cls in PROGRAMS[program]:
        for field in dataclasses.fields(cls):
            name = declarations.PUBLIC.get(field.name, field.name)
            if field.metadata.get("hidden") or name in declarations.PUBLIC:
                assert name not in shown[program]
            elif field.name in cls.__annotations__:
                assert f"\n  --{name} " in shown[program], name
            else:
                assert name in shown[program], name


@pytest.mark.parametrize("program, line", [
    (finetune, "  --data_path PATH ...\n        Training data: files"), (finetune, "also packed. (required)"),
    (finetune, "  --loss_on assistant|last|all\n"), (finetune, "  --use_lora [True|False]\n"),
    (finetune, "  --gradient_checkpointing [True|False|auto]\n"), (finetune, "  --eval_strategy no|steps|epoch\n"),
    (finetune, "cosine_with_restarts, polynomial"), (finetune, "  --learning_rate FLOAT\n"),
    (finetune, "(default: 5e-05)"), (finetune, "gradient_checkpointing_kwargs"),
    (run_gptq, "  --out_path TEXT\n        Folder to make. It must not exist, or be empty. (required)"),
    (merge_lora, "  --dtype auto|float32|bfloat16|float16\n")])
def test_help_says(program, line, shown):
    assert line in shown[program]


def test_commands_in_help_are_broken_so_that_a_shell_reads_them(shown):
    text = shown[finetune].replace("\\\n", " ")
    assert " ".join(text.split()).count("python finetune.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --data_path "
                                        "chats.jsonl --output_dir out") == 2


def test_what_has_no_effect_is_hidden_and_still_read():
    hidden = [field.name for cls in PROGRAMS[finetune] for field in dataclasses.fields(cls)
              if field.metadata.get("hidden")]
    assert {"remove_unused_columns", "logging_nan_inf_filter", "include_num_input_tokens_seen"} <= set(hidden)
    assert prepare("--remove_unused_columns", "False")[:2] == ["--remove_unused_columns", "False"]


# -- names of other programs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("program, given, expected", [
    (finetune, "batch_size", "write --per_device_train_batch_size"), (finetune, "lr", "write --learning_rate"),
    (finetune, "epochs", "write --num_train_epochs"), (finetune, "lora_rank", "write --lora_r"),
    (finetune, "lora_dropout_p", "write --lora_dropout"), (finetune, "dataset", "write --data_path FILE"),
    (finetune, "train-file", "write --data_path FILE"), (finetune, "cutoff_len", "write --model_max_length"),
    (finetune, "max_seq_length", "write --model_max_length"), (finetune, "output", "write --output_dir"),
    (finetune, "micro_batch_size", "write --per_device_train_batch_size"), (finetune, "model", "write --model_name_or"),
    (finetune, "per_gpu_train_batch_size", "write --per_device_train_batch_size"),
    (finetune, "load_in_4bit", "write --q_lora"), (finetune, "bits", "write --q_lora"),
    (finetune, "finetuning_type", "write --use_lora, --q_lora, or none"), (finetune, "val_size", "write --eval_ratio"),
    (finetune, "template", "leave it out, the model's own"), (finetune, "config", "give the file alone"),
    (finetune, "use_flash_attn", "leave it out"), (finetune, "overwrite_output_dir", "leave it out"),
    (run_gptq, "max_length", "write --max_len"), (run_gptq, "wbits", "write --bits"),
    (run_gptq, "output_dir", "write --out_path"), (chat, "max_length", "write --max_new_tokens"),
    (merge_lora, "adapter_name_or_path", "write --adapter_path"),
])
def test_a_name_of_another_program_is_translated(program, given, expected):
    assert f"unknown flag --{given}: {expected}" in error(f"--{given}", "1", program=program, data=())


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_hints_name_flags_of_the_program_at_hand_only(program):
    known = names(program)
    every_name = " ".join([*hints.FLAGS.values(), *hints.NO_FLAG.values()]).split()
    for name in every_name:
        hint = hints.what_to_write(name, known, trains=program is finetune)
        assert not hint or hints.flags_in(hint) <= known
        assert program is finetune or not hint or hint.startswith("write --")
    assert program is not finetune or sum(bool(hints.what_to_write(name, known, True)) for name in every_name) > 150


def test_every_row_of_hints_is_used():
    for text, others in hints.FLAGS.items():
        programs = [program for program in PROGRAMS if hints.flags_in(text) <= names(program)]
        assert programs and hints.flags_in(text), text
        for name in others.split():
            assert any(hints.what_to_write(name, names(program), program is finetune) == f"write {text}"
                       and name not in names(program) for program in programs), (text, name)
    for text, others in hints.NO_FLAG.items():
        assert not hints.flags_in(text)
        for name in others.split():
            assert hints.what_to_write(name, names(finetune), True) == text and name not in names(finetune), name


def test_the_nearest_name_is_guessed_among_those_that_help_shows():
    assert "--gradient_checkpoint (did you mean --gradient_checkpointing?)" in error("--gradient_checkpoint")
    assert "unknown flag --topk (did you mean --top_k?)" in error("model", "--topk", "1", program=chat, data=())
    assert error("--remove_unused_colum").startswith("unknown flag --remove_unused_colum\n")


@pytest.mark.parametrize("word", ["-data_path", "—data_path", "–-data-path", "---data_path"])
def test_flags_with_other_dashes(word):
    assert error(word, DATA, data=()) == (f"unknown flag {word}: write --data_path\n"
                                          "       All flags: python finetune.py --help")


def test_no_is_a_prefix_where_the_parser_has_one():
    assert prepare("--no_dataloader_pin_memory")[0] == "--no_dataloader_pin_memory"
    assert "unknown flag --no_use_lora" in error("--no_use_lora")
    assert "--no_dataloader_pin_memory takes no value, not ['x']" in error("--no_dataloader_pin_memory=x")


# -- config files -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, expected", [
    (["--learning_rate", "1e-4", "run.yaml"], ["--lora_r", "8", "--learning_rate", "1e-4"]),
    (["--use_lora", "run.yaml"], ["--lora_r", "8", "--use_lora"]),
    (["--gradient-checkpointing", "run.yaml", "--seed=1"],
     ["--lora_r", "8", "--activation_checkpointing", "--seed", "1"]),
    (["--lora_r", "16", "run.yaml", "more.json"], ["--lora_r", "8", "--seed", "3", "--lora_r", "16"]),
    (["--system", "run.yaml"], ["--system", "run.yaml"]),
    (["--deepspeed", "ds.json"], ["--deepspeed", "ds.json"]),
])
def test_a_config_file_stands_anywhere_but_as_the_value_of_a_flag(argv, expected):
    Path("run.yaml").write_text("lora_r: 8")
    Path("more.json").write_text('{"seed": 3}')
    Path("ds.json").write_text("{}")
    assert prepare(*argv) == [*expected, "--data_path", DATA]


def test_values_of_a_config_file(monkeypatch):
    monkeypatch.setenv("RATE", "1e-5")
    Path("run.yaml").write_text(
        "learning-rate: ${RATE}\neval_strategy: no\nweight_decay: 1e-2\noutput_dir: out-${RATE}-$RATE\ncache_dir:\n"
        "lr_scheduler_kwargs: &more {seed: 7, name: '${RATE}'}\nsystem: --odd\nmax_steps: -1\nlora_bias: NONE\n")
    assert prepare("run.yaml") == [
        "--learning_rate", "1e-5", "--eval_strategy", "no", "--weight_decay", "1e-2", "--output_dir", "out-1e-5-$RATE",
        "--lr_scheduler_kwargs", '{"seed": 7, "name": "1e-5"}', "--system=--odd", "--max_steps=-1", "--lora_bias",
        "none", "--data_path", DATA]


def test_yaml_that_merges_a_mapping_into_another():
    Path("run.yaml").write_text("lr_scheduler_kwargs: &more {seed: 7}\n<<: *more\nlora_r: 08\n")
    assert prepare("run.yaml") == ["--seed", "7", "--lr_scheduler_kwargs", '{"seed": 7}', "--lora_r", "08",
                                   "--data_path", DATA]


def test_all_mistakes_of_a_config_file_are_named_with_the_file(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    Path("run.yaml").write_text("learning_rate: fast\noutput_dir: ${NOT_SET}/out\neval_strategy: [no, steps]\nlr: 1\n"
                                "lora_target_modules: []\neval_data_path: ${NOT_SET}\n")
    assert error("run.yaml") == (
        "run.yaml: unknown flag lr: write --learning_rate\n"
        "       run.yaml: learning_rate takes a number, not 'fast'\n"
        "       run.yaml: output_dir: the environment variable NOT_SET is not set\n"
        "       run.yaml: eval_strategy takes one value, not ['no', 'steps']\n"
        "       run.yaml: lora_target_modules takes a value, and none is given\n"
        "       run.yaml: eval_data_path: the environment variable NOT_SET is not set\n"
        "       All flags: python finetune.py --help")


def test_a_variable_is_replaced_in_files_only():
    assert prepare("--system", "${NOT_SET}")[:2] == ["--system", "${NOT_SET}"]


@pytest.mark.parametrize("name, content, message", [
    ("run.yaml", "名: 值".encode("gb18030"), "run.yaml: not UTF-8"), ("run.json", b"{", "run.json: not valid JSON"),
    ("run.json", b"[1]", "run.json: a config file is a mapping"), ("run.yml", b"", "a config file is a mapping")])
def test_files_that_are_no_config(name, content, message):
    Path(name).write_bytes(content)
    assert message in error(name)


def test_a_config_of_llama_factory():
    """One line for each key that has another name here, and nothing about the others."""
    Path("lf.yaml").write_text("""
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: qwen
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/qwen
logging_steps: 10
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
learning_rate: 1.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
""")
    lines = error("lf.yaml", data=()).split("\n")[:-1]
    named = [line.partition("unknown flag ")[2].partition(": ")[0] for line in lines]
    assert named == ["trust_remote_code", "stage", "finetuning_type", "lora_rank", "lora_target", "dataset", "template",
                     "cutoff_len", "max_samples", "overwrite_cache", "preprocessing_num_workers", "plot_loss",
                     "overwrite_output_dir", "val_size"]
    assert all("write --" in line or "leave it out" in line or "give a file" in line for line in lines)


# -- lists, values and inputs -----------------------------------------------------------------------------------------

def test_lists_may_be_written_with_commas():
    for name in ("a.jsonl", "b.jsonl", "c,d.jsonl", "e,1.jsonl"):
        Path(name).touch()
    assert prepare("--data_path", "a.jsonl,b.jsonl", "c,d.jsonl", "e,*.jsonl", data=()) == [
        "--data_path", "a.jsonl", "b.jsonl", "c,d.jsonl", "e,*.jsonl"]
    assert prepare("--lora_target_modules=q_proj, v_proj,")[:3] == ["--lora_target_modules", "q_proj", "v_proj"]
    Path("run.yaml").write_text("data_path: a.jsonl,b.jsonl\neval_data_path:\n- c,d.jsonl\n- a.jsonl\nsystem: x,y\n")
    assert prepare("run.yaml", data=()) == ["--data_path", "a.jsonl", "b.jsonl", "--eval_data_path", "c,d.jsonl",
                                            "a.jsonl", "--system", "x,y"]
    assert "no such file, folder or match: x.jsonl" in error("--data_path", "a.jsonl,x.jsonl", data=())


def test_all_wrong_values_are_named_with_what_the_flag_takes():
    wrong = {"--learning_rate": "1e-5x", "--num_train_epochs": "many", "--lora_r": "1.5", "--use-lora": "maybe",
             "--loss_on": "asistant", "--lr_scheduler_type": "cosin", "--gradient_checkpointing": "sometimes",
             "--save_total_limit": "all", "--debug": "everything"}
    lines = error(*(word for pair in wrong.items() for word in pair)).split("\n       ")
    for (flag, value), takes, line in zip(wrong.items(), (
            "a number", "a number", "a whole number", "True or False", "assistant, last or all", "linear, cosine",
            "True, False or auto", "a whole number", "underflow_overflow or tpu_metrics_debug"), lines, strict=True):
        assert line.startswith(f"{flag} takes {takes}") and f"not {value!r}" in line
    assert "(did you mean assistant?)" in lines[4] and "(did you mean cosine?)" in lines[5]


@pytest.mark.parametrize("argv, message", [
    (["--learning_rate"], "--learning_rate takes a number, and none is given"),
    (["--learning_rate", "--use_lora"], "--learning_rate takes a number, and none is given"),
    (["--data_path"], "--data_path takes a value, and none is given"),
    (["--eval_strategy", "no", "steps"], "unexpected argument 'steps'"),
    (["--use_lora", "True", " "], "unexpected argument ' '"),
    (["--seed", "1", "x.jsonl"], "unexpected argument 'x.jsonl'"),
])
def test_too_few_and_too_many_words(argv, message):
    assert message in error(*argv)


def test_values_that_begin_with_a_dash():
    assert prepare("--max_steps", "-1", "--system", "-- who?", "--cache_dir=-x=1") == [
        "--max_steps=-1", "--system=-- who?", "--cache_dir=-x=1", "--data_path", DATA]
    assert prepare("folder", "--message", "-- who are you?", program=chat, data=()) == [
        "folder", "--message=-- who are you?"]


def test_choices_in_another_case_are_understood():
    assert prepare("--loss_on", "Last", "--gradient_checkpointing", "true")[:4] == [
        "--loss_on", "last", "--activation_checkpointing", "True"]


@pytest.mark.parametrize("argv, message", [
    (["--data_path", "nowhere.json", "no/*.json"], "--data_path: no such file, folder or match: nowhere.json\n"
                                                   "       --data_path: no such file, folder or match: no/*.json"),
    (["--data_path", "empty"], "--data_path: no data file (.jsonl, .json, .csv, .tsv, .parquet or .arrow) in the "
                               "folder empty"),
    (["--eval_data_path", "none.json"], "--eval_data_path: no such file, folder or match: none.json"),
    (["--model_name_or_path", "no/where/at/all"], "--model_name_or_path no/where/at/all: no such folder"),
    (["--lora_weight_path", "nowhere"], "--lora_weight_path nowhere: no such folder"),
    (["--deepspeed", "none.json"], "--deepspeed none.json: no such file"),
    (["--resume_from_checkpoint", "checkpoint-5"], "--resume_from_checkpoint checkpoint-5: no such folder"),
    (["run.yaml"], "run.yaml: model_name_or_path nowhere: no such folder"),
])
def test_inputs_that_are_not_there(argv, message):
    Path("empty").mkdir()
    Path("run.yaml").write_text("model_name_or_path: nowhere")
    assert error(*argv, data=("--data_path", DATA) if "--data_path" not in argv else ()) == message


@pytest.mark.parametrize("config, wrong", [
    ({" zero_optimization": {"stage": 2}}, {" zero_optimization": "zero_optimization"}),
    ({"zero_optimisation": {"stage": 2}, "fp16 ": {}}, {"fp16 ": "fp16", "zero_optimisation": "zero_optimization"}),
    ({"zero_optimization": {"stage": 2, "offload_optimiser": {}}}, {"offload_optimiser": "offload_optimizer"})])
def test_a_misspelt_key_of_a_deepspeed_config_is_named(config, wrong):
    """As in a tutorial that many follow: DeepSpeed ignores such a key, and nothing is shared among the GPUs."""
    Path("ds.json").write_text(json.dumps(config))
    assert error("--deepspeed", "ds.json") == "--deepspeed ds.json: " + "; ".join(
        f'"{key}" is no key of DeepSpeed, which would ignore it: write "{right}"' for key, right in wrong.items())


def test_other_keys_of_a_deepspeed_config_are_its_owners_business(monkeypatch):
    Path("ds.json").write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}, "tensorboard": {}}')
    assert prepare("--deepspeed", "ds.json")
    Path("ds.json").write_text("[1")
    assert error("--deepspeed", "ds.json").startswith("--deepspeed ds.json is no JSON object: ")


def test_inputs_that_are_there_or_may_be():
    Path("adapter").mkdir()
    argv = ["--data_path", DATA, "--eval_data_path", f"{DATA}/*", "--model_name_or_path", "some/name", "--deepspeed",
            "ds_config_zero2.json", "--lora_weight_path", "adapter", "--resume_from_checkpoint", "True"]
    assert prepare(*argv, data=()) == argv
    assert prepare("--deepspeed", "none", "--lora_weight_path", "", "--resume_from_checkpoint", "false")


def test_only_the_value_that_counts_has_to_be_there():
    Path("run.yaml").write_text("data_path: nowhere.json\nmodel_name_or_path: nowhere\n")
    assert prepare("run.yaml", "--model_name_or_path", "some/name")


@pytest.mark.parametrize("program, message", [
    (finetune, "--data_path is missing: which data to train on?"),
    (merge_lora, "--adapter_path is missing\n       --output_dir is missing"),
    (run_gptq, "--model_name_or_path is missing\n       --data_path is missing\n       --out_path is missing")])
def test_what_must_be_given(program, message):
    assert error(data=(), program=program) == message
    assert "missing" not in error("--dataset", "x", data=(), program=program)  # which is the data, perhaps


@pytest.mark.parametrize("program, flag", [
    (finetune, "--model_name_or_path"), (finetune, "--lora_weight_path"), (merge_lora, "--adapter_path"),
    (merge_lora, "--base_model"), (chat, "--base_model"), (chat, None), (run_gptq, "--model_name_or_path")])
def test_the_root_of_a_model_in_the_hubs_cache_is_its_snapshot(program, flag):
    root = Path("hub/models--Qwen--Qwen2.5-0.5B-Instruct").resolve()
    (root / "refs").mkdir(parents=True)
    (root / "refs/main").write_text("7ae557604adf67be50417f59c2c2f167def9a775")
    snapshot = root / "snapshots/7ae557604adf67be50417f59c2c2f167def9a775"
    snapshot.mkdir(parents=True)
    others = {merge_lora: ["--adapter_path", ".", "--output_dir", "out"], run_gptq: ["--out_path", "out"]}
    words = prepare(*others.get(program, []), *filter(None, [flag]), root, program=program,
                    data=() if program in (chat, merge_lora) else ("--data_path", DATA))
    assert str(snapshot) in words and str(root) not in words
    assert source_name(str(snapshot)) == "Qwen/Qwen2.5-0.5B-Instruct"
    assert is_base_model(str(snapshot), None) == (False, "its name holds 'instruct'")


# -- once more --------------------------------------------------------------------------------------------------------

def test_what_is_prepared_stays_as_it_is_and_nothing_is_said_again(capsys):
    Path("run.yaml").write_text("warmup_ratio: 0.1\nlora_target_modules: q_proj,v_proj\nsystem: --x\n")
    Path("a,b.jsonl").touch()
    once = prepare("run.yaml", "--evaluation_strategy=No", "--gradient_checkpointing", "--data_path", "a,b.jsonl",
                   "--gradient-checkpointing-kwargs", '{"use_reentrant": false}', "--no_dataloader_pin_memory", data=())
    assert capsys.readouterr().err == (
        "note: --warmup_ratio is read as --warmup_steps, its name in transformers 5\n"
        "note: --evaluation_strategy is read as --eval_strategy, its name in transformers 5\n")
    assert once == ["--warmup_steps", "0.1", "--lora_target_modules", "q_proj", "v_proj", "--system=--x",
                    "--eval_strategy", "no", "--activation_checkpointing", "--data_path", "a,b.jsonl",
                    "--activation_checkpointing_kwargs", '{"use_reentrant": false}', "--no_dataloader_pin_memory"]
    assert prepare(*once, data=()) == once
    printed = capsys.readouterr()
    assert not printed.out and not printed.err
