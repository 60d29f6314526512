"""How much memory training takes, against models that are trained and a step that is measured."""

import itertools
import re

import pytest
import torch

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import fitting, head_loss, memory
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line
from mechanisms.trainer import SafeTrainer

METHODS = {"full": [], "LoRA": ["--use_lora"], "LoRA, base": ["--use_lora"], "Q-LoRA": ["--q_lora"]}


@pytest.fixture
def train_one_step(make_model, cache_dir, tmp_path, monkeypatch):
    """train_one_step(method, *flags, checkpointing=False) -> (Trainer after one step, Setup)."""

    def run(method, *flags, checkpointing=False):
        setups = []

        def decide(plan):
            setups.append(plan.setup)
            return plan._replace(checkpointing=checkpointing), "for this test"

        monkeypatch.setattr(fitting, "decide", decide)
        model = make_model(hidden_size=256, num_layers=4, base="base" in method)
        trainer = finetune.train(prepare_command_line(finetune.__file__, [str(word) for word in (
            "--model_name_or_path", model, "--data_path", EXAMPLES / "data", "--cache_dir", cache_dir, "--output_dir",
            tmp_path / "out", "--max_steps", 1, "--save_strategy", "no", *METHODS[method], *flags)]))
        return trainer, setups[0]

    return run


def tensor_bytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))


@pytest.mark.parametrize("flags", [["--bf16"], ["--optim", "adamw_8bit"]])
@pytest.mark.parametrize("method", METHODS)
def test_the_state_is_that_of_the_real_model(train_one_step, method, flags):
    trainer, setup = train_one_step(method, *flags)
    state, parameters = memory.training_state(setup), list(trainer.model.parameters())
    scales = [tensor for parameter in parameters if hasattr(parameter, "quant_state")
              for part in (parameter.quant_state, parameter.quant_state.state2) for tensor in (part.absmax, part.code)]
    assert state.weights == pytest.approx(tensor_bytes(*parameters, *scales), rel=0.02 if "Q" in method else 0)
    assert state.gradients == tensor_bytes(*(each for each in parameters if each.requires_grad))
    held = tensor_bytes(*itertools.chain(*(values.values() for values in trainer.optimizer.state.values())))
    assert state.optimizer == pytest.approx(held, rel=0.1 if "adamw_8bit" in flags else 0.001)
    assert state.offloaded == 0 and not state.notes


def peak_bytes(step):
    """The most that was allocated at a time during the step, beside what was there before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [["--bf16"], []])
@pytest.mark.parametrize("method", ["full", "LoRA", "LoRA, base"])
def test_what_a_row_takes_is_what_a_real_step_takes(train_one_step, method, precision, checkpointing, monkeypatch):
    """With checkpointing roughly: the one layer at work weighs much in so small a network, and when it is at work again
    the loss and autocast's copies are gone, which are counted beside it."""
    monkeypatch.setattr(head_loss, "chunk_bytes", lambda device_type: 1 << 20)
    trainer, setup = train_one_step(method, *precision, checkpointing=checkpointing)
    row = trainer.data_collator([trainer.train_dataset[index] for index in range(12)])
    tokens = row["input_ids"].shape[1]
    row["logits_to_keep"], row["shift_labels"] = torch.arange(tokens), row["input_ids"]  # every token is trained
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None  # of the row before
    real = peak_bytes(lambda: trainer.training_step(trainer.model, row))
    counted = memory.activation_bytes(setup, tokens)[checkpointing] + memory.row_loss_bytes(setup, tokens)
    assert counted == pytest.approx(real, rel=0.4 if checkpointing else 0.07)


# -- what does not fit ------------------------------------------------------------------------------------------------

def test_a_run_that_does_not_fit_is_refused_before_weights_are_loaded(train, monkeypatch):
    monkeypatch.setattr(finetune, "load_weights", lambda *_, **__: pytest.fail("weights are loaded"))
    with pytest.raises(UserError) as error:
        train("--memory_limit", 0.001)
    first, *others = str(error.value).splitlines()
    assert re.match(r"this run does not fit into the memory: it needs about 0\.0 GB on each process with gradient "
                    r"checkpointing \(weights .*\), and 0.0 GB can be had \(--memory_limit\)", first)
    assert others and "--memory_limit GB says how much can be had" in others[-1]


def run_out_at(step, monkeypatch):
    """The allocator has no more at this training step of the process."""
    plain, steps = SafeTrainer.training_step, itertools.count(1)

    def training_step(*args, **kwargs):
        if next(steps) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity "
                                         "of 79.1 GiB\nof which 1 is free")
        return plain(*args, **kwargs)

    monkeypatch.setattr(SafeTrainer, "training_step", training_step)


def test_running_out_of_memory_says_what_takes_less_and_loses_nothing(train, monkeypatch, tmp_path):
    run_out_at(1, monkeypatch)
    with pytest.raises(UserError) as error:
        train("--max_steps", 3)
    lines = str(error.value).splitlines()
    assert lines[0] == ("out of memory: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
                        "79.1 GiB")
    assert lines[2].strip().startswith("--gradient_checkpointing True --per_device_train_batch_size 1 "
                                       "--gradient_accumulation_steps 2: about") and "is complete" not in lines[-1]
    monkeypatch.undo()
    wanted = train("--max_steps", 3).state.log_history[2]["loss"]
    run_out_at(3, monkeypatch)
    with pytest.raises(UserError, match=r"checkpoint-2 is complete: the same command goes on from it"):
        train("--max_steps", 3, "--save_strategy", "steps", "--save_steps", 2)
    monkeypatch.undo()
    resumed = train("--max_steps", 3, "--save_strategy", "steps", "--save_steps", 2,
                    "--gradient_checkpointing", "True", "--per_device_train_batch_size", 1,
                    "--gradient_accumulation_steps", 2)
    assert resumed.state.log_history[2]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_other_failures_keep_their_traceback(train, monkeypatch):
    monkeypatch.setattr(SafeTrainer, "training_step", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train("--max_steps", 1)
