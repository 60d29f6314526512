"""bench/compare.py for real, with a model so small that only the equality of the numbers means something."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import compare  # noqa: E402
import gpu_check  # noqa: E402
import tokenization  # noqa: E402
import worker  # noqa: E402


@pytest.fixture
def small(make_model):
    """Arguments of a comparison of seconds."""
    return ["--model", str(make_model()), "--data", *map(str, sorted((ROOT / "examples/data").glob("*.json"))),
            "--steps", "2", "--samples-per-step", "3", "--width", "128", "--repetitions", "1", "--threads", "1"]


def test_all_train_the_same(small, tmp_path):
    output = tmp_path / "results.json"
    done = subprocess.run([sys.executable, str(ROOT / "bench/compare.py"), *small, "--contestants", "O", "F",
                           "--output", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| **O** " in done.stdout and "| **F** " in done.stdout
    (results,) = json.loads(output.read_text())["rounds"]
    assert results["F"]["computed_tokens_ratio"] == 1 < results["O"]["computed_tokens_ratio"]
    assert results["O"]["tokens"] == results["F"]["tokens"]


def test_who_trains_something_else_is_named(small, monkeypatch, capsys):
    """In this process, for speed, where peak memory means nothing."""
    monkeypatch.setattr(compare, "run", lambda job: getattr(worker, job["task"])(job | {"started": 0}))
    argv = [*small, "--contestants", "O", "FP", "--rows-per-forward", "FP=1"]
    assert compare.main(argv) == 0
    assert compare.main([*argv, "--plant-fault", "FP"]) == 1
    assert "FAILED: FP: the loss of the first step is" in capsys.readouterr().err


def test_both_ways_of_tokenizing_take_all_records(make_model, tmp_path):
    record = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for _ in range(700)))
    for _ in ("first start", "second start"):
        assert tokenization.start(str(data), make_model(), str(tmp_path / "cache"))[0] == 700
    assert tokenization.loop(str(data), make_model())[0] == 700


def test_arguments(monkeypatch, capsys):
    monkeypatch.delenv("REAL_DATA", raising=False)
    for argv, words in ((["--contestants", "F"], "O is always needed"), (["--contestants", "O", "X"], "X"),
                        (["--contestants", "O"], "REAL_DATA is not set"),
                        (["--contestants", "O", "--rows-per-forward", "O"], "CONTESTANT=NUMBER")):
        with pytest.raises(SystemExit) as stop:
            compare.parse_arguments(argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    args = compare.parse_arguments(["--contestants", "O", "--model", "m", "--data", "d", "--device", "cuda"])
    assert args.dtype == "bf16"
    assert compare.CONTESTANTS.keys() == worker.CONTESTANTS.keys() and set(compare.MODELS) == set(worker.SHAPES)


def test_the_check_of_a_gpu_on_a_cpu(monkeypatch, capsys):
    """With tiny shapes, each method and network once."""
    monkeypatch.setattr(gpu_check.Report, "bad", 0)
    first = {(case.shape, case.method): case for case in reversed(gpu_check.CASES)}
    monkeypatch.setattr(gpu_check, "CASES", list(first.values()))
    assert gpu_check.main() == 0
    output = capsys.readouterr().out
    assert output.count("\nOK ") == 9 + len(first) and "\nBAD" not in output
    assert "\n| 3B, Q-LoRA" in output and "\n| 7B, frugal" in output and "\n| hybrid" in output


def test_the_check_of_a_gpu_sees_what_is_wrong(monkeypatch, capsys):
    """A window that the attention does not keep to, and an output layer that forgets part of its gradient."""
    monkeypatch.setattr(gpu_check.Report, "bad", 0)
    plain = gpu_check.within_samples

    def no_window(*arguments, sliding_window, **options):
        kept = sliding_window if arguments[1].dtype == torch.float32 else None
        return plain(*arguments, sliding_window=kept, **options)

    monkeypatch.setattr(gpu_check, "within_samples", no_window)
    gpu_check.check_attention()
    scatter = torch.Tensor.scatter_
    monkeypatch.setattr(torch.Tensor, "scatter_", lambda tensor, *arguments: (
        scatter(tensor, *arguments) if tensor.dtype == torch.float32 else tensor))
    gpu_check.check_head_loss()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines] == ["OK ", "OK ", "BAD", "BAD"] and "window 20" in lines[2]
