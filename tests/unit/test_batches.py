"""Batches without padding and the loss without logits: the numbers of padded batches through the stock model."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from bench.worker import padded
from finetune import IGNORED, PaddingFreeCollator
from mechanisms import fitting, head_loss, memory
from mechanisms.attention import WITHIN_SAMPLES
from mechanisms.data.packing import best_fit_decreasing
from mechanisms.errors import UserError
from mechanisms.head_loss import HeadLoss
from tests.runs.test_batches import logged

VOCABULARY = 500


def make_samples(lengths, seed=0):
    """Samples with some labels ignored, and one whose very first token is labelled."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, VOCABULARY, (length,), generator=draw)
        trained = torch.rand(length, generator=draw) < 0.5
        trained[-1] = True
        trained[0] = number == 0
        samples.append({"input_ids": ids.int().numpy(), "labels": torch.where(trained, ids, IGNORED).numpy()})
    return samples


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found and all(grad.abs().max() > 0 for grad in found.values())
    return found


def assert_same(model, reference, loss, expected):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss.item() > 0
    found, wanted = gradients(model), gradients(reference)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= 1e-5 * grad.norm(), name


def assert_same_as_padded(model, reference, samples):
    """Returns the batch without padding."""
    expected = reference(**padded(samples)).loss
    expected.backward()
    batch = PaddingFreeCollator()(samples)
    with HeadLoss(model).computing(batch["shift_labels"]):
        loss = model(**batch).loss
    loss.backward()
    assert_same(model, reference, loss, expected)
    return batch


@pytest.fixture
def make_pair(make_model):
    """make_pair(head, tied, **config) -> (model as finetune.py trains it, the same as it comes)."""

    def make(head="full", tied=True, **config):
        folder = make_model(tie_word_embeddings=tied)
        models = []
        for attention in (WITHIN_SAMPLES, "eager"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32,
                                                         **config)
            names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
            special = {"modules_to_save": names} if head == "modules_to_save" else \
                {"trainable_token_indices": {name: [3, 7] for name in names}} if head == "rows" else {}
            if head != "full":
                model = get_peft_model(model, LoraConfig(
                    task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
                    ensure_weight_tying=tied and bool(special), **special))
            models.append(model.train())
        return models

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["full", "frozen", "modules_to_save", "rows"])
def test_loss_and_gradients_of_padded_batches(make_pair, head, tied, monkeypatch):
    model, reference = make_pair(head, tied)
    chunk = 7 * 4 * model.get_output_embeddings().weight.shape[0]  # seven tokens
    monkeypatch.setattr(head_loss, "chunk_bytes", lambda device_type: chunk)
    samples = make_samples([40, 3, 17, 2])
    batch = assert_same_as_padded(model, reference, samples)
    assert batch["input_ids"].shape == (1, 62) and batch["labels"].shape == (1, 62)


def test_the_batch_is_right_for_the_stock_model_too(make_pair):
    _, reference = make_pair()
    batch, samples = PaddingFreeCollator()(make_samples([40, 3, 17])), make_samples([40, 3, 17])
    reference.set_attn_implementation("sdpa")
    reference.config.use_cache = False  # with a cache transformers takes the row for one sequence
    assert reference(**batch).loss.item() == pytest.approx(reference(**padded(samples)).loss.item(), rel=1e-5)


def test_label_smoothing(make_pair):
    model, reference = make_pair(tied=False)
    samples = make_samples([40, 3, 17])
    batch = padded(samples)
    logits = reference(**{**batch, "labels": None}).logits
    expected = LabelSmoother(0.1)({"logits": logits}, batch["labels"], shift_labels=True)  # Trainer's own
    expected.backward()
    batch = PaddingFreeCollator()(samples)
    with HeadLoss(model, label_smoothing=0.1).computing(batch["shift_labels"]):
        loss = model(**batch).loss
    loss.backward()
    assert_same(model, reference, loss, expected)


def test_samples_of_a_row_do_not_see_each_other(make_pair):
    """One sample of the row changed: what the others make of theirs stays, bit for bit."""
    model, _ = make_pair()
    first, second = make_samples([20, 9, 30]), make_samples([20, 9, 30])
    second[1] = make_samples([9], seed=5)[0]
    outputs = []
    for samples in (first, second):
        batch = PaddingFreeCollator()(samples)
        batch["logits_to_keep"] = torch.arange(59)
        outputs.append(model(**{**batch, "labels": None}).logits[0])
    same = (outputs[0] == outputs[1]).all(dim=1)
    assert same[:20].all() and same[29:].all() and not same[20:29].any()


def test_sliding_window(make_pair):
    window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
              "layer_types": ["full_attention", "sliding_attention"]}
    model, reference = make_pair(**window)
    assert model.config.layer_types[-1] == "sliding_attention"
    samples = make_samples([40, 3, 17])
    assert_same_as_padded(model, reference, samples)


def test_generation_with_the_trained_model(make_pair):
    model, reference = make_pair()
    HeadLoss(model)
    prompt = {"input_ids": torch.tensor([[1, 2, 3, 4], [0, 0, 5, 6]]),
              "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])}
    answers = [copy.copy(each.eval()).generate(**prompt, max_new_tokens=8, do_sample=False)
               for each in (model, reference)]
    assert torch.equal(*answers)


# -- packing ----------------------------------------------------------------------------------------------------------

def test_best_fit_decreasing():
    assert sorted(map(sorted, best_fit_decreasing([6, 5, 4, 3, 2], 10, seed=0))) == [[0, 2], [1, 3, 4]]
    lengths = np.random.default_rng(0).integers(1, 513, 20_000)
    rows = best_fit_decreasing(lengths, 512, seed=1)
    assert sorted(index for row in rows for index in row) == list(range(20_000))
    assert all(lengths[row].sum() <= 512 for row in rows)
    assert len(rows) <= lengths.sum() / 512 * 1.005
    assert best_fit_decreasing(lengths, 512, seed=1) == rows
    other = best_fit_decreasing(lengths, 512, seed=2)
    assert other != rows and len(other) == len(rows)


def test_packing_needs_lengths(train):
    with pytest.raises(UserError, match="--packing and --lazy_preprocess exclude each other"):
        train("--packing", "--lazy_preprocess", "True")


# -- gradient checkpointing -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [[], ["--use_lora", "--lora_r", 8], ["--q_lora", "--lora_r", 8]])
@pytest.mark.parametrize("precision", ["--bf16", "--no_bf16"])
def test_the_estimate_of_activations_is_what_autograd_saves(train, flags, precision, monkeypatch):
    """Against all that is saved in a real step, counted the same way."""
    estimates = []

    def count_and_decide(plan):
        tokens = plan.longest(plan.items)
        estimates.append((tokens, *memory.activation_bytes(plan.setup, tokens)))
        return plan._replace(checkpointing=False), "counted"

    monkeypatch.setattr(fitting, "decide", count_and_decide)
    trainer = train(*flags, *([precision] if precision == "--bf16" else []), "--max_steps", 1)
    [(tokens, stored, recomputed)] = estimates
    assert recomputed < stored
    sizes = [len(sample["input_ids"]) for sample in trainer.train_dataset]
    assert tokens == sum(sorted(sizes)[-2:])
    decoder, row = trainer.model.get_base_model() if flags else trainer.model, torch.zeros(1, tokens, dtype=torch.long)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    saved = {}

    def count(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "--bf16"):
        output = decoder.train().base_model(input_ids=row, use_cache=False, max_length_q=tokens,
                                            cu_seq_lens_q=torch.tensor([0, tokens]))
    real = sum(storage.nbytes() for address, storage in saved.items() if address not in weights)
    assert output.last_hidden_state.requires_grad
    assert stored == pytest.approx(real, rel=0.1)


def test_gradient_checkpointing_auto(train, monkeypatch, capsys):
    trainer = train("--max_steps", 1, "--use_lora")
    assert "gradient checkpointing" not in capsys.readouterr().out  # nothing was decided that costs anything
    assert not trainer.model.get_base_model().model.layers[0].gradient_checkpointing
    monkeypatch.setattr(memory, "RESERVE", 0.99)
    trainer = train("--max_steps", 1, "--use_lora", "--memory_limit", 0.1)
    assert "gradient checkpointing is on" in capsys.readouterr().out
    assert trainer.model.get_base_model().model.layers[0].gradient_checkpointing
    assert logged(trainer, "grad_norm")[0][0] > 0
    with pytest.raises(UserError, match="True, False or auto"):
        train("--gradient_checkpointing", "sometimes")
