"""Hybrids of linear and full attention: a row of samples against each sample alone, exact."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from finetune import PaddingFreeCollator
from mechanisms.attention import WITHIN_SAMPLES
from mechanisms.errors import UserError
from mechanisms.head_loss import HeadLoss
from mechanisms.linear_attention import groups_of, in_groups, keep_within_samples, kernel_note
from mechanisms.lora import expert_parameters

LENGTHS = [65, 1, 130, 2, 64, 3, 20, 100]
SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
         "linear_key_head_dim": 16, "linear_value_head_dim": 16, "tie_word_embeddings": False, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
           "shared_expert_intermediate_size": 32}
CONFIGS = {
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(**SIZES, intermediate_size=96),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SIZES, **EXPERTS, intermediate_size=96),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(**SIZES, **EXPERTS),
    "qwen3_5 in its wrapper": lambda: transformers.Qwen3_5Config(
        text_config={**SIZES, "intermediate_size": 96}).get_text_config()}


def make(kind):
    """The model in training, of which the state of linear attention decides much."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=WITHIN_SAMPLES).train()
    for name, parameter in model.named_parameters():
        if "linear_attn" in name and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.config.use_cache = False
    keep_within_samples(model)
    return model


def make_samples(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(1, 128, (length,), generator=generator, dtype=torch.int32).numpy() for length in LENGTHS]
    return [{"input_ids": each, "labels": each} for each in ids]


def gradients_of(model, batches):
    """(summed loss, {name: gradient}) of all batches together."""
    head_loss, total = HeadLoss(model), 0
    model.zero_grad()
    for samples in batches:
        batch = PaddingFreeCollator()(samples)
        if batch["shift_labels"].numel():
            with head_loss.computing(batch["shift_labels"]):
                loss = model(**batch, num_items_in_batch=1).loss
            loss.backward()
            total += loss.item()
    return total, {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same(model):
    """The row has the loss and the gradient of its samples one at a time, in a copy of the model."""
    other, samples = copy.deepcopy(model), make_samples()
    row, row_gradients = gradients_of(model, [samples])
    alone, gradients = gradients_of(other, [[sample] for sample in samples])
    assert row == pytest.approx(alone, rel=1e-6)
    assert gradients.keys() == row_gradients.keys()
    difference, size = (sum(value(name).square().sum() for name in gradients).sqrt() for value in (
        lambda name: row_gradients[name] - gradients[name], lambda name: gradients[name]))
    assert difference <= 1e-5 * size
    for name, gradient in gradients.items():
        if name.endswith(("A_log", "dt_bias")):  # sums that cancel
            assert (row_gradients[name] - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_row_is_its_samples_one_at_a_time(kind):
    assert_same(make(kind))


@pytest.mark.parametrize("kind", CONFIGS)
def test_with_lora_and_gradient_checkpointing(kind):
    targets = ["q_proj", "v_proj", "out_proj", "in_proj_qkvz" if kind == "qwen3_next" else "in_proj_qkv"]
    model = make(kind)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=4,
                                             target_parameters=expert_parameters(model), init_lora_weights=False))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_same(model)


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_first_sample_does_not_move_the_later_ones_by_a_bit(kind):
    model, outputs = make(kind).eval(), []
    for first in (0, 1):
        batch = PaddingFreeCollator()([make_samples(first)[0], *make_samples()[1:]])
        del batch["labels"], batch["logits_to_keep"], batch["shift_labels"]
        with torch.no_grad():
            outputs.append(model(**batch).logits[0])
    assert torch.equal(outputs[0][65:], outputs[1][65:])
    assert not torch.equal(outputs[0][:65], outputs[1][:65])


def test_groups_of_samples_are_the_samples():
    """As on a GPU: padded on the right, the layer's output is that of each sample alone."""
    model = make("qwen3_5")
    layer = model.model.layers[0].linear_attn
    bounds = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    row = torch.randn(1, bounds[-1], 64)
    alone = torch.cat([layer(row[:, start:end]) for start, end in zip(bounds, bounds[1:])], dim=1)
    together = in_groups(layer, row, bounds)
    assert (together - alone).norm() <= 1e-6 * alone.norm()
    groups = groups_of(LENGTHS)
    assert sorted(sum(groups, [])) == list(range(8)) and 1 < len(groups) < 8


def test_layers_that_are_not_known_are_an_error():
    model = make("qwen3_5")
    model.model.layers[0].linear_attn.__class__ = type("Other", (torch.nn.Module,), {})
    with pytest.raises(UserError, match="names 3 layers of linear attention and the network has 2"):
        keep_within_samples(model)


def test_a_missing_kernel_is_said_where_it_would_run(monkeypatch):
    hybrid, dense = CONFIGS["qwen3_5"](), transformers.Qwen3Config()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "flash-linear-attention" in kernel_note(hybrid, torch.device("cuda"))
    assert not kernel_note(hybrid, torch.device("cpu")) and not kernel_note(dense, torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert not kernel_note(hybrid, torch.device("cuda"))
