"""Mixtures of experts and hybrids under every strategy: two gloo ranks, and the numbers of one process.

A few are among the tests; python -m tests.sweep families runs them all.
"""

import json

import pytest

from examples.make_tiny_model import EXAMPLES
from tests.ranks.test_strategies import numbers, torchrun
from tests.runs.test_hybrids import CELLS, some_of

LORA = ["--lora_r", "8", "--lora_dropout", "0"]  # no dropout: ranks draw other random numbers than one process
METHODS = {"full": [], "LoRA": ["--use_lora", *LORA], "LoRA on experts": ["--use_lora", "--lora_experts", *LORA],
           "Q-LoRA": ["--q_lora", *LORA]}
STRATEGIES = {"DDP": [], "ZeRO-2": ["--deepspeed", "ds_config_zero2.json"],
              "ZeRO-3": ["--deepspeed", "ds_config_zero3.json"]}
STEPS = 2


@pytest.fixture(scope="module")
def results(request, make_published, cache_dir, tmp_path_factory):
    """results(strategy) -> {"family, method": what tests/ranks/cells.py reports}, run when it is first asked for: of
    what the selected tests ask for, all at once."""
    folder, found = tmp_path_factory.mktemp("families"), {}
    asked = [item.callspec.params for item in request.session.items if item.path == request.path]

    def run(strategy):
        if strategy not in found:
            ranks, cells = 1 if strategy == "one process" else 2, {}
            for family, method in dict.fromkeys((each["family"], each["method"]) for each in asked
                                                if strategy in (each["strategy"], "one process")):
                cells[f"{family}, {method}"] = {"argv": [str(word) for word in (
                    "--model_name_or_path", make_published(family), "--data_path", EXAMPLES / "data",
                    "--output_dir", folder / f"{strategy} {family} {method}", "--cache_dir", cache_dir,
                    "--max_steps", STEPS, "--save_strategy", "no", "--logging_steps", 1, "--learning_rate", "5e-3",
                    "--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2 // ranks,
                    "--model_max_length", 128, *METHODS[method], *STRATEGIES.get(strategy, []),
                    # what is held is looked at after it was made what is saved
                    *(["--save_dtype", "float32"] if method == "full" and "ZeRO" not in strategy else []))]}
            (folder / "cells.json").write_text(json.dumps(cells))
            done = torchrun(["tests/ranks/cells.py", folder / "cells.json", folder / "results.json"], ranks, 1200)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            found[strategy] = json.loads((folder / "results.json").read_text())
        return found[strategy]

    return run


@pytest.mark.parametrize("strategy, family, method", some_of(
    [(strategy, *cell) for strategy in STRATEGIES for cell in CELLS],
    [("ZeRO-3", "qwen3_moe", "full"), ("ZeRO-3", "qwen3_5_moe", "LoRA on experts")]))
def test_two_ranks_have_the_numbers_of_one_process(results, strategy, family, method):
    result, alone = (results(each)[f"{family}, {method}"] for each in (strategy, "one process"))
    if (strategy, method) == ("ZeRO-3", "Q-LoRA"):
        assert "cannot be sharded" in result["error"]
        return
    assert len(numbers(alone)) == STEPS
    for step, (found, expected) in enumerate(zip(numbers(result), numbers(alone), strict=True), 1):
        assert found == pytest.approx(expected, rel=1e-4), f"step {step}"
    assert result["counted"] == pytest.approx(result["held"], rel=0.01)
