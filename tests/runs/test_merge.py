"""merge_lora.py: every kind of adapter becomes one folder that says the same, and a folder that does not is caught."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, modeling_utils

import merge_lora
from mechanisms.errors import UserError
from mechanisms.loading import load_to_answer
from mechanisms.serving import modelfile

ROOT = Path(merge_lora.__file__).parent
FILES = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
         "tokenizer.json", "tokenizer_config.json"}


def merge(adapter, out, *flags):
    merge_lora.merge(["--adapter_path", str(adapter), "--output_dir", str(out), *map(str, flags)])


def answer(folder, messages):
    """The greedy answer of the model in `folder`, loaded with nothing but its name."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=40)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["lora", "full", "chatml", "nf4", "gptq"])
def test_every_kind_of_adapter(make_adapter, taught, kind, tied, tmp_path, capsys):
    out, original = tmp_path / "merged", make_adapter.original(kind, tied)
    if kind == "gptq":
        with pytest.raises(UserError, match=r"Int4 is quantized \(GPTQ\), .* as --base_model"):
            merge(make_adapter(kind, tied), out)
        assert not list(tmp_path.iterdir())
    merge(make_adapter(kind, tied), out, *(["--base_model", original] if kind == "gptq" else []))
    assert {path.name for path in out.iterdir()} == FILES and [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert [answer(out, messages) for messages, _ in taught] == [words for _, words in taught]
    config = AutoConfig.from_pretrained(out)
    assert config.tie_word_embeddings is tied and config.use_cache
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) is not tied
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|im_end|>" and config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(out).eos_token_id
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f'base_model: "{original}"' in card and card.count("---\n") == 2
    assert "library_name: transformers" in card and "| lora_r | 16 |" in card
    said = capsys.readouterr().out
    for line in ("tensors, bit by bit", "3, byte by byte", "greedy answers  3, token by token", f"vllm serve {out}",
                 f"sglang serve --model-path {out}", f"mlx_lm.server --model {out}",
                 f"python chat.py {out}", f"llama-server -m {out}/model.gguf"):
        assert line in said


def test_the_real_command(make_adapter, tmp_path):
    """In another folder, into 16 bits and small files; a second run does not write over the first."""
    command = [sys.executable, str(ROOT / "merge_lora.py"), "--adapter_path", str(make_adapter("lora")),
               "--output_dir", "merged", "--dtype", "bfloat16", "--max_shard_size", "100KB", "--ollama"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    assert "ollama create merged -f merged/Modelfile" in result.stdout and "GPT" not in result.stdout + result.stderr
    out = tmp_path / "merged"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2 and (out / "Modelfile").exists()
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    again = subprocess.run([*command, "--bogus"], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert again.returncode == 2 and "unknown flag --bogus" in again.stderr
    with pytest.raises(UserError, match="is not empty"):
        merge(make_adapter("lora"), out)


# ---------------------------------------------------------------------------------------------------------------------
# Faults planted between saving and verifying
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def merged(make_adapter, tmp_path_factory):
    """(folder, reference) as `verify` gets them, of a model in several shards."""
    caught = []

    def catch(*arguments):
        caught.extend(arguments)
        return [("verified", "later")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_lora, "verify", catch)
        out = tmp_path_factory.mktemp("merged") / "merged"
        merge(make_adapter("full"), out, "--max_shard_size", "300KB")
    return out, caught[1]


def change_weights(folder, change):
    path = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def one_bit(tensors):
    tensors[sorted(tensors)[0]].view(torch.int32).flatten()[7] ^= 1


def edit(name, old, new):
    def plant(folder):
        text = (folder / name).read_text(encoding="utf-8")
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    return plant


def swap_two_words(folder):
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = data["model"]["vocab"]
    vocabulary["W"], vocabulary["Z"] = vocabulary["Z"], vocabulary["W"]
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")


def cut(folder):
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "one bit of one weight": (lambda folder: change_weights(folder, one_bit), r"weights that are not .*: \w+\.\w+"),
    "a weight left out": (lambda folder: change_weights(folder, lambda tensors: tensors.pop(sorted(tensors)[0])),
                          r"weights that are not .*: \w+\.\w+|its weights cannot be read"),
    "a shard cut short": (cut, "its weights cannot be read"),
    "a shard missing": (lambda folder: sorted(folder.glob("model-*"))[1].unlink(), "files are missing: model-00002-of"),
    "the embeddings untied": (edit("config.json", '"tie_word_embeddings": true', '"tie_word_embeddings": false'),
                              "weights that are not .*: lm_head.weight"),
    "another default system message": (edit("chat_template.jinja", "helpful assistant", "useful assistant"),
                                       "its chat template makes other prompts"),
    "other words about tools": (edit("chat_template.jinja", "Functions you may call", "Functions"),
                                "its chat template makes other prompts"),
    "other ids": (swap_two_words, "its tokenizer makes other tokens"),
    "a damaged tokenizer": (edit("tokenizer.json", "{", ""), "its tokenizer cannot be loaded"),
    **{f"{name} missing": (lambda folder, name=name: (folder / name).unlink(), f"files are missing: {name}")
       for name in sorted(FILES - {"model.safetensors"})}}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(merged, fault, tmp_path):
    folder, reference = tmp_path / "copy", merged[1]
    shutil.copytree(merged[0], folder)
    plant, message = FAULTS[fault]
    plant(folder)
    with pytest.raises(UserError, match=message):
        merge_lora.verify(folder, reference)


def test_the_folder_itself_passes(merged):
    assert dict(merge_lora.verify(*merged))["greedy answers"] == "3, token by token"


def test_a_wrong_merge_is_caught(merged):
    """Faults that were made before saving: the weights are those in memory, but not those of base and adapter."""
    folder, reference = merged
    answers = [reference.answers[0]._replace(logits=reference.answers[0].logits * 1.01)]
    with pytest.raises(UserError, match="its logits are .* away"):
        merge_lora.verify(folder, reference._replace(answers=answers))
    answers[0].logits[3, 5] = torch.nan
    with pytest.raises(UserError, match="its logits are nan"):
        merge_lora.verify(folder, reference._replace(answers=answers))


def test_another_greedy_answer_is_caught(merged, monkeypatch):
    """One word is another, while the logits as a whole are close."""
    folder, reference = merged
    monkeypatch.setitem(merge_lora.TOLERANCE, torch.float32, 0.15)
    answer = reference.answers[0]
    changed = answer._replace(ids=answer.ids.clone(), logits=answer.logits.clone())
    likeliest, second = changed.logits[-1].topk(2).indices
    changed.ids[0, -1] = second
    for lead, same in ((0.1, True), (0.5, False)):  # in the one, rounding may have decided
        changed.logits[-1, second] = changed.logits[-1, likeliest] + lead * answer.logits.std()
        if same:
            merge_lora.verify(folder, reference._replace(answers=[changed]))
        else:
            with pytest.raises(UserError, match="its greedy answer is another: after"):
                merge_lora.verify(folder, reference._replace(answers=[changed]))


def test_a_fault_leaves_no_folder(make_adapter, tmp_path, monkeypatch, capsys):
    verify, out = merge_lora.verify, tmp_path / "merged"

    def planted(folder, reference):
        edit("chat_template.jinja", "helpful", "useful")(Path(folder))
        return verify(folder, reference)

    monkeypatch.setattr(merge_lora, "verify", planted)
    with pytest.raises(SystemExit) as stop:
        merge_lora.main(["--adapter_path", str(make_adapter("lora")), "--output_dir", str(out)])
    assert stop.value.code == 2 and not out.exists()
    errors = capsys.readouterr().err
    assert "not what base and adapter are: its chat template makes other prompts" in errors
    assert f"{out}.unfinished holds the faulty result" in errors


def test_a_kill_leaves_no_folder_that_looks_complete(make_adapter, tmp_path, taught):
    """Killed before and while the weights are written, before the last file, and while they are compared."""
    out, flags = tmp_path / "merged", ["--max_shard_size", "100KB"]
    for module, function, calls in ((merge_lora, "save", 1), (modeling_utils, "safe_save_file", 2),
                                    (merge_lora, "write", 1), (merge_lora, "verify", 1), (merge_lora, "compare", 3)):
        process = os.fork()
        if process == 0:
            try:
                signal.alarm(100)
                done, calls_left = getattr(module, function), iter(range(calls - 1))

                def killed(*arguments, done=done, calls_left=calls_left, **options):
                    if next(calls_left, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return done(*arguments, **options)

                setattr(module, function, killed)
                merge(make_adapter("lora"), out, *flags)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
        assert [path.name for path in tmp_path.iterdir()] == ([] if function == "save" else ["merged.unfinished"])
        with pytest.raises(UserError, match="no such folder"):
            load_to_answer(str(out))
    merge(make_adapter("lora"), out, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"] and answer(out, taught[0][0]) == taught[0][1]


@pytest.mark.parametrize("line", [None, "Merged"])
def test_ctrl_c_ends_with_one_line(make_adapter, wait_for, tmp_path, line):
    """While libraries are imported (line None), and in the middle of the work."""
    run = subprocess.Popen([sys.executable, str(ROOT / "merge_lora.py"), "--adapter_path", str(make_adapter("lora")),
                            "--output_dir", str(tmp_path / "merged")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    wait_for(run, line)
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=100)[1] == "\ninterrupted\n" and run.returncode == 130
    assert not (tmp_path / "merged").exists()


def test_memory_holds_one_copy_of_the_model(make_model, tmp_path):
    """Measured on 1 GB of random weights; the limit leaves room for the activations of the questions."""
    base, adapter = tmp_path / "base-chat", tmp_path / "adapter"
    AutoTokenizer.from_pretrained(make_model()).save_pretrained(base)
    config = AutoConfig.from_pretrained(make_model())
    config.update({"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 5, "num_attention_heads": 16,
                   "layer_types": ["full_attention"] * 5})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(base)
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    del model
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=8,
                                                                               target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(adapter, save_embedding_layers=False)
    del model
    program = ("import re, sys, peft, merge_lora\n"  # (getrusage would count the memory of this process in)
               "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
               "before = peak()\n"
               "merge_lora.merge(sys.argv[1:])\n"
               "print('grown by', peak() - before)")
    run = subprocess.run([sys.executable, "-c", program, "--adapter_path", str(adapter), "--output_dir",
                          str(tmp_path / "merged")], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    copies = int(run.stdout.split()[-1]) * 1024 / size
    print(f"{size / 1e9:.2f} GB of weights, {copies:.2f} copies in memory at most")
    assert size > 1e9 and 0.9 < copies < 1.3
    shutil.rmtree(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Moved folders, wrong folders, ties
# ---------------------------------------------------------------------------------------------------------------------

def test_moved_adapter_and_moved_base(make_adapter, taught, tmp_path):
    adapter, base = tmp_path / "elsewhere", tmp_path / "moved base"
    shutil.copytree(make_adapter("lora"), adapter)
    shutil.copytree(make_adapter.base("lora"), base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/gone/base"}))
    with pytest.raises(UserError, match="base model of .*elsewhere is /gone/base, .* --base_model"):
        merge(adapter, tmp_path / "merged")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    merge(adapter, tmp_path / "merged", "--base_model", base)
    assert answer(tmp_path / "merged", taught[0][0]) == taught[0][1]
    assert json.dumps(str(base)) in (tmp_path / "merged" / "README.md").read_text()


def test_an_adapter_without_tokenizer_gets_that_of_its_base(make_adapter, taught, tmp_path):
    """As peft alone saves adapters, and other programs do."""
    adapter = tmp_path / "bare"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(make_adapter("full") / name, adapter)
    merge(adapter, tmp_path / "merged")
    assert answer(tmp_path / "merged", taught[0][0]) == taught[0][1]


@pytest.mark.parametrize("ending", ["GPTQ-Int4", "bnb-4bit", "unsloth-bnb-4bit"])
def test_a_quantized_base_needs_the_original(make_adapter, tmp_path, ending):
    quantized, adapter = tmp_path / f"Some-Chat-{ending}", tmp_path / "adapter"
    shutil.copytree(make_adapter.base("lora"), quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (quantized / "config.json").write_text(json.dumps(config))
    shutil.copytree(make_adapter("lora"), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(quantized)}))
    with pytest.raises(UserError, match=r"is quantized \(GPTQ\), .* as --base_model \(by its name, .*Some-Chat\)"):
        merge(adapter, tmp_path / "merged")
    with pytest.raises(UserError, match=r"is quantized \(GPTQ\)"):
        merge(make_adapter("lora"), tmp_path / "merged", "--base_model", quantized)
    merge(adapter, tmp_path / "merged", "--base_model", make_adapter.base("lora"))


@pytest.mark.parametrize("case, message", [
    ("missing", "no such folder"), ("model", "is a whole model: there is nothing to merge"),
    ("empty", "holds neither a model"), ("damaged", "adapter_config.json is damaged"),
    ("no weights", "weights of the adapter .* cannot be loaded"),
    ("cut weights", "weights of the adapter .* cannot be loaded"), ("narrower base", "does not fit .*size mismatch"),
    ("deeper base", "does not fit .*are missing in it"), ("no base", "--base_model /nowhere: no such folder"),
    ("shard size", "--max_shard_size 2"), ("no place", "cannot be made"), ("not a folder", "is not empty")])
def test_what_cannot_be_merged(case, message, make_adapter, make_model, tmp_path):
    adapter, flags, out = tmp_path / "adapter", [], tmp_path / "merged"
    shutil.copytree(make_adapter("lora"), adapter)
    if case == "missing":
        adapter = tmp_path / "nowhere"
    elif case == "model":
        adapter = make_model()
    elif case == "empty":
        adapter = tmp_path / "nothing"
        adapter.mkdir()
    elif case == "damaged":
        (adapter / "adapter_config.json").write_text("{")
    elif case == "no weights":
        (adapter / "adapter_model.safetensors").unlink()
    elif case == "cut weights":
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        (adapter / "adapter_model.safetensors").write_bytes(weights[:-10])
    elif case == "narrower base":
        flags = ["--base_model", make_model(hidden_size=32)]
    elif case == "deeper base":
        flags = ["--base_model", make_model(num_layers=3)]
    elif case == "no base":
        flags = ["--base_model", "/nowhere"]
    elif case == "shard size":
        flags = ["--max_shard_size", "2"]
    elif case == "no place":
        (tmp_path / "file").touch()
        out = tmp_path / "file" / "merged"
    elif case == "not a folder":
        out.touch()
    with pytest.raises(UserError, match=message):
        merge(adapter, out, *flags)
    assert out.is_file() or not out.exists()
    assert not Path(f"{out}.unfinished").exists()


def test_a_full_disk_is_named(make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(UserError, match="--output_dir: 0.0 GB are needed there, and 0.0 GB are free"):
        merge(make_adapter("lora"), tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trained", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["lm_head"]},
                                     {"target_modules": ["lm_head"]}, {"target_modules": ["embed_tokens"]}])
def test_training_that_breaks_the_tie(make_adapter, make_model, trained, tmp_path, monkeypatch):
    """Adapters of other programs (or of --lora_target_modules lm_head) that change one of two tied layers only."""
    base = AutoModelForCausalLM.from_pretrained(make_model())
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **trained}))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").tie_word_embeddings is False
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# Ollama
# ---------------------------------------------------------------------------------------------------------------------

GO_TO_JINJA = {  # the words of the Modelfile's Go template; both languages trim white space at "-"
    "range .Messages": ("for message in Messages", "for"), "if .System": ("if System", "if"),
    'if or (eq .Role "user") (eq .Role "assistant")': ("if message.role in ('user', 'assistant')", "if"),
    ".System": "System", ".Role": "message.role", ".Content": "message.content"}


def render_as_ollama(modelfile, messages):
    """The prompt that Ollama makes of the messages."""
    opened = []

    def translate(match):
        trim, words = match[1], match[2].strip()
        if words == "end":
            return f"{{%{trim} end{opened.pop()} %}}"
        jinja = GO_TO_JINJA[words]
        if isinstance(jinja, str):
            return f"{{{{{trim} {jinja} }}}}"
        opened.append(jinja[1])
        return f"{{%{trim} {jinja[0]} %}}"

    go = re.search(r'TEMPLATE """(.*?)"""', modelfile, re.DOTALL)[1]
    template = jinja2.Environment(keep_trailing_newline=True).from_string(re.sub(r"{{(-?)(.*?)}}", translate, go))
    default = re.search(r'SYSTEM """(.*?)"""', modelfile, re.DOTALL)
    system = [turn["content"] for turn in messages if turn["role"] == "system"] or ([default[1]] if default else [""])
    return template.render(Messages=messages, System=system[0])


@pytest.mark.parametrize("name", ["tiny", "qwen2", "qwen2.5", "qwen3"])
def test_modelfile_makes_the_same_prompts(name, make_model, request):
    folder = make_model() if name == "tiny" else request.getfixturevalue("real_data") / "tokenizers" / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = modelfile(tokenizer, GenerationConfig(do_sample=True, temperature=0.7, top_k=20, repetition_penalty=1.1))
    for messages in merge_lora.QUESTIONS:
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert render_as_ollama(text, messages) == expected
    lines = text.splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert {'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|im_start|>"', "PARAMETER temperature 0.7",
            "PARAMETER top_k 20", "PARAMETER repeat_penalty 1.1"} <= set(lines)
    assert "PARAMETER temperature 0" in modelfile(tokenizer, GenerationConfig()).splitlines()


def test_ollama_is_refused_for_another_template(make_adapter, tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(make_adapter("lora"), adapter)
    edit("chat_template.jinja", "message.role + '\\n'", "message.role + ': '")(adapter)
    with pytest.raises(UserError, match="--ollama: this model's chat template is not plain ChatML"):
        merge(adapter, tmp_path / "merged", "--ollama")
    assert not (tmp_path / "merged").exists()
