"""What a person sees of a run: a terminal of 80 columns, or a file."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import console
from mechanisms.progress import ProgressLines, duration

ROOT = os.path.dirname(finetune.__file__)
COLUMNS = 80
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def command(make_model, cache_dir, tmp_path_factory):
    """Of a short run with an evaluation, in a folder of its own each time."""
    def words():
        out = tmp_path_factory.mktemp("run") / "out"
        return [sys.executable, finetune.__file__, *map(str, (
            "--model_name_or_path", make_model(), "--data_path", EXAMPLES / "data", "--eval_ratio", 0.2,
            "--eval_strategy", "steps", "--eval_steps", 2, "--cache_dir", cache_dir, "--output_dir", out, "--max_steps",
            4, "--save_strategy", "no", "--logging_steps", 1, "--sample_prompts", "none",
            "--per_device_train_batch_size", 4))]

    return words


def in_terminal(words, **environment):
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    subprocess.run(["stty", "cols", str(COLUMNS), "rows", "24"], stdin=theirs, check=True)
    run = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **environment})
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 65536):
            said += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert run.wait() == 0, said.decode()
    return said.decode()


def test_a_terminal_of_80_columns(command):
    said = in_terminal(command(), NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*m", said)  # no colour
    lines = [part for line in ESCAPE.sub("", said).split("\n") for part in line.strip("\r").split("\r")]
    assert [line for line in lines[lines.index("Training:"):] if len(line) > COLUMNS] == []
    steps = [line for line in lines if re.match(r"step \d/4 +[\d.]+ ", line)]
    assert len(steps) == 4 and all(len(line) < COLUMNS for line in steps)
    assert len([line for line in lines if re.match(r"step \d/4  eval loss [\d.]+", line)]) == 2
    assert "loss        lr     grad  tokens/s memory      left" in said
    assert "\x1b[32m" in in_terminal(command())  # the trained part of the sample is green


def test_a_file(command):
    run = subprocess.run(command(), capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == "", run.stderr  # no word of a library
    assert "\x1b" not in run.stdout and "\r" not in run.stdout
    assert not re.search("note: gradient checkpointing|model_max_length", run.stdout)  # nobody asked


def test_lines_fit_whatever_the_numbers():
    class State:
        is_world_process_zero, global_step, max_steps = True, 1_234_567, 2_000_000
        log_history = [{"eval_loss": 1.0}, {}]

    logs = {"loss": 123456.789, "learning_rate": 1.23456e-05, "grad_norm": 1.23456e-05,
            "tokens_per_second": 9_876_543.0, "memory": 1.0, "seconds_left": 3600 * 999 + 3599}
    [header, line] = ProgressLines().lines(logs, State)
    assert len(line) < COLUMNS and len(line) == len(header)
    assert line.split() == ["step", "1234567/2000000", "1.235e+05", "1.23e-05", "1.23e-05", "9,876,543", "100%",
                            "999:59:59"]
    for loss, words in ((0.5, "0.5000, the best so far"), (1.5, "1.5000, best 1.0000")):
        assert ProgressLines().lines({"eval_loss": loss}, State) == [f"step 1234567/2000000  eval loss {words}"]
    assert duration(59) == "0:59" and duration(3600) == "1:00:00"


def test_notes_are_broken_between_words(monkeypatch, capsys):
    note = "note: " + " ".join(["word"] * 40) + " --flag_with-dashes " + "x" * 100
    console.say(note, "no note " * 20)
    assert capsys.readouterr().out == note + "\n" + "no note " * 20 + "\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    console.say(note, "no note " * 20)
    *lines, last = capsys.readouterr().out.splitlines()
    assert " ".join(line.strip() for line in lines) == note and last == "no note " * 20
    assert all(len(line) <= 60 or set(line.strip()) == {"x"} for line in lines)
    assert "--flag_with-dashes" in " ".join(lines) and all(line.startswith("      ") for line in lines[1:])


def test_the_flag_that_was_given_is_remarked_on(make_model, cache_dir, tmp_path, capsys):
    words = ["--model_name_or_path", str(make_model()), "--data_path", str(EXAMPLES / "data"), "--cache_dir",
             str(cache_dir), "--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--save_strategy", "no"]
    assert finetune.train(words).args.model_max_length == 2048
    assert "2048" not in capsys.readouterr().out.partition("Training:")[0]
    finetune.train([*words, "--model_max_length", "4096"])
    assert "--model_max_length 4096 is more than the model's 2048 positions: 2048 is used" in capsys.readouterr().out


def test_a_hub_that_does_not_answer_is_one_line(tmp_path):
    """And the error after it. (The second try would come after a second; only its words are looked at here.)"""
    code = ("import logging\nfrom mechanisms.quiet import silence\nsilence()\n"
            "from huggingface_hub.utils import _http\n"
            "for number in range(1, 6):\n"
            "    _http.logger.warning(\"'no route' thrown while requesting HEAD https://hub.test/a/b.json\")\n"
            "    _http.logger.warning(f'Retrying in {number}s [Retry {number}/5].')\n"
            "_http.logger.warning('another matter')\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stderr.splitlines() == ["note: no answer from https://hub.test: trying again for a minute",
                                       "another matter"]


def test_the_metrics_are_json_without_infinity(tmp_path):
    from mechanisms.report import _finite

    assert json.dumps(_finite({"step": 1, "grad_norm": float("inf")}), allow_nan=False)
