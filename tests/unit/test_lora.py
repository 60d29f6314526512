"""Which layers get an adapter: the network's own where none are named, else those named and no others."""

import pytest
import transformers

from finetune import parse_arguments
from mechanisms.loading import fit_arguments

SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 96}
USUAL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
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
