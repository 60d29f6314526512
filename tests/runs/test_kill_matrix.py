"""The short version of bench/kill_matrix.py: one cell, every kind of disturbance."""

import os
import re
import subprocess
import sys

import finetune


def test_disturbed_runs_end_as_the_undisturbed_one():
    root = os.path.dirname(finetune.__file__)
    command = [sys.executable, "bench/kill_matrix.py", "--cells", "LoRA, one process", "--cases", "16"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    row = re.search(r"\| LoRA, one process \| (\d+) \| (\d+) \| (\d+) \|", run.stdout)
    cases, equal, other = map(int, row.groups())
    assert cases == equal >= 16 and other == 0
