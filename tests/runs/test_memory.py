"""How much memory training takes, against models that are trained and a step that is measured."""

import itertools

import pytest
import torch

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import head_loss, memory
from mechanisms.flags import prepare_command_line

METHODS = {"full": [], "LoRA": ["--use_lora"], "LoRA, base": ["--use_lora"], "Q-LoRA": ["--q_lora"]}


@pytest.fixture
def train(make_model, cache_dir, tmp_path, monkeypatch):
    """train(method, *flags, checkpointing=False) -> (Trainer after one step, Setup)."""

    def run(method, *flags, checkpointing=False):
        setups = []

        def decide(setup, tokens):
            setups.append(setup)
            return checkpointing, "for this test"

        monkeypatch.setattr(finetune, "checkpointing_needed", decide)
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
def test_the_state_is_that_of_the_real_model(train, method, flags):
    trainer, setup = train(method, *flags)
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
def test_what_a_row_takes_is_what_a_real_step_takes(train, method, precision, checkpointing, monkeypatch):
    """With checkpointing roughly: the one layer at work weighs much in so small a network, and when it is at work again
    the loss and autocast's copies are gone, which are counted beside it."""
    monkeypatch.setattr(head_loss, "chunk_bytes", lambda device_type: 1 << 20)
    trainer, setup = train(method, *precision, checkpointing=checkpointing)
    row = trainer.data_collator([trainer.train_dataset[index] for index in range(12)])
    tokens = row["input_ids"].shape[1]
    row["logits_to_keep"], row["shift_labels"] = torch.arange(tokens), row["input_ids"]  # every token is trained
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None  # of the row before
    real = peak_bytes(lambda: trainer.training_step(trainer.model, row))
    counted = memory.activation_bytes(setup, tokens)[checkpointing] + memory.row_loss_bytes(setup, tokens)
    assert counted == pytest.approx(real, rel=0.4 if checkpointing else 0.07)
