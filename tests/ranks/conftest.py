"""What the tests of this folder share."""

import itertools

import pytest
from launching import Run, processes_of


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
