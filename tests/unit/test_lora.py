"""Which layers get an adapter: the network's own where none are named, else those named and no others."""

import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import get_peft_model

from finetune import parse_arguments
from mechanisms.errors import UserError
from mechanisms.loading import check_trainable, fit_arguments
from mechanisms.lora import empty_network, lora_config, start_from_weights

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96}
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENIZER = SimpleNamespace(convert_tokens_to_ids=lambda tokens: list(range(len(tokens))))
DENSE, HYBRID = transformers.Qwen3Config(**SIZES), transformers.Qwen3_5TextConfig(**SIZES)


@pytest.fixture
def targets(capsys):
    """targets(config, *flags) -> (--lora_target_modules as it is trained, what was printed)."""

    def fit(config, *flags):
        _, _, training, lora = parse_arguments(["--data_path", "x", "--use_lora", *flags])
        fit_arguments(config, training, lora)
        return lora.lora_target_modules, capsys.readouterr().out

    return fit


def test_without_names_adapters_are_on_the_networks_own_layers(targets):
    names, said = targets(DENSE)
    assert names == USUAL and "mlp.up_proj x 4" in said and "not reached  none" in said
    names, said = targets(HYBRID)
    assert {*USUAL, "in_proj_qkv", "in_proj_z", "out_proj"} == set(names) and "linear_attn.out_proj x 3" in said


def test_names_are_taken_as_they_are_spelled_out(targets):
    names, said = targets(HYBRID, "--lora_target_modules", *USUAL)
    assert names == USUAL and "linear_attn.out_proj x 3" in said.split("not reached")[1]


def test_all_linear_is_every_linear_layer_but_the_output_layer(targets):
    names, said = targets(HYBRID, "--lora_target_modules", "all-linear")
    assert {*USUAL, "in_proj_a", "in_proj_b", "in_proj_qkv", "in_proj_z", "out_proj"} == set(names)
    assert "not reached  none" in said


@pytest.mark.parametrize("pattern, reached", [
    (r"model\.layers\.[02]\.self_attn\.(q|v)_proj", "self_attn.q_proj x 2, self_attn.v_proj x 2"),
    (r".*\.[0-9]{1,2}\.mlp\..*|lm_head", "mlp.gate_proj x 4, mlp.up_proj x 4, mlp.down_proj x 4, lm_head x 1")])
def test_a_regular_expression_reaches_what_it_matches_and_no_more(pattern, reached, targets):
    names, said = targets(DENSE, "--lora_target_modules", pattern)
    assert names == pattern and re.search(r"reached +(.*)", said)[1] == reached


def test_on_a_mixture_of_experts_a_regular_expression_is_that_too():
    """peft alone would take the last parts of what it matches, on all layers."""
    network = empty_network(transformers.Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=32))
    lora = parse_arguments(["--data_path", "x", "--use_lora", "--lora_embeddings", "none"])[3]
    lora.lora_target_modules = r"model\.layers\.0\.self_attn\..*"
    with torch.device("meta"):
        adapted = get_peft_model(network, lora_config("x", network, TOKENIZER, lora))
    assert {name.rpartition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A." in name} == {
        f"base_model.model.model.layers.0.self_attn.{name}" for name in USUAL[:4]}


@pytest.mark.parametrize("words, message", [
    (["q_proj", "c_fc"], "--lora_target_modules c_fc: no such layers in this model; it has down_proj"),
    ([".*c_fc"], "all-linear, or a regular expression"), (["model.q_proj"], "--lora_target_modules model.q_proj: no"),
    (["*q_proj"], "it is no regular expression: nothing to repeat")])
def test_targets_that_match_nothing_are_refused(words, message):
    _, _, training, lora = parse_arguments(["--data_path", "x", "--use_lora", "--lora_target_modules", *words])
    with pytest.raises(UserError, match=re.escape(message)):
        fit_arguments(DENSE, training, lora)
        check_trainable("x", DENSE, training, lora)


def test_dora_on_a_gptq_model_is_refused():
    config = transformers.Qwen3Config(**SIZES, quantization_config={"quant_method": "gptq", "bits": 4})
    _, _, training, lora = parse_arguments(["--data_path", "x", "--q_lora", "--use_dora"])
    with pytest.raises(UserError, match="--use_dora: peft has no DoRA for GPTQ layers"):
        check_trainable("x", config, training, lora)


@pytest.mark.parametrize("flags, message", [
    (["eva"], "--init_lora_weights eva: true, gaussian, olora, pissa or pissa_niter_N"),
    (["pissa_niter_x"], "pissa or pissa_niter_N"),
    (["pissa", "--q_lora"], "--q_lora: not with --init_lora_weights pissa"),
    (["olora", "--weight_decay", "0.1"], "Give --weight_decay 0")])
def test_starts_that_cannot_be_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["--data_path", "x", "--use_lora", "--init_lora_weights", *flags])


def test_peft_makes_the_start_that_is_its_own():
    flags = ["--data_path", "x", "--use_lora", "--lora_embeddings", "none", "--init_lora_weights"]
    for word, start in (("True", True), ("gaussian", "gaussian")):
        lora = parse_arguments([*flags, word])[3]
        assert lora_config("x", empty_network(DENSE), TOKENIZER, lora).init_lora_weights == start


@pytest.mark.parametrize("scale", [[], ["--use_rslora"]])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_begin_as_a_part_of_the_weights_train_as_peft_trains_them(start, scale):
    """The same gradient as with peft's own start, which changes the base model, and the base model's own loss."""
    lora = parse_arguments(["--data_path", "x", "--use_lora", "--lora_embeddings", "none", "--lora_r", "4",
                            "--lora_dropout", "0", "--lora_target_modules", "q_proj", "down_proj",
                            "--init_lora_weights", start, *scale])[3]
    ids, made = torch.arange(20)[None], []
    for own in (True, False):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(DENSE, dtype=torch.float32)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        loss = model(ids, labels=ids).loss
        config = lora_config("x", model, TOKENIZER, lora)
        if not own:
            config.init_lora_weights, config.r, config.lora_alpha = start, 4, lora.lora_alpha
        torch.manual_seed(1)
        model = get_peft_model(model, config)
        if own:
            torch.manual_seed(1)
            start_from_weights(model, start)
            for name, weight in model.named_parameters():
                if "lora_" not in name:
                    assert weight.equal(before[name.removeprefix("base_model.model.").replace(".base_layer", "")])
        assert model(ids, labels=ids).loss.item() == pytest.approx(loss.item(), abs=1e-6)
        model(ids, labels=ids).loss.backward()
        made.append({name: (weight.detach(), weight.grad) for name, weight in model.named_parameters()
                     if "lora_" in name})
    ours, pefts = made
    for name, (weight, gradient) in pefts.items():
        dim = 0 if "lora_A" in name else 1
        (first, second), (trained, fixed) = ours[name][0].chunk(2, dim), ours[name][1].chunk(2, dim)
        if start != "pissa_niter_4":  # which draws random numbers
            assert first.allclose(weight, atol=1e-6) and trained.allclose(gradient, atol=1e-6)
        assert second.equal(first if dim == 0 else -first) and not fixed.any() and trained.any()


def test_only_linear_layers_can_begin_as_a_part_of_their_weights():
    lora = parse_arguments(["--data_path", "x", "--use_lora", "--lora_embeddings", "none", "--init_lora_weights",
                            "olora", "--lora_target_modules", "embed_tokens"])[3]
    model = transformers.AutoModelForCausalLM.from_config(DENSE)
    model = get_peft_model(model, lora_config("x", model, TOKENIZER, lora))
    with pytest.raises(UserError, match="only linear layers have such a start, and .*embed_tokens is none"):
        start_from_weights(model, "olora")
