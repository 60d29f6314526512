"""Every kind of result, opened by transformers 4.57, which many servers run: nothing is lost on the way.

Other programs: bash tests/serving/run.sh.
"""

import json
import shutil
import subprocess

import pytest
from peft import LoraConfig

from mechanisms.serving import adapter_hint
from tests.serving import readers, results

KINDS = {"base, full", "chat, full", "chat with YaRN, full", "adapter", "merged LoRA", "merged Q-LoRA", "GPTQ, 4 bits",
         "Qwen-1, full"}


@pytest.fixture(scope="module")
def environments(pytestconfig):
    """Where transformers 4.57 is installed; it stays there for the next time."""
    root = pytestconfig.cache.mkdir("readers")
    try:
        readers.install("transformers", root)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"transformers 4.57 cannot be installed: {error}")
    return root


@pytest.fixture(scope="module")
def written(environments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    results.write_results(folder)
    return folder


def test_transformers_4_reads_every_kind_of_result(written, environments):
    found = {row.pop("kind"): row for row in readers.read("transformers", written, environments)}
    everything = {"version": "4.57.3", "ids": True, "rope": True, "logits": True, "answers": True}
    assert found == {kind: everything for kind in KINDS} | {
        "GPTQ, 4 bits": {"version": "4.57.3", "ids": True, "rope": True}}


def edit(path, change):
    settings = json.loads(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")


def test_what_transformers_5_writes_alone_is_seen_to_be_wrong(written, environments, tmp_path):
    """The faults that mechanisms/compatibility.py guards against, put back."""
    base, chat = "base, full", "chat, full"
    described = json.loads((written / "expected.json").read_text(encoding="utf-8"))
    described["results"] = {kind: described["results"][kind] for kind in (base, chat)}
    (tmp_path / "expected.json").write_text(json.dumps(described))
    folders = {kind: result["folder"] for kind, result in described["results"].items()}
    for folder in folders.values():
        shutil.copytree(written / folder, tmp_path / folder)
        shutil.copy(written / f"{folder}.logits.safetensors", tmp_path)
    edit(tmp_path / folders[base] / "config.json", lambda config: config.pop("rope_theta"))
    edit(tmp_path / folders[chat] / "tokenizer_config.json", lambda settings: settings.update(
        extra_special_tokens=settings.pop("additional_special_tokens")))
    found = {row["kind"]: row for row in readers.read("transformers", tmp_path, environments)}
    assert found[base]["ids"] is True and "instead of" in found[base]["rope"]
    assert "they differ by" in found[base]["logits"]
    assert "AttributeError" in found[chat]["error"]


@pytest.mark.parametrize("changes, rank", [
    ({"r": 16}, 16), ({"r": 9}, 16), ({"r": 513}, None), ({"modules_to_save": ["embed_tokens"]}, None),
    ({"trainable_token_indices": [1, 2]}, None), ({"bias": "all"}, None), ({"use_dora": True}, None)])
def test_vllm_is_named_for_adapters_that_it_takes(changes, rank):
    config = LoraConfig(base_model_name_or_path="my models/base", **changes)
    line = (f"  vLLM:  vllm serve 'my models/base' --tokenizer out/Run --enable-lora --max-lora-rank {rank} "
            "--lora-modules run=out/Run")
    assert adapter_hint("out/Run", config) == ([line] if rank else [])
