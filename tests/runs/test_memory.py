"""How much memory training takes, against models that are trained and a step that is measured."""

import itertools
import re
import statistics

import pytest
import torch

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import fitting, frugal, head_loss, memory
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line
from mechanisms.memory import Setup
from mechanisms.trainer import SafeTrainer
from tests import published_memory
from tests.published_memory import PUBLISHED

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


# -- what is published ------------------------------------------------------------------------------------------------

CUDA = 0.8  # GB that the process holds beside torch's memory: CUDA and its libraries


def test_estimates_of_the_originals_recipe_are_what_was_measured(capsys):
    """Its program trains in bf16 throughout (moments of AdamW too, gradients of DeepSpeed's batches too), and takes the
    loss from full logits: three of them in fp32 at a time, or four in fp16, which has no autocast, under DeepSpeed."""
    errors = []
    for (size, method, gpus), measured in PUBLISHED.items():
        stage = 3 if gpus > 1 or method == "full" else 2 if method == "Q-LoRA" else None
        setup = Setup(published_memory.config(size, method == "Q-LoRA"),
                      None if method == "full" else published_memory.adapter("emb" in method), ranks=gpus,
                      stage=stage, trained=torch.bfloat16, optim="adamw_torch", accumulates=True)
        state = memory.training_state(setup)
        working, update = memory.working_bytes(setup, state)
        if stage:  # in the update gradients lie beside their copies in fp32
            held, logit, update = state.weights + state.gradients / 2 + state.optimizer, 8, 1.5 * update
        else:
            held, logit = state.weights + state.gradients + state.optimizer / 2, 12
        activations = {tokens: memory.activation_bytes(setup, tokens)[1] for tokens in (0, 8192)}
        for tokens, gb in zip(published_memory.TOKENS, measured):
            row = activations[0] + (activations[8192] - activations[0]) * tokens / 8192
            row += working + logit * tokens * setup.config.vocab_size
            estimate = gpus * ((held + max(row, update)) / 1e9 + CUDA)
            errors.append(abs(estimate / gb - 1))
            with capsys.disabled():
                print(f"{size:5}{method:11}{tokens:5} tokens: {estimate:6.1f} GB, measured {gb:6.1f}: {errors[-1]:.0%}")
    assert statistics.median(errors) < 0.1 and max(errors) < 0.2


@pytest.mark.parametrize("size, method, limit", [
    ("1.8B", "full", 24), ("7B", "LoRA", 24), ("14B", "Q-LoRA", 24), ("1.8B", "full", 80), ("7B", "full", 80),
    ("14B", "LoRA", 80), ("72B", "Q-LoRA", 80)])
def test_what_the_original_documents_as_fitting_on_one_gpu_fits(size, method, limit, capsys):
    """With rows of 512 tokens, by our recipe."""
    plain = Setup(published_memory.config(size, method == "Q-LoRA"),
                  None if method == "full" else published_memory.adapter(), accumulates=True)
    plan = fitting.Plan(plain, None, 1, 16, lambda items: 512 * items, True, limit * 1e9, published_memory.adapter,
                        frugal.setup(plain) if method == "full" else None)
    decided, line = fitting.decide(plan)
    with capsys.disabled():
        print(f"{size} {method} on {limit} GB: {line}")
    assert fitting.Need.of(decided).total(decided.checkpointing) < (1 - memory.RESERVE) * limit * 1e9


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
