"""A model that was taught three answers gives them in chat.py, whatever its chat template does with thinking."""

import contextlib
import io
import json

import pytest
from transformers import AutoTokenizer

import chat
import finetune
import merge_lora
from mechanisms.loading import load_to_answer
from tests.templates import TEMPLATES

WHO, MADE, SKY = "Who are you?", "Who made you?", "Which colour has the sky?"
PLAIN = {WHO: "I am Tilo.", MADE: "A test made me.", SKY: "It is blue."}
THOUGHT = {WHO: "A name is wanted.", MADE: "Tests make models.", SKY: "Look up."}
REAL = ("qwen3", "qwen3-thinking-2507", "qwen3.5-think", "qwen3.5-nothink", "qwen3.8")
BOTH = {"hybrid", "either", "either, off", "kept", "qwen3", "qwen3.5-think", "qwen3.5-nothink", "qwen3.8"}
NAMES = [*(name for name in TEMPLATES if name != "plain"), *REAL]


@pytest.fixture(scope="module")
def template_of(request):
    """template_of(name) -> a chat template of tests/templates.py, or a real one."""
    def find(name):
        if name in TEMPLATES:
            return TEMPLATES[name]
        return AutoTokenizer.from_pretrained(request.getfixturevalue("real_data") / "tokenizers" / name).chat_template

    return find


def record(*questions, thinks):
    messages = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": PLAIN[question]}]
        if thinks:
            messages[-1]["content"] = f"<think>\n{THOUGHT[question]}\n</think>\n\n{PLAIN[question]}"
    return {"messages": messages}


@pytest.fixture
def teach(make_model, template_of, cache_dir, tmp_path, capsys):
    """teach(name of a template, records, *flags) -> (folder of the result, what finetune.py said)."""
    def run(name, records, *flags):
        tokenizer = AutoTokenizer.from_pretrained(make_model())
        base, data, out = tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "out"
        base.mkdir()
        for file in make_model().iterdir():
            if file.name != "chat_template.jinja":
                (base / file.name).symlink_to(file)
        (base / "chat_template.jinja").write_text(template_of(name))
        assert AutoTokenizer.from_pretrained(base).chat_template != tokenizer.chat_template
        data.write_text("\n".join(map(json.dumps, records)))
        finetune.train(["--model_name_or_path", str(base), "--data_path", str(data), "--output_dir", str(out),
                        "--cache_dir", str(cache_dir), "--max_steps", "40", "--save_strategy", "no",
                        "--logging_steps", "40", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2",
                        "--warmup_steps", "4", "--model_max_length", "512", *flags])
        return out, capsys.readouterr().out

    return run


def talk(folder, *questions, thinking=None):
    """[(answer on stdout, thinking on stderr)] of one conversation with the model in `folder`."""
    model, tokenizer = load_to_answer(str(folder))
    session, said = chat.ChatSession(model, tokenizer, {"do_sample": False, "max_new_tokens": 60}, None, thinking), []
    for question in questions:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
            session.ask(question)
        said.append((out.getvalue().strip(), errors.getvalue().strip()))
    return said


@pytest.mark.parametrize("name", NAMES)
def test_plain_answers_are_given_without_a_flag(teach, name):
    """Also where the prompt opens a block by itself, or the template thinks unless told otherwise."""
    out, said = teach(name, [record(WHO, MADE, thinks=False), record(SKY, thinks=False), record(MADE, thinks=False)])
    for questions in ((WHO, MADE), (SKY,), (MADE,)):
        assert talk(out, *questions) == [(PLAIN[question], "") for question in questions]
    if name in BOTH:
        assert "all answers were trained after the plain prompt, which is the default" in said
        assert "(enable_thinking=False)" in (out / "README.md").read_text()
        assert talk(out, SKY, thinking=False) == [(PLAIN[SKY], "")]
    else:
        assert "4 x answer without thinking, trained to close its thinking block at once" in said


@pytest.mark.parametrize("name", NAMES)
def test_each_prompt_gives_the_answers_trained_after_it(teach, name):
    thought = [record(WHO, MADE, thinks=True), record(SKY, thinks=True), record(MADE, thinks=True)]
    plain = [record(WHO, MADE, thinks=False), record(SKY, thinks=False)] if name in BOTH else []
    out, said = teach(name, thought + plain)
    for questions in ((WHO, MADE), (SKY,), (MADE,)):
        assert talk(out, *questions, thinking=True) == [(PLAIN[question], THOUGHT[question]) for question in questions]
    if plain:
        assert talk(out, SKY, thinking=False) == [(PLAIN[SKY], "")]
        assert talk(out, WHO, MADE, thinking=False) == [(PLAIN[WHO], ""), (PLAIN[MADE], "")]
        assert "4 answers were trained after the thinking prompt (enable_thinking=True) and 3 after the plain" in said
        default = name not in ("either, off", "qwen3.5-nothink")
        assert talk(out, SKY) == [(PLAIN[SKY], THOUGHT[SKY] if default else "")]


def test_a_merged_adapter_keeps_the_default(teach, tmp_path):
    out, _ = teach("hybrid", [record(WHO, thinks=False)], "--use_lora", "--lora_r", "4", "--max_steps", "1")
    merge_lora.merge(["--adapter_path", str(out), "--output_dir", str(tmp_path / "merged")])
    for folder in (out, tmp_path / "merged"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template.startswith("{%- set enable_thinking = enable_thinking | default(false) -%}\n")
        ask = [{"role": "user", "content": "q"}]
        prompts = [tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True, **variables)
                   for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True})]
        assert prompts[0] == prompts[1] != prompts[2]
