"""The commands of README.md, run as they stand in a copy of the repository: `python -m tests.sweep readme`.

The names of models in them are folders there, with a tiny model in each, and chats.jsonl has a few conversations.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from examples.make_tiny_model import EXAMPLES, example_texts, make_tiny_model

ROOT = EXAMPLES.parent
LANGUAGES = "README.md", "README_CN.md", "README_KO.md"
RUN = ("bash", "python")
SECONDS = 900  # for one block


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of all blocks of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def make_place(folder: Path):
    """A copy of the repository in which the names of the README's models and data mean something."""
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "output", "output_qwen", "demo_output", "tests"))
    lines = (EXAMPLES / "persona.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "chats.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    tiny = make_tiny_model(folder / "Qwen/tiny", example_texts())
    for name in set(re.findall(r"Qwen/Qwen[\w.-]+", (ROOT / "README.md").read_text(encoding="utf-8"))):
        shutil.copytree(tiny, folder / name)


def run(folder: Path) -> list[str]:
    """Every block but the first (demo.sh and test.sh are runs of their own), one after the other. -> what failed."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
                   "HF_HOME": str(folder / "cache"), "PYTHON": sys.executable}
    failed = []
    for language, text in [block for block in blocks("README.md") if block[0] in RUN][1:]:
        command = ["bash", "-euc", text] if language == "bash" else [sys.executable, "-c", text]
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=SECONDS)
        first = next(line for line in text.splitlines() if line and not line.startswith("#"))
        print(f"{'ok   ' if done.returncode == 0 else 'WRONG'} {time.monotonic() - began:5.0f} s  {first}", flush=True)
        if done.returncode:
            failed.append(first)
            print(done.stdout[-3000:])
    return failed
