"""What training is said to need, against models and steps that are real, and against sums done by hand."""

import itertools

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import Qwen2Config, Trainer, TrainingArguments

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms import head_loss, memory
from mechanisms.flags import prepare_command_line
from mechanisms.memory import Setup

QWEN_7B = Qwen2Config(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False)
WEIGHTS = 7_615_616_512
LINEAR = 28 * 3584 * (3584 + 2 * 512 + 3584 + 3 * 18944)  # of these, what --q_lora holds in 4 bits
ADAPTERS = 28 * 64 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
LORA = LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, lora_dropout=0.05, target_modules=[
    "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"])
BF16 = {"trained": torch.bfloat16}  # as under DeepSpeed


@pytest.mark.parametrize("settings, weights, gradients, optimizer, offloaded", [
    ({}, 4 * WEIGHTS, 4 * WEIGHTS, 8 * WEIGHTS, 0),
    ({"ranks": 2}, 4 * WEIGHTS, 8 * WEIGHTS, 8 * WEIGHTS, 0),
    ({"ranks": 8, "stage": 1, **BF16}, 2 * WEIGHTS, 2 * WEIGHTS, 12 * WEIGHTS / 8, 0),
    ({"ranks": 8, "stage": 2, **BF16}, 2 * WEIGHTS, 2 * WEIGHTS / 8, 12 * WEIGHTS / 8, 0),
    ({"ranks": 8, "stage": 3, **BF16}, 2 * WEIGHTS / 8, 2 * WEIGHTS / 8, 12 * WEIGHTS / 8, 0),
    ({"ranks": 8, "stage": 2, "offload_optimizer": True, **BF16}, 2 * WEIGHTS, 2 * WEIGHTS / 8, 0, 16 * WEIGHTS / 8),
    ({"ranks": 8, "stage": 3, "offload_optimizer": True, "offload_weights": True, **BF16},
     0, 2 * WEIGHTS / 8, 0, 18 * WEIGHTS / 8),
    ({"adapter": LORA}, 2 * WEIGHTS + 4 * ADAPTERS, 4 * ADAPTERS, 8 * ADAPTERS, 0),
    ({"adapter": LORA, "ranks": 4, "stage": 3, **BF16},
     2 * (WEIGHTS + ADAPTERS) / 4, 2 * ADAPTERS / 4, 12 * ADAPTERS / 4, 0),
    ({"adapter": LORA, "optim": "paged_adamw_32bit"}, 2 * WEIGHTS + 4 * ADAPTERS, 4 * ADAPTERS, 0, 8 * ADAPTERS),
    ({"adapter": LORA, "nf4": True}, 2 * (WEIGHTS - LINEAR) + LINEAR * (1 / 2 + 1 / 64 + 1 / 4096) + 4 * ADAPTERS,
     4 * ADAPTERS, 8 * ADAPTERS, 0),
])
def test_a_config_is_enough(settings, weights, gradients, optimizer, offloaded):
    before = psutil.Process().memory_info().rss
    state = memory.training_state(Setup(QWEN_7B, **settings))
    assert state == (weights, gradients, optimizer, offloaded, [])
    assert psutil.Process().memory_info().rss - before < 2e8


def test_activations_on_a_gpu_need_no_gpu():
    """Its kernels keep a byte for each element that dropout looks at, and keys and values as they are."""
    lora = Setup(QWEN_7B, LORA)
    sizes = {tokens: memory.activation_bytes(lora, tokens) for tokens in (2048, 4096)}
    assert sizes[4096][0] == pytest.approx(2 * sizes[2048][0], rel=0.02)
    assert sizes[2048][0] == pytest.approx(16.4e9, rel=0.01)
    assert memory.activation_bytes(lora._replace(device=torch.device("cpu")), 2048)[0] > 1.4 * sizes[2048][0]
    inputs, one_layer, copies = 28 * 2 * 2048 * 3584, sizes[2048][0] / 28, 2 * ADAPTERS
    assert sizes[2048][1] == pytest.approx(inputs + one_layer + copies, rel=0.05)


def test_copies_that_autocast_makes_stay_with_checkpointing():
    """Those of all layers: two bytes a weight, until the forward pass ends."""
    mixed, pure = (memory.activation_bytes(Setup(QWEN_7B, **settings), 64)[1] for settings in ({}, BF16))
    assert mixed - pure == pytest.approx(2 * LINEAR, rel=0.02)


def test_an_unknown_optimizer_counts_as_adamw_and_is_named(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1e12)
    known, unknown = (Setup(QWEN_7B, LORA, device=torch.device("cpu"), optim=optim)
                      for optim in ("adamw_torch", "galore_adamw"))
    assert memory.training_state(unknown)[:4] == memory.training_state(known)[:4]
    assert "--optim galore_adamw" in memory.checkpointing_needed(unknown, 100)[1]
    assert "--optim" not in memory.checkpointing_needed(known, 100)[1]


# -- against what is real ---------------------------------------------------------------------------------------------

def tensor_bytes(*tensors):
    return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))


@pytest.mark.parametrize("optim, optim_args", [
    ("adamw_torch", None), ("adamw_torch_fused", None), ("adafactor", None), ("ademamix", None), ("sgd", None),
    ("sgd", "momentum=0.9"), ("adagrad", None), ("rmsprop", None), ("rmsprop", "momentum=0.9"), ("adamw_8bit", None),
    ("adamw_bnb_8bit", None), ("ademamix_8bit", None), ("lion_8bit", None), ("lion_32bit", None),
    ("paged_adamw_32bit", None), ("paged_adamw_8bit", None), ("paged_lion_8bit", None), ("rmsprop_bnb_8bit", None)])
def test_bytes_of_optimizers(optim, optim_args, tmp_path):
    arguments = TrainingArguments(output_dir=tmp_path, optim=optim, optim_args=optim_args, use_cpu=True)
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer = optimizer([weight], **options)
    weight.grad = torch.randn(512, 512)
    optimizer.step()
    real = tensor_bytes(*optimizer.state[weight].values()) / weight.numel()
    assert memory.optimizer_bytes(optim, optim_args) == pytest.approx(real, abs=0.02)


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
