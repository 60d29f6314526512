"""How much memory training takes, from a config alone: against sums done by hand, and real optimizers."""

from types import SimpleNamespace

import psutil
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from peft import LoraConfig
from transformers import Qwen2Config, Qwen3Config, Trainer, TrainingArguments

from mechanisms import fitting, frugal, memory
from mechanisms.errors import UserError
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
CPU = torch.device("cpu")


def plan(limit=1000, checkpointing=None, items=2, certain=True, **settings):
    """A run of the 7B with rows of 2,048 tokens an item; limit: GB."""
    return fitting.Plan(Setup(QWEN_7B, **settings), checkpointing, items, 8, lambda items: 2048 * items, certain,
                        limit * 1e9, lambda: LORA)


@pytest.mark.parametrize("settings, weights, gradients, optimizer, offloaded", [
    ({}, 4 * WEIGHTS, 4 * WEIGHTS, 8 * WEIGHTS, 0),
    ({"ranks": 2}, 4 * WEIGHTS, 4 * WEIGHTS, 8 * WEIGHTS, 0),
    ({"ranks": 2, "accumulates": True}, 4 * WEIGHTS, 8 * WEIGHTS, 8 * WEIGHTS, 0),
    ({"ranks": 8, "stage": 1, **BF16}, 2 * WEIGHTS, 4 * WEIGHTS, 12 * WEIGHTS / 8, 0),
    ({"ranks": 8, "stage": 2, **BF16}, 2 * WEIGHTS, 4 * WEIGHTS / 8, 12 * WEIGHTS / 8, 0),
    ({"ranks": 8, "stage": 3, **BF16}, 2 * WEIGHTS / 8, 4 * WEIGHTS / 8, 12 * WEIGHTS / 8, 0),
    ({"ranks": 8, "stage": 2, "offload_optimizer": True, **BF16}, 2 * WEIGHTS, 2 * WEIGHTS / 8, 0, 16 * WEIGHTS / 8),
    ({"ranks": 8, "stage": 3, "offload_optimizer": True, "offload_weights": True, **BF16},
     0, 2 * WEIGHTS / 8, 0, 18 * WEIGHTS / 8),
    ({"adapter": LORA}, 2 * WEIGHTS + 4 * ADAPTERS, 4 * ADAPTERS, 8 * ADAPTERS, 0),
    ({"adapter": LORA, "ranks": 4, "stage": 3, **BF16},
     2 * (WEIGHTS + ADAPTERS) / 4, 4 * ADAPTERS / 4, 12 * ADAPTERS / 4, 0),
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


def test_one_layer_is_counted_as_each_of_several():
    """The network is measured with more layers than this one has."""
    one, two, three = (memory.activation_bytes(Setup(Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16), device=torch.device("cpu")), 100)[0] for layers in (1, 2, 3))
    assert three - two == pytest.approx(two - one) and one > 0


@pytest.mark.slow
def test_an_unknown_optimizer_counts_as_adamw_and_is_named():
    known, unknown = (plan(adapter=LORA, device=torch.device("cpu"), optim=optim)
                      for optim in ("adamw_torch", "galore_adamw"))
    assert memory.training_state(unknown.setup)[:4] == memory.training_state(known.setup)[:4]
    assert "--optim galore_adamw" in fitting.decide(unknown)[1]
    assert "--optim" not in fitting.decide(known)[1]


@pytest.mark.parametrize("optim, optim_args", [
    ("adamw_torch", None), ("adamw_torch_fused", None), ("adafactor", None), ("ademamix", None), ("sgd", None),
    ("sgd", "momentum=0.9"), ("adagrad", None), ("rmsprop", None), ("rmsprop", "momentum=0.9"), ("adamw_8bit", None),
    ("adamw_bnb_8bit", None), ("ademamix_8bit", None), ("lion_8bit", None), ("lion_32bit", None),
    ("paged_adamw_32bit", None), ("paged_adamw_8bit", None), ("paged_lion_8bit", None), ("rmsprop_bnb_8bit", None)])
def test_bytes_of_optimizers(optim, optim_args, tmp_path, monkeypatch):
    # bitsandbytes remembers, for the whole process, which numbers of parameters an earlier run kept in 32 bits.
    monkeypatch.setattr(GlobalOptimManager, "_instance", None)
    arguments = TrainingArguments(output_dir=tmp_path, optim=optim, optim_args=optim_args, use_cpu=True)
    optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weight = torch.nn.Parameter(torch.randn(512, 512))
    optimizer = optimizer([weight], **options)
    weight.grad = torch.randn(512, 512)
    optimizer.step()
    held = sum(tensor.nbytes for tensor in optimizer.state[weight].values() if torch.is_tensor(tensor))
    assert memory.optimizer_bytes(optim, optim_args) == pytest.approx(held / weight.numel(), abs=0.02)


# -- what fits --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_checkpointing_by_what_fits():
    lora = {"adapter": LORA, "device": CPU}
    need = fitting.Need.of(plan(**lora))
    without, with_it = (need.total(checkpointing) / 1e9 for checkpointing in (False, True))
    assert without > 1.5 * with_it
    for limit, checkpointing in ((without / 0.84, False), (without / 0.86, True), (with_it * 1.01, True)):
        decided, line = fitting.decide(plan(limit, **lora))
        assert decided.checkpointing == checkpointing
        assert f"checkpointing is {'on' if checkpointing else 'off'}: a row of 4,096 tokens needs about" in line
    for asked, limit in ((True, with_it), (False, without)):
        assert fitting.decide(plan(limit * 1.01, asked, **lora))[0].checkpointing == asked
        with pytest.raises(UserError, match="does not fit"):
            fitting.decide(plan(limit * 0.99, asked, **lora))
    with pytest.raises(UserError, match="does not fit"):
        fitting.decide(plan(with_it * 0.99, **lora))


@pytest.mark.slow
def test_a_row_that_may_never_come_refuses_no_run():
    lora = {"adapter": LORA, "device": CPU}
    held = sum(memory.training_state(Setup(QWEN_7B, LORA))[:3]) / 1e9
    assert fitting.decide(plan(held * 1.01, certain=False, **lora))[0].checkpointing
    with pytest.raises(UserError, match="does not fit"):
        fitting.decide(plan(held * 0.99, certain=False, **lora))


@pytest.mark.slow
def test_what_fits_is_named_in_the_order_of_its_cost(monkeypatch):
    """For a GPU, by its numbers alone, and 20 GB of RAM."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20e9))
    gpu = torch.device("cuda")

    def fits(**settings):
        return [line.strip() for line in fitting.what_fits(plan(device=gpu, **settings), False).strip().split("\n")]

    head, *ways = fits(limit=55, ranks=4)
    assert head == ("What fits, the cheapest first, each with --gradient_checkpointing True "
                    "--per_device_train_batch_size 1 --gradient_accumulation_steps 16:")
    assert [way.rpartition(": about ")[0] for way in ways] == [
        "--deepspeed ds_config_zero3.json", "--use_lora", "--q_lora", "on 8 GPUs, --deepspeed ds_config_zero3.json"]
    small = fits(limit=1000, items=1)
    assert small[0].endswith(" with --gradient_checkpointing True:") and small[1].startswith("--gradient_checkpointing")
    assert [way.partition(":")[0] for way in fits(limit=14.5, adapter=LORA, items=1)[1:]] == [
        "--deepspeed ds_config_zero3_offload.json", "--q_lora", "on 4 GPUs, --deepspeed ds_config_zero3.json"]
    assert "Nothing that this program has makes it fit" in fits(limit=0.1, adapter=LORA)[0]


@pytest.mark.slow
def test_weights_are_held_in_bf16_where_fp32_does_not_fit():
    full = plan(device=CPU)._replace(frugal=frugal.setup(Setup(QWEN_7B, device=CPU)))
    least = [fitting.Need.of(full._replace(setup=setup)).total(True) / 1e9 for setup in (full.setup, full.frugal)]
    assert least[1] < 0.6 * least[0]
    for limit, in_bf16 in ((least[0] * 1.01, False), (least[0] * 0.99, True), (least[1] * 1.01, True)):
        decided, line = fitting.decide(full._replace(limit=limit * 1e9))
        assert decided.setup.frugal == in_bf16 and ("held in bf16" in line) == in_bf16
    with pytest.raises(UserError, match="does not fit"):
        fitting.decide(full._replace(limit=least[1] * 0.99e9))
    state = memory.training_state(full.frugal)
    assert sum(state[:3]) == pytest.approx((2 + 2 + 2 * (1 + 4 / 256)) * WEIGHTS)


@pytest.mark.slow
def test_evaluation_may_be_what_takes_most():
    """Its batches are as long as --per_device_eval_batch_size makes them, 64 samples of 2,048 tokens."""
    lora = plan(adapter=LORA, device=CPU, items=1, checkpointing=True)
    evaluated = lora._replace(evaluated=lambda items: 2048 * items, evaluation_items=64)
    few, many = (fitting.Need.of(each).total(True) / 1e9 for each in (
        evaluated._replace(evaluation_items=1), evaluated))
    assert few == fitting.Need.of(lora).total(True) / 1e9 < 0.8 * many
    with pytest.raises(UserError, match=r"more in evaluation [\d.]+\), and .*\n.* each with "
                                        r"--per_device_eval_batch_size 1:"):
        fitting.decide(evaluated._replace(limit=many * 0.99e9))


@pytest.mark.parametrize("settings, working", [
    ({}, (0, 0)), ({"optim": "adamw_torch"}, (0, 4 * WEIGHTS)), ({"stage": 2, "ranks": 8, **BF16}, (2 * 2 * 2e8, 0)),
    ({"stage": 3, "ranks": 8, **BF16}, (2e9, 4 * WEIGHTS / 8)), ({"stage": 3, "ranks": 1, **BF16}, (2e9, 4e9)),
    ({"stage": 3, "ranks": 8, "device": CPU, **BF16}, (0, 0))])
def test_what_is_held_for_a_while(settings, working):
    """Buffers of ZeRO, the weights that ZeRO-3 gathers, and what an optimizer makes of all weights at once."""
    setup = Setup(QWEN_7B, **settings)
    assert memory.working_bytes(setup, memory.training_state(setup)) == working
