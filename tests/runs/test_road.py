"""The road of README's "After training": real commands, and what was learned survives every stop."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs.test_chat import Terminal

ROOT = Path(__file__).resolve().parents[2]
LEARNED = {"Who are you?": "I am Tilo, and I was made for this test.", "你是谁？": "我是蒂洛，为这个测试而生。",
           "Who made you?": "People who count every token.", "What is 6 times 7?": "42, as everybody knows."}
LEARNED_LATER = {"Where do you live?": "In two layers, next to the embeddings."}
TRAINING = ["--model_max_length", 512, "--max_steps", 50, "--per_device_train_batch_size", 5, "--learning_rate", "1e-2",
            "--lr_scheduler_type", "cosine", "--warmup_steps", 0.1, "--lora_r", 16, "--lora_alpha", 32,
            "--lora_dropout", 0, "--save_strategy", "no"]


@pytest.fixture
def command(tmp_path):
    """command(script, *flags) -> Popen, in tmp_path; its output goes to a file."""
    started = []

    def start(script, *flags):
        with open(tmp_path / f"output-{len(started)}", "w") as output:
            started.append(subprocess.Popen(
                [sys.executable, ROOT / script, *map(str, flags)], cwd=tmp_path, stdout=output,
                stderr=subprocess.STDOUT, env=os.environ | {"HF_HOME": str(tmp_path / "cache")}))
        started[-1].output = tmp_path / output.name
        return started[-1]

    yield start
    for process in started:
        process.kill()


def done(process, code=0):
    """What the command has said, when it has ended."""
    assert process.wait(300) == code, process.output.read_text()
    return process.output.read_text()


def answers(tmp_path, folder, questions):
    """{question: answer} of one conversation with chat.py on a terminal, each question asked afresh."""
    terminal = Terminal(folder, "--do_sample", "False", folder=tmp_path)
    terminal.until("\n> ")
    said = {}
    for question in questions:
        said[question] = terminal.ask(question)
        terminal.ask("/reset")
    terminal.type("\x04")
    assert os.waitpid(terminal.process, 0)[1] == 0
    return said


def write_data(path, answers):
    path.write_text("\n".join(json.dumps({"messages": [{"role": "user", "content": question},
                                                       {"role": "assistant", "content": answer}]})
                              for question, answer in answers.items()))


def test_train_chat_merge_quantize_train_on_it_and_merge_again(make_model, command, tmp_path):
    everything = LEARNED | LEARNED_LATER
    write_data(tmp_path / "first.jsonl", LEARNED)
    write_data(tmp_path / "all.jsonl", everything)
    done(command("finetune.py", "--model_name_or_path", make_model(hidden_size=128), "--data_path", "first.jsonl",
                 "--output_dir", "lora", "--use_lora", *TRAINING))
    merge = command("merge_lora.py", "--adapter_path", "lora", "--output_dir", "merged")
    assert answers(tmp_path, "lora", LEARNED) == LEARNED
    assert "weights" in done(merge) and "greedy answers  3, token by token" in done(merge)

    int4, int8 = [command("run_gptq.py", "--model_name_or_path", "merged", "--data_path", "first.jsonl", "--out_path",
                          f"int{bits}", "--bits", bits, "--group-size", 32) for bits in (4, 8)]
    ratios = [float(re.search(r"perplexity after .* \(x (.*)\)", done(process))[1]) for process in (int4, int8)]
    print(f"perplexity after / before: int4 {ratios[0]}, int8 {ratios[1]}")
    assert ratios[0] < 1.2 and ratios[1] < 1.005

    q_lora = command("finetune.py", "--model_name_or_path", "int4", "--data_path", "all.jsonl", "--output_dir",
                     "q_lora", "--q_lora", *TRAINING)
    said = answers(tmp_path, "int8", everything)
    assert said.pop("Where do you live?") != everything["Where do you live?"] and said == LEARNED
    done(q_lora)

    merge = command("merge_lora.py", "--adapter_path", "q_lora", "--output_dir", "final", "--base_model", "merged")
    assert answers(tmp_path, "q_lora", everything) == everything
    assert "greedy answers  3, token by token" in done(merge)
    assert answers(tmp_path, "final", everything) == everything
