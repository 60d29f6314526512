"""The report of a run on two ranks: all answer together, the first one writes, and the numbers are those of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms.flags import prepare_command_line

ROOT = Path(finetune.__file__).parent
DATA = [EXAMPLES / "data" / "messages.jsonl", EXAMPLES / "data" / "conversations.json"]


@pytest.fixture(scope="module")
def flags(make_model, cache_dir, tmp_path_factory):
    """Of a run that learns nothing, so that its evaluation is that of the model as it was."""
    questions = tmp_path_factory.mktemp("questions") / "questions.txt"
    questions.write_text("Who are you?\n你是谁？\n", encoding="utf-8")
    return [str(word) for word in (
        "--model_name_or_path", make_model(), "--data_path", DATA[0], "--eval_data_path", *DATA, "--cache_dir",
        cache_dir, "--max_steps", 1, "--save_strategy", "no", "--learning_rate", 0, "--per_device_train_batch_size", 2,
        "--per_device_eval_batch_size", 5, "--model_max_length", 256, "--sample_prompts", questions)]


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    finetune.train(prepare_command_line(finetune.__file__, [*flags, "--output_dir", str(out)]))
    return shown(out)


def shown(out):
    """(answers of each round, hardest records, losses of each file) of the metrics in a folder."""
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluated = [entry for entry in history if "eval_loss" in entry][-1]
    return ([entry["answers"] for entry in history if "answers" in entry], evaluated["hardest"],
            [evaluated[f"eval_loss_{path.name}"] for path in DATA])


@pytest.mark.parametrize("strategy", [[], ["--deepspeed", "ds_config_zero3.json"]], ids=["DDP", "ZeRO-3"])
def test_two_ranks_show_what_one_shows(flags, alone, tmp_path, strategy):
    out = tmp_path / "out"
    run = subprocess.run([sys.executable, str(ROOT / "mechanisms/torchrun.py"), "--nproc_per_node", "2",
                          str(ROOT / "finetune.py"), *flags, "--output_dir", str(out), *strategy],
                         capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    answers, hardest, losses = shown(out)
    assert len(answers) == 2 and answers == alone[0]
    assert losses == pytest.approx(alone[2], rel=1e-4)
    assert [record["loss"] for record in hardest] == pytest.approx([record["loss"] for record in alone[1]], rel=1e-4)
    assert {record["place"] for record in hardest} == {record["place"] for record in alone[1]}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.endswith("</html>\n") and ("ZeRO-3" if strategy else "DDP") in page
    assert not list(out.glob("*.unfinished"))
