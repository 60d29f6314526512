"""Qwen-1 folders: converted exactly, trained, merged and talked to by the programs as they stand, or refused.

The originals here are made of a tiny Qwen2 model by renaming backwards; real ones, and what the original code computed
on them, are in REAL_DATA.
"""

import base64
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import chat
import finetune
import merge_lora
import run_gptq
from examples.make_tiny_model import EXAMPLES, example_texts, make_tokenizer, strings
from mechanisms import qwen1, qwen1_tokenizer
from mechanisms.errors import UserError
from mechanisms.flags import prepare_command_line
from mechanisms.paths import source_name
from mechanisms.tokenizer import is_base_model
from tests.ranks.test_strategies import torchrun

LAYERS, WIDTH = 2, 64
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
           r"|\s+(?!\S)|\s+")  # Qwen-1's own
TEXTS = ["Hello, I'm HERE'S  the\t\r\n\r\nend  ", "cafe\u0301 \uac00\u1100\u1161 \u212b", "通义千问，你好！１２３ 4567",
         "\U0001f469\u200d\U0001f467" * 3,
         "<|im_start|>user\n1+1<|im_end|>\n<|extra_0|><|extra_204|><|endoftext|><|im_middle|>", "", " ", "a" * 99,
         "def f(x):\n    return {'a': x[1:]}  # \u3000\u00a0\u0085 done\n\n\n"]


# ---------------------------------------------------------------------------------------------------------------------
# Originals
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ranks():
    """{token as bytes: rank} of a tokenizer trained here."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    vocabulary = make_tokenizer(example_texts(), 1024).backend_tokenizer.get_vocab(with_added_tokens=False)
    return {bytes(letters[letter] for letter in token): rank for token, rank in vocabulary.items()}


@pytest.fixture(scope="module")
def network(ranks):
    """The Qwen2 model that every original here is made of, float32."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(ranks) + 256, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, rms_norm_eps=1e-5,
        initializer_range=0.1)).eval()
    for name, parameter in model.named_parameters():  # what is zero or one by default would not be missed
        if name.endswith("bias") or "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def tensors(network):
    """The weights under the names of Qwen-1, in the order of its checkpoints."""
    new = network.state_dict()
    old = {"transformer.wte.weight": new["model.embed_tokens.weight"]}
    for layer in range(LAYERS):
        before, now = f"transformer.h.{layer}.", f"model.layers.{layer}."
        old |= {before + "ln_1.weight": new[now + "input_layernorm.weight"],
                before + "ln_2.weight": new[now + "post_attention_layernorm.weight"],
                before + "attn.c_proj.weight": new[now + "self_attn.o_proj.weight"],
                before + "mlp.w1.weight": new[now + "mlp.up_proj.weight"],
                before + "mlp.w2.weight": new[now + "mlp.gate_proj.weight"],
                before + "mlp.c_proj.weight": new[now + "mlp.down_proj.weight"]}
        for kind in ("weight", "bias"):
            old[f"{before}attn.c_attn.{kind}"] = torch.cat([new[f"{now}self_attn.{part}_proj.{kind}"]
                                                            for part in "qkv"])
    return old | {"transformer.ln_f.weight": new["model.norm.weight"], "lm_head.weight": new["lm_head.weight"]}


CONFIG = {"architectures": ["QWenLMHeadModel"], "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig"},
          "model_type": "qwen", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS,
          "num_attention_heads": 2, "kv_channels": WIDTH // 2, "layer_norm_epsilon": 1e-5, "rotary_emb_base": 5000,
          "rotary_pct": 1.0, "seq_length": 512, "max_position_embeddings": 2048, "no_bias": True,
          "tie_word_embeddings": False, "scale_attn_weights": True, "emb_dropout_prob": 0.0, "bf16": False}


@pytest.fixture(scope="module")
def original(ranks, tensors, tmp_path_factory):
    """original(name, form, files, line_end, tensors, **config) -> a new Qwen-1 folder of that name."""

    def make(name="Qwen-mini-Chat", form="safetensors", files=1, line_end=b"\n", tensors=tensors, **config):
        folder = tmp_path_factory.mktemp("original") / name
        folder.mkdir()
        settings = {**CONFIG, "vocab_size": len(ranks) + 256, **config}
        (folder / "config.json").write_text(json.dumps({
            name: value for name, value in settings.items() if value is not None}))
        (folder / "qwen.tiktoken").write_bytes(line_end.join(
            base64.b64encode(token) + b" %d" % rank for token, rank in sorted(ranks.items(), key=lambda item: item[1]))
            + line_end)
        chat_format = "chatml" if "Chat" in name else "raw"
        (folder / "generation_config.json").write_text(json.dumps({
            "chat_format": chat_format, "eos_token_id": 1, "pad_token_id": 1, "max_window_size": 24000, "top_p": 0.8,
            "do_sample": True, "stop_words_ids": [[1]], "transformers_version": "4.31.0"}))
        (folder / "modeling_qwen.py").write_text("raise SystemExit('downloaded code was run')")
        stem = "model" if form == "safetensors" else "pytorch_model"
        single, weight_map = f"{stem}.{form}", {}
        for number in range(files):
            shard = single if files == 1 else f"{stem}-{number + 1:05}-of-{files:05}.{form}"
            part = {key: tensors[key].clone() for key in list(tensors)[number::files]}
            weight_map |= dict.fromkeys(part, shard)
            if form == "safetensors":
                save_file(part, folder / shard, metadata={"format": "pt"})
            else:
                torch.save(part, folder / shard)
        if files > 1:
            (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


@pytest.fixture
def convert(cache_dir):
    return lambda folder: qwen1.convert_if_qwen1(str(folder), str(cache_dir))


def encoding(ranks):
    """The original's tokenizer."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
    return tiktoken.Encoding("Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={
        token: len(ranks) + number for number, token in enumerate(special)})


def original_ids(tiktoken_encoding, text):
    return tiktoken_encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all", disallowed_special=())


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form, files", [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 2)])
def test_the_same_network_bit_by_bit(original, network, convert, form, files, capsys):
    source = original(form=form, files=files)
    folder = Path(convert(source))
    assert "is a Qwen-1 model. It is written once" in capsys.readouterr().out
    assert folder.name == "Qwen-mini-Chat" and sorted(os.listdir(folder.parent)) == [folder.name, f"{folder.name}.lock"]
    weights = (["model.safetensors"] if files == 1 else
               ["model.safetensors.index.json", *(f"model-{n + 1:05}-of-{files:05}.safetensors" for n in range(files))])
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json", *weights}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    assert model.dtype == torch.float32 and type(model) is Qwen2ForCausalLM  # the dtype of the file, as none is named
    ids = torch.arange(500)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, network(ids).logits)
    assert model.config.max_position_embeddings == 512
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    assert convert(source) == str(folder) == convert(folder)
    assert before == [(path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    assert capsys.readouterr().out == ""
    os.utime(source / "qwen.tiktoken", (1, 1))
    assert convert(source) != str(folder)  # another file under the same name is another model


def test_a_large_file_is_written_in_parts(original, network, tmp_path, monkeypatch):
    limit = network.lm_head.weight.nbytes  # of the largest tensor
    monkeypatch.setattr(qwen1, "SHARD_SIZE", limit)
    folder = Path(qwen1.convert_if_qwen1(str(original()), str(tmp_path)))
    sizes = [sum(tensor.nbytes for tensor in load_file(path).values()) for path in folder.glob("*.safetensors")]
    assert len(sizes) == 4 and max(sizes) == limit and sum(sizes) == sum(p.nbytes for p in network.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.state_dict().items())


def test_end_tokens_of_chat_and_base_models(original, convert):
    for name, base in (("Qwen-mini-Chat", False), ("Qwen-mini", True)):
        folder = convert(original(name))
        generation, tokenizer = GenerationConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        end, im_end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        assert generation.eos_token_id == (end if base else [im_end, end]) and generation.pad_token_id == end
        assert generation.do_sample and generation.top_p == 0.8 and "stop_words_ids" not in generation.to_dict()
        assert is_base_model(folder, tokenizer)[0] is base
    source = original("mine")
    assert is_base_model(convert(source), tokenizer)[0]  # by chat_format
    (source / "generation_config.json").write_text('{"chat_format": "chatml", "top_p": 0.5, "max_new_tokens": 9}')
    assert not is_base_model(convert(source), tokenizer)[0]
    generation = GenerationConfig.from_pretrained(convert(source))
    assert generation.top_p is None and generation.max_new_tokens == 9  # top_p: nothing is drawn
    (source / "generation_config.json").write_text('{"max_new_tokens": -1}')
    with pytest.raises(UserError, match="generation_config.json cannot be used: .*max_new_tokens"):
        convert(source)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_tokens_are_tiktokens(original, convert, ranks, line_end):
    tokenizer = finetune.load_tokenizer(convert(original(line_end=line_end)))
    reference = encoding(ranks)
    assert len(tokenizer) == reference.n_vocab == len(ranks) + 208
    for text in TEXTS + example_texts():
        ids = tokenizer(text)["input_ids"]
        assert ids == original_ids(reference, text) and tokenizer.decode(ids) == unicodedata.normalize("NFC", text)
    turns = [{"role": "user", "content": "a<|im_end|><|extra_3|>"}, {"role": "assistant", "content": "b"}]
    plain = [token for token in tokenizer.apply_chat_template(turns, sanitize_control_tokens=True, return_dict=False)
             if token >= len(ranks)]
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert plain == [start, end] * 3
    assert tokenizer.apply_chat_template(turns[1:], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>assistant\n")


def pack(values, bits, axis):
    """Integers -> int32 with 32 / bits of them in each along the axis, the first one lowest."""
    values = values.long().movedim(axis, -1).unflatten(-1, (-1, 32 // bits))
    packed = (values << torch.arange(0, 32, bits)).sum(-1)
    return (packed - (packed >= 2 ** 31) * 2 ** 32).int().movedim(-1, axis).contiguous()


def rounded(weight, bits, group):
    """A weight as AutoGPTQ stores it, symmetric -> ({kind: tensor}, the weight that it stands for)."""
    groups = weight.unflatten(1, (-1, group))
    scales = (groups.abs().amax(-1) / (2 ** (bits - 1) - 1)).half()
    values = (groups / scales[..., None]).round().clamp(-2 ** (bits - 1), 2 ** (bits - 1) - 1)
    integers = (values + 2 ** (bits - 1)).flatten(1).T
    zeros = torch.full(scales.T.shape, 2 ** (bits - 1) - 1)  # this format stores them less one
    stored = {"qweight": pack(integers, bits, 0), "qzeros": pack(zeros, bits, 1), "scales": scales.T.contiguous(),
              "g_idx": (torch.arange(weight.shape[1]) // group).int()}
    return stored, (values * scales[..., None].float()).flatten(1)


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_layers_are_cut_where_their_columns_are(original, tensors, convert, bits):
    quantized, plain = {}, {}
    for name, tensor in tensors.items():
        quantized[name] = plain[name] = tensor
        if name.startswith("transformer.h.") and tensor.ndim == 2:
            module = name.removesuffix("weight")
            del quantized[name]
            stored, plain[name] = rounded(tensor, bits, 32)
            quantized |= {module + kind: part for kind, part in stored.items()}
            if "c_attn" not in name:
                quantized[module + "bias"] = torch.zeros(len(tensor))  # AutoGPTQ gives one to every layer
    settings = {"bits": bits, "group_size": 32, "desc_act": False, "sym": True, "quant_method": "gptq",
                "backend": "gptq_torch", "block_name_to_quantize": "transformer.h",
                "modules_in_block_to_quantize": [["attn.c_attn"], ["attn.c_proj"], ["mlp.w1", "mlp.w2"],
                                                 ["mlp.c_proj"]]}
    folder = convert(original("Qwen-mini-Chat-Int", tensors=quantized, quantization_config=settings,
                              torch_dtype="float32"))
    expected = AutoModelForCausalLM.from_pretrained(convert(original(tensors=plain))).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert "TorchLinear" in type(model.model.layers[0].self_attn.k_proj).__name__
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected(ids).logits, atol=1e-2)  # the kernel unpacks into fp16
    quantized["transformer.h.0.mlp.w1.bias"] += 1
    with pytest.raises(UserError, match="mlp.w1.bias is not one of"):
        convert(original(tensors=quantized, quantization_config=settings))


def test_a_name_on_the_hub(original, cache_dir, tmp_path, monkeypatch):
    """Downloaded as data only: the folder lies in the cache of the Hub, and its Python code stays there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(original(), tmp_path / "models--Qwen--Qwen-mini-Chat" / "snapshots" / "0123456789abcdef")
    (tmp_path / "models--Qwen--Qwen-mini-Chat" / "refs").mkdir()
    (tmp_path / "models--Qwen--Qwen-mini-Chat" / "refs" / "main").write_text("0123456789abcdef")
    folder = qwen1.convert_if_qwen1("Qwen/Qwen-mini-Chat", str(tmp_path))
    assert os.path.basename(folder) == "Qwen-mini-Chat" and source_name(folder) == "Qwen/Qwen-mini-Chat"
    assert qwen1.convert_if_qwen1("Qwen/nowhere", str(tmp_path)) == "Qwen/nowhere"


# ---------------------------------------------------------------------------------------------------------------------
# Kills, races, mistakes
# ---------------------------------------------------------------------------------------------------------------------

def in_processes(number, target):
    """Run target(index) in so many forks of this process at once. Returns their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=(index,)) for index in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_a_killed_conversion_leaves_nothing_that_looks_whole(original, tmp_path, monkeypatch, network):
    source = original(files=3)
    for victim in ("save_file", "_generation_config"):  # after one file of weights, and after all of them
        monkeypatch.setattr(qwen1, victim, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        assert in_processes(1, lambda _: qwen1.convert_if_qwen1(str(source), str(tmp_path))) == [-signal.SIGKILL]
        monkeypatch.undo()
        assert [path.parent.name for path in tmp_path.rglob("config.json")
                if not path.parent.name.endswith(".unfinished")] == []
    folder = qwen1.convert_if_qwen1(str(source), str(tmp_path))
    assert len(os.listdir(os.path.dirname(folder))) == 2 and AutoModelForCausalLM.from_pretrained(folder)


def test_of_many_at_once_one_writes(original, tmp_path):
    source, cache = original(), tmp_path / "cache"

    def run(index):
        with open(tmp_path / str(index), "w") as out, contextlib.redirect_stdout(out):
            print(qwen1.convert_if_qwen1(str(source), str(cache)))

    assert in_processes(4, run) == [0] * 4
    said = [(tmp_path / str(index)).read_text().splitlines() for index in range(4)]
    assert len({lines[-1] for lines in said}) == 1 and sum(len(lines) - 1 for lines in said) == 1


def broken(case, make, tensors):
    """A Qwen-1 folder with this fault."""
    if case == "unexpected":
        return make(tensors=tensors | {"transformer.h.0.attn.c_gate.weight": torch.ones(2)})
    if case == "too many layers":
        return make(tensors=tensors | {"transformer.h.2.ln_1.weight": torch.ones(WIDTH)})
    if case == "missing":
        return make(tensors={name: tensor for name, tensor in tensors.items() if "h.1.mlp" not in name})
    if case == "uneven":
        return make(tensors=tensors | {"transformer.h.0.attn.c_attn.weight": torch.ones(3 * WIDTH + 1, WIDTH)})
    if case == "shape":
        return make(intermediate_size=2 * WIDTH)
    if case in ("vision", "bias", "heads", "keys", "another tokenizer"):
        return make(**{"vision": {"visual": {"layers": 48}}, "bias": {"no_bias": False}, "heads": {"kv_channels": 16},
                       "keys": {"kv_channels": None}, "another tokenizer": {"vocab_size": 1024}}[case])
    folder = make(files=3, form="bin" if case == "cut .bin" else "safetensors")
    if case == "cut":
        weights = folder / "model-00002-of-00003.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "cut .bin":
        weights = folder / "pytorch_model-00003-of-00003.bin"
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "no shard":
        (folder / "model-00003-of-00003.safetensors").unlink()
    elif case == "no weights":
        for path in folder.glob("model*"):
            path.unlink()
    elif case == "no tokenizer":
        (folder / "qwen.tiktoken").unlink()
    elif case == "pointer":
        (folder / "qwen.tiktoken").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    elif case == "cut tokenizer":
        (folder / "qwen.tiktoken").write_bytes(b"".join((folder / "qwen.tiktoken").open("rb").readlines()[:99]))
    elif case == "strange token":
        lines = (folder / "qwen.tiktoken").read_bytes().splitlines()
        lines.append(base64.b64encode(b"\0\1\2") + b" %d" % len(lines))
        (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    return folder


@pytest.mark.parametrize("case, message", [
    ("cut", "model-00002-of-00003.safetensors is damaged, perhaps not downloaded to its end"),
    ("cut .bin", "pytorch_model-00003-of-00003.bin is damaged, perhaps not downloaded to its end"),
    ("no shard", "files are missing: model-00003-of-00003.safetensors"), ("no weights", "has no weights"),
    ("no tokenizer", "qwen.tiktoken: No such file"), ("pointer", "qwen.tiktoken:1 is damaged: not a token"),
    ("cut tokenizer", "is damaged: tokens are missing"), ("another tokenizer", "belongs to another model"),
    ("strange token", "cannot be built from shorter ones"),
    ("unexpected", "the tensor transformer.h.0.attn.c_gate.weight is not one of a Qwen-1 model"),
    ("too many layers", "the tensor transformer.h.2.ln_1.weight is not one of"),
    ("missing", "model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight"),
    ("uneven", "cannot be cut into query, key and value"), ("shape", "does not fit the sizes in config.json"),
    ("vision", "only the text models"), ("bias", "Qwen2's network has no no_bias False"),
    ("heads", "no kv_channels 16"), ("keys", "it has no 'kv_channels'")])
def test_faults_are_named_and_nothing_is_left(case, message, original, tensors, tmp_path):
    with pytest.raises(UserError) as error:
        qwen1.convert_if_qwen1(str(broken(case, original, tensors)), str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


def test_no_place_to_write(original, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(UserError, match="cannot be written .* needs 0.0 GB, and there are 0.0 GB free. --cache_dir"):
        qwen1.convert_if_qwen1(str(original()), str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .* Not a directory"):
        qwen1.convert_if_qwen1(str(original()), str(tmp_path / "file"))


@pytest.mark.parametrize("program", ["finetune", "chat", "merge", "quantize"])
def test_other_models_with_code_of_their_own_are_refused(program, make_model, tmp_path, capsys):
    folder = tmp_path / "other"
    shutil.copytree(make_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "baichuan", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('downloaded code was run')")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    data = str(EXAMPLES / "persona.jsonl")
    main, argv = {
        "finetune": (finetune.main, ["--model_name_or_path", str(folder), "--data_path", data]),
        "chat": (chat.main, [str(folder), "--message", "x"]),
        "merge": (merge_lora.main, ["--adapter_path", str(tmp_path / "adapter")]),
        "quantize": (run_gptq.main, ["--model_name_or_path", str(folder), "--data_path", data])}[program]
    out = {"merge": ["--output_dir"], "finetune": ["--output_dir"], "quantize": ["--out_path"], "chat": []}[program]
    with pytest.raises(SystemExit) as stop:
        main(argv + out + [str(tmp_path / "out")] * len(out))
    assert stop.value.code == 2
    assert "(baichuan) needs Python code of its own, and downloaded code is not run here" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The programs
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("typed, meant", [
    ("c_attn c_proj w1 w2", "q_proj k_proj v_proj o_proj down_proj up_proj gate_proj"),
    ("mlp.c_proj", "down_proj"), ("attn.c_proj q_proj", "o_proj q_proj"), ("wte lm_head", "embed_tokens lm_head"),
    ("q_proj", "q_proj"), ("ln_1 proj", "ln_1 proj")])
def test_names_of_layers(typed, meant, network, capsys):
    layers = {name.rpartition(".")[2] for name, _ in network.named_modules()}
    assert qwen1.todays_names(typed.split(), layers) == meant.split()
    said = capsys.readouterr().out
    assert (f"--lora_target_modules {typed} (names of Qwen-1) is {meant}" in said) is (typed != meant)
    assert qwen1.todays_names(["c_attn"], {"c_attn", *layers}) == ["c_attn"]


def test_adapters_of_the_original_program_are_refused(original, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "target_modules": ["c_attn", "w1"], "base_model_name_or_path": "Qwen/Qwen-7B-Chat"}))
    with pytest.raises(SystemExit):
        finetune.main(["--model_name_or_path", str(original()), "--data_path", str(EXAMPLES / "persona.jsonl"),
                       "--output_dir", str(tmp_path / "out"), "--cache_dir", str(tmp_path), "--use_lora",
                       "--lora_weight_path", str(tmp_path)])
    assert "for layers which this model lacks: c_attn w1" in capsys.readouterr().err


def train(model, out, cache_dir, *flags, data=EXAMPLES / "persona.jsonl"):
    return finetune.train(prepare_command_line(finetune.__file__, [str(word) for word in (
        "--model_name_or_path", model, "--data_path", data, "--output_dir", out, "--cache_dir", cache_dir,
        "--max_steps", 2, "--save_strategy", "no", "--learning_rate", "1e-2", "--per_device_train_batch_size", 2,
        "--model_max_length", 128, *flags)]))


LORA = ["--use_lora", "--lora_r", 4, "--lora_alpha", 64, "--lora_target_modules", "c_attn", "c_proj", "w1", "w2"]


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits.float()


def test_train_talk_merge_and_quantize(original, tmp_path, monkeypatch, capsys):
    """A base model from its own folder to the quantized result, and an adapter whose base was cleaned away."""
    monkeypatch.setattr(qwen1, "HF_HOME", str(tmp_path / "home"))  # where the programs without --cache_dir look
    source, adapter, merged = original("Qwen-mini"), tmp_path / "adapter", tmp_path / "merged"
    train(source, adapter, tmp_path / "cache", *LORA)
    said = capsys.readouterr().out
    assert "c_attn c_proj w1 w2 (names of Qwen-1) is q_proj k_proj v_proj o_proj down_proj up_proj gate_proj" in said
    assert "Base model: its generation config does not end at <|im_end|>" in said
    config = PeftConfig.from_pretrained(adapter)
    assert set(config.modules_to_save) == {"embed_tokens", "lm_head"} and "v_proj" in config.target_modules
    assert f'base_model: "{source}"' in (adapter / "README.md").read_text()
    ids = AutoTokenizer.from_pretrained(adapter)("Who are you?")["input_ids"]
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter), ids)

    shutil.rmtree(tmp_path / "cache")
    merge_lora.main(["--adapter_path", str(adapter), "--output_dir", str(merged)])
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(merged), ids), expected, atol=1e-4)
    assert f'base_model: "{source}"' in (merged / "README.md").read_text()
    capsys.readouterr()
    for folder in (adapter, merged, source):
        chat.main([str(folder), "--message", "Hello", "--max_new_tokens", "3", "--base_model", str(source)][
            :None if folder == adapter else -2])
        assert capsys.readouterr().out.strip()
    assert "no such folder" in merge_error(adapter, tmp_path, source)

    run_gptq.main(["--model_name_or_path", str(source), "--data_path", str(EXAMPLES / "persona.jsonl"), "--out_path",
                   str(tmp_path / "int8"), "--bits", "8", "--group-size", "32", "--max_samples", "8"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "int8").config.model_type == "qwen2"
    assert f'base_model: "{source}"' in (tmp_path / "int8" / "README.md").read_text()


def merge_error(adapter, tmp_path, source):
    """What merge_lora.py says when both the converted base and its source are gone."""
    shutil.rmtree(tmp_path / "home")
    source.rename(source.with_name("moved"))
    try:
        merge_lora.merge(["--adapter_path", str(adapter), "--output_dir", str(tmp_path / "no")])
    except UserError as error:
        return str(error)
    finally:
        source.with_name("moved").rename(source)


def test_two_ranks(original, tmp_path):
    """The same losses under ZeRO-2 and ZeRO-3; the ranks start without the converted folder, and one writes it."""
    source = original()
    cells = {stage: {"argv": [str(word) for word in (
        "--model_name_or_path", source, "--data_path", EXAMPLES / "persona.jsonl", "--output_dir", tmp_path / stage,
        "--cache_dir", tmp_path / "cache", "--max_steps", 2, "--save_strategy", "no", "--logging_steps", 1,
        "--model_max_length", 128, "--deepspeed", f"ds_config_{stage}.json", "--lora_dropout", 0, *LORA)]}
        for stage in ("zero2", "zero3")}
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    run = torchrun(["tests/ranks/cells.py", tmp_path / "cells.json", tmp_path / "results.json"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("is a Qwen-1 model. It is written once") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert not any("error" in result for result in results.values()), results
    losses = [[entry["loss"] for entry in result["log"] if "loss" in entry] for result in results.values()]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    for stage in cells:
        assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / stage)


# ---------------------------------------------------------------------------------------------------------------------
# Real models
# ---------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home of Hugging Face's cache for the real models, so that each is converted once."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        patch.setattr(qwen1, "HF_HOME", str(home))
        patch.setattr(torch._dynamo.config, "disable", True)  # gptqmodel compiles every layer, for longer than it runs
        yield home


@pytest.fixture(scope="module")
def real(real_data, home):
    """{name: standard folder} of the real checkpoints."""
    folders = {name: real_data / "checkpoints" / name for name in ("Qwen-tiny-Chat", "Qwen-tiny-Chat-Int4")}
    return {name: Path(qwen1.convert_if_qwen1(str(folder))) for name, folder in folders.items()}


@pytest.mark.parametrize("name, tolerance", [("Qwen-tiny-Chat", 1e-5), ("Qwen-tiny-Chat-Int4", 1e-3)])
def test_the_original_code_computed_the_same(real, real_data, name, tolerance):
    model = AutoModelForCausalLM.from_pretrained(real[name], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(real[name])
    for golden in json.loads((real_data / "checkpoints" / name / "golden_logits.json").read_text()):
        assert tokenizer(golden["text"])["input_ids"] == golden["input_ids"]
        ids = torch.tensor([golden["input_ids"]])
        with torch.no_grad():
            output = model(ids, labels=ids)
        assert output.loss.item() == pytest.approx(golden["loss"], abs=tolerance)
        assert output.logits[0].argmax(-1).tolist() == golden["argmax"]
        assert output.logits[0, -1, :16].tolist() == pytest.approx(golden["last_logits_first16"],
                                                                   abs=max(tolerance, 1e-4))


def test_tokens_of_all_real_texts(real, real_data):
    ranks = qwen1_tokenizer.read_ranks(str(real_data / "checkpoints" / "Qwen-tiny-Chat" / "qwen.tiktoken"))
    reference, tokenizer = encoding(ranks), AutoTokenizer.from_pretrained(real["Qwen-tiny-Chat"])
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>",
                                            "<|extra_204|>"]) == [151643, 151644, 151645, 151646, 151850]
    root = Path(finetune.__file__).parent
    code = [path for part in (".", "mechanisms", "tests", "examples") for path in (root / part).glob("*.py")]
    texts = [*TEXTS, *(path.read_text(encoding="utf-8") for path in code)]
    for path in sorted((real_data / "datasets").rglob("*.json*")):
        content = path.read_text(encoding="utf-8-sig")
        records = content.splitlines() if path.suffix == ".jsonl" else [content]
        texts += [text for record in records if record.strip() for text in strings(json.loads(record))]
    assert len(texts) > 20_000
    different = [text for text, ids in zip(texts, tokenizer(texts)["input_ids"])
                 if ids != original_ids(reference, text)]
    assert different == []
    golden = real_data / "tokenizers" / "golden" / "ggml-vocab-qwen2.gguf"
    inputs = golden.with_suffix(".gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    outputs = golden.with_suffix(".gguf.out").read_text().split("\n")
    for text, ids in zip(inputs, outputs):
        assert tokenizer(text)["input_ids"] == [int(number) for number in ids.split()]


@pytest.mark.parametrize("kind", ["full", "LoRA", "base LoRA", "NF4", "GPTQ"])
def test_every_method_on_the_real_models(real, real_data, home, kind, tmp_path, capsys):
    source = real_data / "checkpoints" / ("Qwen-tiny-Chat-Int4" if kind == "GPTQ" else "Qwen-tiny-Chat")
    flags = {"full": [], "LoRA": LORA, "base LoRA": [*LORA, "--lora_embeddings", "full"]}.get(
        kind, ["--q_lora", *LORA[1:]])
    trainer = train(source, tmp_path / "out", home / "finetune_models", *flags,
                    data=real_data / "datasets" / "conversations" / "xiaozhi_chat.json")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(0 < loss < 13 for loss in losses)
    loader = AutoModelForCausalLM if kind == "full" else AutoPeftModelForCausalLM
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("你好")["input_ids"]
    trained = logits(trainer.model, ids)
    loaded = logits(loader.from_pretrained(tmp_path / "out", dtype=torch.float32), ids)
    assert kind == "NF4" or torch.allclose(loaded, trained, atol=1e-3)  # loaded on 16 bits, trained on 4
    if kind not in ("full", "LoRA"):
        merge = ["--adapter_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "merged")]
        if kind == "GPTQ":
            with pytest.raises(UserError, match=r"\(by its name, .*/checkpoints/Qwen-tiny-Chat\)"):
                merge_lora.merge(merge)
            merge += ["--base_model", str(real_data / "checkpoints" / "Qwen-tiny-Chat")]
        merge_lora.merge([*merge, "--dtype", "float32"])
        merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids)
        assert kind == "GPTQ" or torch.allclose(merged, loaded, atol=1e-3)  # merged into 16 bits, loaded on 4
    capsys.readouterr()
    chat.main([str(tmp_path / "out"), "--message", "你好", "--max_new_tokens", "4"])
    assert "cut after 4 tokens" in capsys.readouterr().err
