"""What of a conversation becomes which sample, where the chat template treats thinking in a way of its own."""

import json
import re

import numpy as np
import pytest
from transformers import AutoTokenizer

import finetune
from mechanisms.data.datasets import load_dataset, split
from mechanisms.data.encoder import IGNORED, ConversationEncoder
from mechanisms.data.records import Notices
from mechanisms.data.shapes import BadRecord, to_conversation
from mechanisms.errors import UserError
from mechanisms.tokenizer import DEFAULT_MODE, load_tokenizer, set_default_mode
from tests.templates import LAST, OPENED, TEMPLATES, template
from tests.unit.test_encoding import TOOL, conversation, trained_text

EMPTY = "<think>\n\n</think>\n\n"
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"}
ASK = {"role": "user", "content": "q"}


@pytest.fixture
def tokenizer_with(make_model):
    def make(chat_template):
        tokenizer = load_tokenizer(str(make_model()))
        tokenizer.chat_template = TEMPLATES.get(chat_template, chat_template) \
            if isinstance(chat_template, str) else chat_template
        return tokenizer

    return make


@pytest.fixture
def encode(tokenizer_with):
    """encode(template, *turns, notices=None, **options of the encoder) -> [(prompt's last line, trained text)]."""
    def run(chat_template, *turns, notices=None, tools=None, **options):
        tokenizer = tokenizer_with(chat_template)
        encoder, found = ConversationEncoder(tokenizer, 2048, **options), []
        for sample in encoder(conversation(*turns, tools=tools), Notices() if notices is None else notices):
            place = 0
            while IGNORED != max(sample.labels[place:], default=IGNORED):
                start = next(n for n in range(place, len(sample.labels)) if sample.labels[n] != IGNORED)
                place = next((n for n in range(start, len(sample.labels)) if sample.labels[n] == IGNORED),
                             len(sample.labels))
                prompt = tokenizer.decode(sample.input_ids[:start])
                found.append((prompt.rpartition("<|im_start|>assistant\n")[2],
                              tokenizer.decode(sample.labels[start:place])))
        return found

    return run


@pytest.mark.parametrize("name, turns, expected", [
    ("plain", ["q", "a", "q", "b"], [("", "a"), ("", "b")]),
    ("plain", ["q", "a", "q", THOUGHT], [("", "a"), ("", "<think>\nhm\n</think>\n\nb")]),  # text for such a model
    ("hybrid", ["q", "a", "q", THOUGHT], [(EMPTY, "a"), ("", "<think>\nhm\n</think>\n\nb")]),
    ("hybrid", ["q", EMPTY + "a"], [(EMPTY, "a")]),
    ("thinking", ["q", "a", "q", THOUGHT], [("<think>\n", "\n</think>\n\na"), ("<think>\n", "hm\n</think>\n\nb")]),
    ("either", ["q", " a\n", "q", THOUGHT], [(EMPTY, "a"), ("<think>\n", "hm\n</think>\n\nb")]),
    ("either, off", ["q", "a", "q", THOUGHT], [(EMPTY, "a"), ("<think>\n", "hm\n</think>\n\nb")]),
    ("kept", ["q", "a", "q", "b"], [(EMPTY, "a"), (EMPTY, "b")]),
    ("kept", ["q", THOUGHT, ASK, THOUGHT], [("<think>\n", "hm\n</think>\n\nb")] * 2),
    ("cut", ["q", "a", "q", THOUGHT], [("<think>\n", "\n</think>\n\na"), ("<think>\n", "hm\n</think>\n\nb")])])
def test_each_answer_follows_the_prompt_it_belongs_to(encode, name, turns, expected):
    assert encode(name, *turns) == [(prompt, said + "<|im_end|>") for prompt, said in expected]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_in_a_key_is_thinking_in_the_text(encode, key):
    separate = {"role": "assistant", "content": "b", key: "hm"}
    for name in ("hybrid", "thinking", "either", "cut"):
        assert encode(name, "q", separate) == encode(name, "q", THOUGHT)
    with pytest.raises(BadRecord, match="leaves this out"):
        encode("plain", "q", separate)
    with pytest.raises(BadRecord, match="reasoning both in the content and in a key"):
        encode("hybrid", "q", {**THOUGHT, key: "hm"})


@pytest.mark.parametrize("content", [
    "Sure <think>x</think> ok", "Use the </think> tag to end, then </think> again",
    "<think>a</think>b<think>c</think>d", "<think>never closed",
    "It opens a <think> block, </think> closes it.", "hm\n</think>\n\nSeoul"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_other_tags_are_text_and_nothing_is_cut(encode, tokenizer_with, name, content):
    notices = Notices()
    turns = ["q", content, "q", content]
    for _, said in encode(name, *turns, notices=notices):
        assert said.removeprefix("\n</think>\n\n") == content + "<|im_end|>"
    assert any("think> written in the data" in notice for notice in notices)
    [sample] = ConversationEncoder(tokenizer_with(name), 2048)(conversation("q", content))
    tags = tokenizer_with(name).convert_tokens_to_ids(["<think>", "</think>"])
    assert sum(label in tags for label in sample.labels) == (1 if name in ("thinking", "cut") else 0)


def test_forced_modes(encode):
    assert encode("hybrid", "q", "a", thinking="on") == [("", EMPTY + "a<|im_end|>")]
    notices = Notices()
    assert encode("either", "q", "a", thinking="on", notices=notices) == [("<think>\n", "\n</think>\n\na<|im_end|>")]
    assert notices["answer without thinking, trained to close its thinking block at once"] == 1
    with pytest.raises(BadRecord, match="message 4") as bad:
        encode("hybrid", "q", "a", "q", THOUGHT, thinking="off")
    assert "(--thinking off)" in bad.value.args[0][0][0]
    with pytest.raises(UserError, match="--thinking on: .* has only no thinking prompt"):
        encode("plain", "q", "a", thinking="on")
    with pytest.raises(UserError, match="--thinking off: .* has only a thinking prompt"):
        encode("thinking", "q", "a", thinking="off")


CHAIN = [ASK, {"role": "assistant", "content": "", "reasoning_content": "which?", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "서울"}}}]},
    {"role": "tool", "content": "7"}, {"role": "assistant", "content": "Cold.", "reasoning_content": "7 is cold"}]


def test_samples_are_as_few_as_can_be(tokenizer_with):
    counts = {}
    for name in ("plain", "hybrid", "thinking", "kept"):
        encoder = ConversationEncoder(tokenizer_with(name), 2048)
        for kind, turns in (("plain", ["q", "a"] * 4), ("thought", [ASK, THOUGHT] * 4), ("chain", CHAIN * 2),
                            ("mixed", ["q", "a", ASK, THOUGHT, "q", "a"])):
            if name != "plain" or kind != "chain":
                counts[name, kind] = len(encoder(conversation(*turns, tools=[TOOL] if kind == "chain" else None)))
    assert counts == {
        ("plain", "plain"): 1, ("plain", "thought"): 1, ("plain", "mixed"): 1,
        ("hybrid", "plain"): 4, ("hybrid", "thought"): 4, ("hybrid", "chain"): 2, ("hybrid", "mixed"): 3,
        ("thinking", "plain"): 4, ("thinking", "thought"): 4, ("thinking", "chain"): 2, ("thinking", "mixed"): 3,
        ("kept", "plain"): 1, ("kept", "thought"): 1, ("kept", "chain"): 1, ("kept", "mixed"): 2}


def test_an_answer_that_begins_with_a_line_break_ends_its_sample(real_data):
    """The next prompt holds the header's line break and its own as one token, which the model never sees behind it."""
    tokenizer = load_tokenizer(str(real_data / "tokenizers/qwen2.5"))
    first, second = ConversationEncoder(tokenizer, 2048)(conversation("q", "\n\na", "q", "b"))
    assert trained_text(tokenizer, first, second) == ["\n\na<|im_end|>", "b<|im_end|>"]
    prompt = tokenizer.apply_chat_template([ASK, {"role": "assistant", "content": "\n\na"}, ASK],
                                           add_generation_prompt=True, return_dict=False)
    assert second.input_ids[:len(prompt)] == prompt and prompt[:len(first.input_ids)] != first.input_ids


def test_one_rendering_where_one_is_enough(tokenizer_with, monkeypatch):
    rendered = []
    for name, turns, most in (("plain", ["q", "a"] * 20, 1), ("kept", ["q", "a"] * 20, 1), ("hybrid", ["q", "a"], 1),
                              ("hybrid", ["q", "a"] * 20, 40)):
        tokenizer = tokenizer_with(name)
        encoder, apply = ConversationEncoder(tokenizer, 2048), tokenizer.apply_chat_template
        monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, apply=apply, **k: rendered.append(1) or
                            apply(*a, **k))
        encoder(conversation(*turns))
        assert len(rendered) <= most, name
        rendered.clear()


def test_earlier_answers_can_be_skipped(encode):
    notices = Notices()
    assert encode("hybrid", "q", "a", "q", THOUGHT, earlier_answers="skip", notices=notices) == [
        ("", "<think>\nhm\n</think>\n\nb<|im_end|>")]
    assert notices["earlier answer left out (--earlier_answers skip)"] == 1
    assert len(encode("plain", "q", "a", "q", "b", earlier_answers="skip")) == 2
    assert encode("hybrid", "q", "a", "q", "b", loss_on="last") == [(EMPTY, "b<|im_end|>")]


def test_every_token_is_trained_once_with_loss_on_all(tokenizer_with):
    tokenizer = tokenizer_with("hybrid")
    samples = ConversationEncoder(tokenizer, 2048, loss_on="all")(conversation("one", "a", "two", THOUGHT))
    assert trained_text(tokenizer, samples[0]) == ["a<|im_end|>"]
    assert trained_text(tokenizer, samples[1]) == [
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nb<|im_end|>\n"]


def test_trimmed_words_are_counted_with_an_example(encode):
    notices = Notices()
    assert encode("either", "q", "\n    code()\n", notices=notices) == [(EMPTY, "code()<|im_end|>")]
    [notice] = notices
    assert "which the chat template trims" in notice and notices.examples[notice] == "\n    code()\n"


def test_words_that_a_template_changes_are_a_problem(encode):
    shouting = template("false", "", "m.content if m.content|length < 9 else m.content[:5]")
    assert encode(shouting, "q", "short") == [("", "short<|im_end|>")]
    with pytest.raises(BadRecord, match="changes the words"):
        encode(shouting, "q", "long enough to be cut")


def test_tool_calls_written_in_the_text(encode):
    written = '<tool_call>\n{"name": "weather", "arguments": {"city": "서울"}}\n</tool_call>'
    structured = {"role": "assistant", "content": "Let me see.", "tool_calls": CHAIN[1]["tool_calls"]}
    turns, notices = [ASK, {"role": "assistant", "content": f"Let me see.\n{written}"}], Notices()
    assert encode("plain", *turns, notices=notices, tools=[TOOL]) == encode("plain", ASK, structured, tools=[TOOL])
    assert notices == {"tool calls written in an answer, trained as tool calls": 1}
    for content in ("<tool_call>\nweather\n</tool_call>", written + " and more", written + written[:-3],
                    written.replace('"name"', '"id": 7, "name"')):
        notices = Notices()
        [(_, said)] = encode("plain", "q", content, notices=notices)
        assert said == content + "<|im_end|>"
        assert notices["<tool_call> in an answer that is no tool call, trained as text"] == 1


def test_a_system_message_for_those_without_one(tokenizer_with):
    tokenizer = tokenizer_with("plain")
    encoder = ConversationEncoder(tokenizer, 2048, system="Be brief.")
    [sample] = encoder(conversation("q", "a"))
    assert tokenizer.decode(sample.input_ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    own = conversation({"role": "system", "content": "Sing."}, "q", "a")
    assert encoder(own) == ConversationEncoder(tokenizer, 2048)(own)


def test_templates_for_conversations_with_and_without_tools(encode):
    both = {"default": template("false", "", "'no tools: ' + m.content if m.role == 'user' else m.content"),
            "tool_use": TEMPLATES["plain"]}
    assert encode(both, "q", "a") == [("", "a<|im_end|>")]
    call, answer = encode(both, ASK, {**CHAIN[1], "reasoning_content": ""}, CHAIN[2],
                          {"role": "assistant", "content": "a"}, tools=[TOOL])
    assert call[1].startswith("<tool_call>") and answer == ("", "a<|im_end|>")
    with pytest.raises(UserError, match="no default specified"):
        encode({"other": TEMPLATES["plain"]}, "q", "a")


@pytest.mark.parametrize("broken, reason", [
    ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"), ("{{ nothing.at.all }}", "undefined"),
    ("{{ messages[0].content + 1 }}", "can only concatenate"), ("{{ raise_exception('not me') }}", "not me")])
def test_a_broken_template_is_one_line(encode, broken, reason):
    with pytest.raises(UserError, match=f"the chat template of .* is broken: .*{reason}") as error:
        encode(broken, "q", "a")
    assert "\n" not in str(error.value)


def test_the_saved_default_is_the_trained_mode(tokenizer_with):
    def prompts(tokenizer):
        return [tokenizer.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True, **variables)
                for variables in ({}, {"enable_thinking": True}, {"enable_thinking": False})]

    for name in ("hybrid", "either", "either, off", "kept"):
        tokenizer = tokenizer_with(name)
        default, on, off = prompts(tokenizer)
        for modes, expected in (({"plain": 3}, off), ({"thinking": 3}, on), ({"plain": 1}, off)):
            note = set_default_mode(tokenizer, {"thinking": 0, "plain": 0, **modes})
            assert prompts(tokenizer) == [expected, on, off]
            assert f"enable_thinking={expected == on}" in note
            assert tokenizer.chat_template.count("default(") <= 2  # one line, however often it is trained
        tokenizer = tokenizer_with(name)
        note = set_default_mode(tokenizer, {"thinking": 2, "plain": 3})
        assert prompts(tokenizer)[0] == default and "2 answers were trained after the thinking prompt" in note
    for name in ("plain", "thinking", "cut"):
        tokenizer = tokenizer_with(name)
        assert set_default_mode(tokenizer, {"thinking": 1, "plain": 0}) == ""
        assert tokenizer.chat_template == TEMPLATES[name]
    several = tokenizer_with({"default": TEMPLATES["hybrid"], "tool_use": TEMPLATES["plain"]})
    set_default_mode(several, {"thinking": 0, "plain": 1})
    assert several.chat_template == {"default": DEFAULT_MODE.format("false") + TEMPLATES["hybrid"],
                                     "tool_use": TEMPLATES["plain"]}


@pytest.mark.parametrize("lazy", [False, True])
def test_a_data_set_of_answers_in_samples_of_their_own(tokenizer_with, tmp_path, lazy):
    path = tmp_path / "data.jsonl"
    turns = [turn for number in range(9) for turn in (ASK, {"role": "assistant", "content": f"a{number}"})]
    records = [{"messages": turns}, {"messages": [ASK, THOUGHT]}, {"messages": turns[:4]},
               {"messages": [{**ASK, "content": "word " * 500}, *turns[1:]]}]
    path.write_text("\n".join(map(json.dumps, records)))
    encoder = ConversationEncoder(tokenizer_with("hybrid"), 200, overlong="drop")
    dataset, report = load_dataset([str(path)], encoder, str(tmp_path / "cache"), lazy)
    assert len(dataset) == 12 and len(set(dataset.digests)) == 3 and report.left_out == {"too long": 1}
    expected = [sample for record in records for sample in encoder(to_conversation(record, Notices()))
                if sample.input_ids]
    for index, sample in enumerate(expected):
        assert dataset[index]["input_ids"].tolist() == sample.input_ids
        assert dataset[index]["labels"].tolist() == sample.labels
    lines = "\n".join(report.lines("Data:"))
    for row in ("records +4", "kept +3", "answers trained +12", "after the plain prompt +11",
                "after the thinking prompt +1", "in samples of their own +9", "samples +12"):
        assert re.search(rf"^ +{row}$", lines, re.MULTILINE), (row, lines)
    assert ("note: the tokens grew 3." in lines) == (not lazy) or "note: the tokens grew 4." in lines
    trained, held_out = split(dataset, 0.34)
    assert len(trained) + len(held_out) == 12 and not set(trained.digests) & set(held_out.digests)
    assert np.isin(held_out.digests, dataset.digests).all() and len(held_out)


def test_the_flags_reach_the_encoder(make_model, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [ASK, {"role": "assistant", "content": "a"}] * 2}))
    base = tmp_path / "base"
    base.mkdir()
    for file in make_model().iterdir():
        if file.name != "chat_template.jinja":
            (base / file.name).symlink_to(file)
    (base / "chat_template.jinja").write_text(TEMPLATES["hybrid"])
    tokenizer, train, _, reports = finetune.prepare([
        "--model_name_or_path", str(base), "--data_path", str(path), "--output_dir", str(tmp_path / "out"),
        "--cache_dir", str(tmp_path), "--thinking", "on", "--earlier_answers", "skip", "--system", "Be kind."])
    assert len(train) == 1 and reports["train"].modes == {"thinking": 1}
    assert tokenizer.decode(train[0]["input_ids"]).startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert AutoTokenizer.from_pretrained(base).chat_template == TEMPLATES["hybrid"]


def test_templates_are_of_the_kinds_they_say(tokenizer_with):
    styles = {name: next(iter(ConversationEncoder(tokenizer_with(name), 9).template.styles.values()))
              for name in TEMPLATES}
    assert {name: style.endings for name, style in styles.items()} == {
        "plain": {False: ""}, "hybrid": {True: "", False: EMPTY}, "thinking": {True: "<think>\n"},
        "either": {True: "<think>\n", False: EMPTY}, "either, off": {True: "<think>\n", False: EMPTY},
        "kept": {True: "<think>\n", False: EMPTY}, "cut": {True: "<think>\n"}}
    assert {name for name, style in styles.items() if style.default is False} == {"plain", "either, off"}
    assert {name for name, style in styles.items() if style.flat} == {"plain", "kept"}
    assert LAST in TEMPLATES["hybrid"] and OPENED in TEMPLATES["thinking"]
