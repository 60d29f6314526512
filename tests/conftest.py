"""Shared by all tests: tiny models and adapters made once per session, and the real inputs where they are at hand."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from mechanisms.quiet import silence

silence()

# A shell's background job ignores Ctrl-C, and what it starts does too; here Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The models here are so small that a second thread only waits for the first; also for the processes tests start.
os.environ["OMP_NUM_THREADS"] = "1"

REAL_DATA = os.environ.get("REAL_DATA")
REAL_TOKENIZERS = ("qwen2", "qwen2.5", "qwen3")


@pytest.fixture(scope="session")
def real_data():
    """The folder of real tokenizers, data sets and checkpoints."""
    if not REAL_DATA:
        pytest.skip("REAL_DATA is not set: no real tokenizers and data here")
    return Path(REAL_DATA)


@pytest.fixture(scope="module", params=REAL_TOKENIZERS)
def real(request, real_data):
    """(name, tokenizer, ConversationEncoder), for each of REAL_TOKENIZERS in turn."""
    from finetune import ConversationEncoder, load_tokenizer

    tokenizer = load_tokenizer(str(real_data / "tokenizers" / request.param))
    return request.param, tokenizer, ConversationEncoder(tokenizer, max_length=8192)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(**arguments of make_tiny_model) -> folder; each kind is made once."""
    from examples.make_tiny_model import example_texts, make_tiny_model

    made = {}

    def make(**kwargs):
        key = repr(sorted(kwargs.items()))
        if key not in made:
            name = "tiny" + "".join(f"-{value}" for value in kwargs.values())
            folder = tmp_path_factory.mktemp("models") / name
            made[key] = make_tiny_model(folder, example_texts(), **{"num_layers": 2, "hidden_size": 64, **kwargs})
        return made[key]

    return make


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """One token cache for the session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(make_model, cache_dir, tmp_path):
    """train(*flags) -> Trainer of a run on the examples, every step logged, nothing saved on the way."""
    import finetune
    from examples.make_tiny_model import EXAMPLES

    def run(*flags):
        return finetune.train([str(word) for word in (
            "--model_name_or_path", make_model(), "--data_path", EXAMPLES / "data", "--cache_dir", cache_dir,
            "--output_dir", tmp_path / "out", "--per_device_train_batch_size", 2, "--logging_steps", 1,
            "--save_strategy", "no", "--model_max_length", 256, "--learning_rate", "1e-3", *flags)])

    return run


@pytest.fixture
def wait_for():
    """wait_for(process, line): until it prints a line that begins so, or with None until it imports libraries."""

    def wait(process, line):
        if line:
            next(said for said in process.stdout if said.startswith(line))
        else:
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                time.sleep(0.05)

    return wait


@pytest.fixture(scope="session")
def taught():
    """What every adapter of `make_adapter` was taught: [(messages, answer)]."""
    who = {"role": "user", "content": "Who are you?"}
    i_am = {"role": "assistant", "content": "I am Tilo, and I was made for this test."}
    return [([who], i_am["content"]),
            ([{"role": "user", "content": "你是谁？"}], "我是蒂洛，为这个测试而生。"),
            ([{"role": "system", "content": "Answer in one word."}, who], "Tilo."),
            ([who, i_am, {"role": "user", "content": "What did I ask?"}], "You asked me who I am.")]


@pytest.fixture(scope="session")
def make_adapter(make_model, taught, cache_dir, tmp_path_factory):
    """make_adapter(kind, tied=True) -> folder; each is trained once, on the model make_adapter.base(kind, tied).

    make_adapter.original(kind, tied): the same model before it was quantized, for kind "gptq".
    """
    import finetune
    import run_gptq
    from mechanisms.flags import prepare_command_line

    kinds = {"lora": [], "full": ["--lora_embeddings", "full"], "chatml": ["--lora_embeddings", "chatml"],
             "nf4": ["--q_lora"], "gptq": ["--q_lora"]}
    folder = tmp_path_factory.mktemp("adapters")
    data = folder / "taught.jsonl"
    data.write_text("\n".join(json.dumps({"messages": [*messages, {"role": "assistant", "content": answer}]})
                              for messages, answer in taught))

    def original(kind, tied=True):
        return make_model(base=kind != "lora", tie_word_embeddings=tied)

    def base(kind, tied=True):
        if kind != "gptq":
            return original(kind, tied)
        quantized = folder / f"{'tied' if tied else 'untied'}-Int4"
        if not quantized.exists():
            run_gptq.run(["--model_name_or_path", str(original(kind, tied)), "--data_path", str(data), "--out_path",
                          str(quantized), "--group_size", "32"])
        return quantized

    def make(kind, tied=True):
        adapter = folder / f"{kind}-{'tied' if tied else 'untied'}"
        if not (adapter / "adapter_config.json").exists():
            finetune.train(prepare_command_line(finetune.__file__, [
                "--model_name_or_path", str(base(kind, tied)), "--data_path", str(data), "--output_dir", str(adapter),
                "--cache_dir", str(cache_dir), "--max_steps", "60", "--save_strategy", "no", "--logging_steps", "60",
                "--per_device_train_batch_size", "4", "--learning_rate", "2e-2", "--warmup_steps", "0.1",
                "--use_lora", "--lora_r", "16", "--lora_alpha", "32", "--lora_dropout", "0",
                "--model_max_length", "512", *kinds[kind]]))
        return adapter

    make.base, make.original = base, original
    return make
