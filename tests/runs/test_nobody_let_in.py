"""Code in a model's folder, and pickles, do not run, and nothing asks whether they should."""

import builtins
import json
import os
import pickle
import shutil

import pytest
import torch

import finetune
from examples.make_tiny_model import EXAMPLES
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line


@pytest.fixture
def model(make_model, tmp_path):
    return shutil.copytree(make_model(), tmp_path / "model")


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """refused(model, *flags) -> the one line; nothing asked, and nothing named "ran" was made."""
    def ask(*_):
        raise AssertionError("something asks")

    def run(model, *flags):
        monkeypatch.setattr(builtins, "input", ask)
        monkeypatch.setattr("select.select", lambda *_: (_ for _ in ()).throw(AssertionError("something waits")))
        with pytest.raises(UserError) as error:
            finetune.train(prepare_command_line(finetune.__file__, [
                "--model_name_or_path", str(model), "--data_path", str(EXAMPLES / "data"), "--output_dir",
                str(tmp_path / "out"), "--cache_dir", str(tmp_path / "cache"), "--max_steps", "1", *map(str, flags)]))
        assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)
        return str(error.value)

    return run


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("model_type", ["t5", "vit", "qwen2_vl", "unknown"])
def test_code_in_a_models_folder_neither_runs_nor_is_asked_about(model, refused, tmp_path, model_type):
    (model / "modeling_x.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass X: pass\n")
    config = json.loads((model / "config.json").read_text())
    auto_map = {name: "modeling_x.X" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (model / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": auto_map}))
    refused(model)


def pickles(path, content):
    with open(path, "wb") as file:
        pickle.dump(content, file)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: pickles(path, content)])
def test_weights_that_are_a_pickle_with_code_are_refused(model, refused, tmp_path, write):
    (model / "model.safetensors").unlink()
    write({"model.embed_tokens.weight": Evil(tmp_path / "ran")}, model / "pytorch_model.bin")
    assert "cannot be loaded" in refused(model)


@pytest.mark.parametrize("kind", ["LORA", "XLORA"])
def test_an_adapter_that_is_a_pickle_with_code_is_refused(model, refused, tmp_path, kind):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": kind, "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], "hidden_size": 64,
        "adapters": {"0": str(adapter)}, "base_model_name_or_path": str(model)}))
    torch.save({"x": Evil(tmp_path / "ran")}, adapter / "adapter_model.bin")
    refused(model, "--use_lora", "--lora_weight_path", adapter)
