"""What the tests of this folder share."""

import itertools

import pytest

from tests.ranks.launching import ROOT, Run, processes_of
from tests.runs.test_hybrids import make_published  # noqa: F401  (a fixture)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For results and logs."""
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def start(folder):
    """start(command, **environment) -> Run, in the folder; what is left of them is killed in the end."""
    numbers = itertools.count(1)

    def run(command, **environment):
        return Run(command, folder / f"run{next(numbers)}.log", environment)

    yield run
    for process in processes_of(folder):
        process.kill()


@pytest.fixture(scope="module")
def steps(folder):
    """A program whose steps need all ranks and which answers no request."""
    program = folder / "steps.py"
    program.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from mechanisms import signals
signals.install()
import time, torch
from mechanisms.errors import user_errors_end_the_program
with user_errors_end_the_program():
    torch.distributed.init_process_group("gloo")
    signals.requests.keep()
    print("step 1/1", flush=True)
    while True:
        torch.distributed.barrier()
        time.sleep(0.05)
""")
    return program
