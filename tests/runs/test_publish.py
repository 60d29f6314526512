"""--push_to_hub: every kind of result, uploaded to a stand-in of the Hub; what is refused before; the cards."""

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import yaml

import finetune
import merge_lora
import run_gptq
from examples.make_tiny_model import EXAMPLES
from mechanisms import card, publish, report
from mechanisms.errors import UserError
from tests.hub import TOKEN, serving


@pytest.fixture
def hub(monkeypatch):
    with serving() as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE",
                            running.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def uploaded(hub, name, folder, ours=()):
    """The one repository that there is holds the files of the folder byte by byte, but for those in `ours`. Its card
    names no folder as the base model, which the Hub refuses."""
    assert list(hub.files) == [name]
    here = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file() and path.name not in ours}
    there = dict(hub.files[name])
    text = there.pop("README.md").decode()
    own = here.pop("README.md").decode()
    assert there == here and "base_model:" in own and "base_model:" not in text and str(Path(folder).parent) not in text
    assert not any(TOKEN.encode() in content for content in here.values())
    return {**here, "README.md": text.encode()}


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def licensed(make_model):
    """A chat model whose card names its licence."""
    folder = Path(make_model(base=False))
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\nTiny.\n")
    yield folder
    (folder / "README.md").unlink()


@pytest.mark.parametrize("method", ["", "--use_lora"])
def test_a_finished_training_is_uploaded_and_nothing_beside_it(hub, train, licensed, tmp_path, method, capsys):
    data = tmp_path / "with one bad.jsonl"
    data.write_text((EXAMPLES / "data" / "messages.jsonl").read_text() + '{"messages": 1}\n')
    flags = ["--model_name_or_path", licensed, "--data_path", data, "--skip_bad_rows", 1, "--max_steps", 2,
             "--save_strategy", "steps", "--save_steps", 1, "--push_to_hub", *method.split()]
    train(*flags, "--hub_model_id", "ada/tiny", "--hub_private_repo", "True")
    said = capsys.readouterr()
    assert (tmp_path / "out" / "checkpoint-1").is_dir() and (tmp_path / "out" / "rejected.jsonl").exists()
    files = uploaded(hub, "ada/tiny", tmp_path / "out", (*publish.PRIVATE_FILES, report.PAGE, report.METRICS))
    assert hub.private == {"ada/tiny": True} and f"  Hub:   {hub.url}/ada/tiny\n" in said.out
    assert TOKEN not in said.out + said.err
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)
    text = files["README.md"].decode()
    assert metadata(text) == {
        "library_name": "peft" if method else "transformers",
        "pipeline_tag": "text-generation", "license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    manifest = json.loads((tmp_path / "out" / "checkpoint-2" / "complete.json").read_text())
    assert f"| digest of the samples | {manifest['run']['data']} |" in text
    assert re.search(r"^Loss: [\d.]+ `[▁█]{2}` [\d.]+$", text, re.MULTILINE)
    assert "| trained tokens |" in text and "| learning_rate | 0.001 |" in text
    loader = "AutoPeftModelForCausalLM" if method else "AutoModelForCausalLM"
    assert f'{loader}.from_pretrained("ada/tiny")' in text
    train(*flags)  # finished, and the name of the folder
    assert set(hub.files) == {"ada/tiny", "ada/out"} and hub.files["ada/out"].keys() == hub.files["ada/tiny"].keys()


def test_a_merged_model_is_uploaded(hub, make_adapter, tmp_path, capsys):
    merge_lora.merge(["--adapter_path", str(make_adapter("lora")), "--output_dir", str(tmp_path / "merged"),
                      "--push_to_hub"])
    files = uploaded(hub, "ada/merged", tmp_path / "merged")
    assert "model.safetensors" in files and f"Hub:        {hub.url}/ada/merged" in capsys.readouterr().out
    assert 'AutoModelForCausalLM.from_pretrained("ada/merged")' in files["README.md"].decode()


def test_a_quantized_model_is_uploaded(hub, make_model, tmp_path):
    run_gptq.run(["--model_name_or_path", str(make_model(base=False)), "--data_path", str(EXAMPLES / "data"),
                  "--out_path", str(tmp_path / "int4"), "--group_size", "32", "--max_samples", "20", "--push_to_hub",
                  "--hub_model_id", "ada/tiny-Int4"])
    files = uploaded(hub, "ada/tiny-Int4", tmp_path / "int4")
    assert metadata(files["README.md"].decode())["base_model_relation"] == "quantized"


@pytest.mark.parametrize("change, message", [
    ({"HF_TOKEN": "hf_other"}, "does not take the token of this machine"),
    ({"HF_TOKEN": "", "HF_TOKEN_PATH": "nowhere"}, "this machine has no token of the Hugging Face Hub: hf auth login"),
    ({"MODELSCOPE": "1"}, "MODELSCOPE is set"), ({"name": "eve/tiny"}, "--hub_model_id eve/tiny: no repository"),
    ({"name": "a b"}, "--hub_model_id a b: no repository")])
def test_who_may_not_upload_is_told_before_weights_are_loaded(hub, train, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(finetune, "load_weights", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        train("--push_to_hub", "--hub_model_id", change.get("name", "ada/tiny"))
    assert TOKEN not in str(error.value) and not hub.files


def test_an_upload_that_fails_leaves_the_result_and_the_command_that_tries_again(hub, tmp_path):
    (tmp_path / "my out").mkdir()
    (tmp_path / "my out" / "model.safetensors").write_bytes(b"weights")
    repository, hub.broken = publish.make_repository("tiny", None), True
    with pytest.raises(UserError, match="is finished, and not uploaded.*\n.*ada/tiny: ") as error:
        publish.upload(tmp_path / "my out", ["model.safetensors", "rejected.jsonl"], repository)
    assert f"hf upload ada/tiny '{tmp_path}/my out' --include model.safetensors\n" in str(error.value)
    assert not hub.files["ada/tiny"]


def test_a_trial_uploads_nothing(hub, train):
    train("--push_to_hub", "--dry_run")
    assert not hub.files


def test_the_licence_of_a_base_on_the_hub(hub, tmp_path, monkeypatch):
    """Asked for only where something is uploaded: else a run without a network would wait for it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub.files["ada/base"] = {"README.md": b"---\nlicense: apache-2.0\n---\nA base.\n"}
    text = card.head("ada/base", "peft", "text-generation", ask_hub=True)
    assert metadata(text)["license"] == "apache-2.0" and card.for_the_hub(text) == text
    assert card.base_metadata("ada/nothing", True) == {}
    hub.seen.clear()
    assert card.base_metadata("ada/other", False) == {} and not hub.seen


@pytest.mark.parametrize("losses, line", [
    ([], ""), ([2.0], ""), ([3.0, 1.0], "Loss: 3 `█▁` 1"), ([1.0] * 3, "Loss: 1 `▁▁▁` 1"),
    ([8 - number / 10 for number in range(80)], "Loss: 8 `███▇▇▇▇▇▇▆▆▆▆▆▅▅▅▅▅▅▄▄▄▄▄▄▃▃▃▃▃▂▂▂▂▂▂▁▁▁` 0.1")])
def test_the_loss_is_drawn(losses, line):
    drawn = card.loss_picture([{"loss": loss} for loss in losses] + [{"eval_loss": 1.0}])
    assert drawn.strip() == line
