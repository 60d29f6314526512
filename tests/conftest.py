"""Shared by all tests: tiny models made once per session, and the real inputs where they are at hand."""

import os
from pathlib import Path

import pytest

import mechanisms.quiet  # noqa: F401

# The models here are so small that a second thread only waits for the first; also for the processes tests start.
os.environ["OMP_NUM_THREADS"] = "1"

REAL_DATA = os.environ.get("REAL_DATA")
REAL_TOKENIZERS = ("qwen2", "qwen2.5", "qwen3")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real tokenizers, data sets and checkpoints."""
    if not REAL_DATA:
        pytest.skip("REAL_DATA is not set: no real tokenizers and data here")
    return Path(REAL_DATA)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(**arguments of make_tiny_model) -> folder; each kind is made once."""
    from examples.make_tiny_model import example_texts, make_tiny_model

    made = {}

    def make(**kwargs):
        key = repr(sorted(kwargs.items()))
        if key not in made:
            name = "tiny" + "".join(f"-{value}" for value in kwargs.values())
            folder = tmp_path_factory.mktemp("models") / name
            made[key] = make_tiny_model(folder, example_texts(), **{"num_layers": 2, "hidden_size": 64, **kwargs})
        return made[key]

    return make


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One token cache for the session."""
    return tmp_path_factory.mktemp("cache")
