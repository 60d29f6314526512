"""estimate_memory.py: its bars, and its mistakes that need no torch."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import estimate_memory
from mechanisms.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_bar_ends_where_its_numbers_end():
    parts = dict.fromkeys(estimate_memory.PARTS, 0) | {"weights": 5e9, "activations": 3e9, "reserve": 2e9}
    found = estimate_memory.Estimate(None, parts, 0, True, {})
    assert estimate_memory.bar(found, 20e9, 20) == "WWWWWXXX.." + " " * 11
    assert estimate_memory.bar(found, 10e9, 20) == "WWWWWWWWWWXXXXXX.... "
    assert estimate_memory.bar(found, 8e9, 16) == "WWWWWWWWWWXXXXXX>"


def test_mistakes_are_one_message_each_before_anything_heavy():
    def run(*words):
        begun = time.process_time()
        done = subprocess.run([sys.executable, "estimate_memory.py", *words], cwd=ROOT, capture_output=True, text=True)
        assert time.process_time() - begun < 3
        return done.returncode, done.stderr

    code, _ = run("--help")
    assert code == 0
    code, said = run("a", "--learning_rat", "1", "--gpus", "x", "--data_path", "nowhere.jsonl")
    assert code == 2 and all(words in said for words in ("--learning_rate", "--gpus takes", "nowhere.jsonl"))
    with pytest.raises(UserError, match="(?s)which model.*--gpus 0: at least 1.*--gpu_memory -1") as raised:
        estimate_memory.run(["--gpus", "0", "--gpu_memory=-1"])
    assert str(raised.value).count("\n") == 2
    with pytest.raises(UserError, match="nowhere: no such folder"):
        estimate_memory.run(["nowhere"])
