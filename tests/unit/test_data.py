"""Records out of files: every shape, every encoding of lines, and every problem with its place."""

import collections
import functools
import json
import time

import pytest

from mechanisms.data.datasets import load_dataset
from mechanisms.data.encoder import ConversationEncoder
from mechanisms.data.records import Notices, Place, Problems, find_files, read_records
from mechanisms.data.shapes import BadRecord, parse_columns, to_conversation
from mechanisms.errors import UserError
from mechanisms.tokenizer import load_tokenizer

MESSAGES = {"messages": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "하세요"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好"}], "id": "7"}
ALPACA = {"instruction": "Translate", "input": "Hund", "output": "dog"}


def read(path):
    problems = Problems()
    return list(read_records(str(path), problems)), problems


def shape(record):
    notices = collections.Counter()
    return to_conversation(record, notices), notices


def kinds_of(record):
    with pytest.raises(BadRecord) as bad:
        to_conversation(record, collections.Counter())
    return [kind for kind, _ in bad.value.args[0]]


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("form", ["array", "pretty array", "lines", "lines with gaps", "pretty objects"])
def test_content_decides_the_format_and_places_are_right(tmp_path, bom, newline, form):
    records = [MESSAGES, SHAREGPT, ALPACA]
    dumped = [json.dumps(record, ensure_ascii=False) for record in records]
    text, lines = {
        "array": (json.dumps(records, ensure_ascii=False), [1, 1, 1]),
        "pretty array": ("[\n" + ",\n".join(dumped) + "\n]\n", [2, 3, 4]),
        "lines": ("\n".join(dumped), [1, 2, 3]),
        "lines with gaps": ("\n" + "\n\n".join(dumped) + "\n\n", [2, 4, 6]),
        "pretty objects": ("{\n" + dumped[0][1:] + "\n" + dumped[1] + "\n\n" + dumped[2], [1, 3, 5])}[form]
    path = tmp_path / "data.txt"  # the name says nothing
    path.write_bytes(bom + text.replace("\n", newline).encode())
    found, problems = read(path)
    assert [record for _, record in found] == records
    assert [place.line for place, _ in found] == lines
    assert [place.number for place, _ in found] == [1, 2, 3]
    assert not problems.rejected and not problems.fatal


def test_files_folders_and_globs_in_a_fixed_order(tmp_path):
    for name in ("b.jsonl", "a.json", "sub/c.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    problems = Problems()
    folder = [path[len(str(tmp_path)) + 1:] for path in find_files([str(tmp_path)], problems)]
    assert folder == ["a.json", "b.jsonl", "sub/c.jsonl"]
    assert len(find_files([str(tmp_path / "*.json*"), str(tmp_path / "a.json")], problems)) == 2
    assert not problems.fatal
    (tmp_path / "none").mkdir()
    find_files([str(tmp_path / "gone.json"), str(tmp_path / "none"), str(tmp_path / "*.csv")], problems)
    assert len(problems.fatal) == 3  # all of them, not the first


def test_shapes_come_to_the_same_messages():
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    system = [{"role": "system", "content": "s"}]
    assert shape({"messages": plain})[0].messages == plain
    for record in ({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
                   {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
                   {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
                   {"instruction": "q", "output": "a"}, {"instruction": "q", "input": "", "output": "a"}):
        assert shape(record)[0].messages == plain
    for record in ({"messages": system + plain}, {"conversations": plain, "system": "s"},
                   {"instruction": "q", "output": "a", "system": "s"}):
        assert shape(record)[0].messages == system + plain
    history = shape({"instruction": "q", "input": "i", "output": "a", "history": [["q0", "a0"]]})[0].messages
    assert [message["content"] for message in history] == ["q0", "a0", "q\ni", "a"]


def test_sharegpt_function_calls():
    conversation, _ = shape({"conversations": [
        {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "a"}], "tools": '[{"name": "f"}]'})
    assert conversation.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert [message["role"] for message in conversation.messages] == ["user", "assistant", "tool", "assistant"]
    assert conversation.tools == [{"name": "f"}] and conversation.trained == (True, True)


def test_extra_keys_and_unanswered_ends_are_counted():
    unanswered = {"role": "user", "content": "and?", "mood": 3}
    record = {"messages": [*MESSAGES["messages"], unanswered], "lang": "ko", "id": 1}
    conversation, notices = shape(record)
    assert conversation.messages == MESSAGES["messages"]
    assert notices == {"key 'lang' of the record": 1, "key 'mood' of a message": 1, "unanswered last message": 1}


U, A, S = ({"role": role, "content": "x"} for role in ("user", "assistant", "system"))


@pytest.mark.parametrize("record, kind", [
    ("text", "a record is a JSON object"),
    ({"foo": 1}, "unknown shape"),
    ({"messages": []}, "empty conversation"),
    ({"conversations": None}, "empty conversation"),
    ({"messages": ["hi"]}, "a message is a JSON object"),
    ({"messages": [{"role": "robot", "content": "x"}, A]}, "unknown role"),
    ({"messages": [{"role": ["user"], "content": "x"}, A]}, "unknown role"),
    ({"messages": [A, U]}, "roles out of order"),
    ({"messages": [U, A, {**A, "train": False}]}, "roles out of order"),
    ({"messages": [U, {"role": "assistant", "tool_calls": [{"name": "f"}]}, A]}, "roles out of order"),
    ({"messages": [U, A, {**A, "reasoning": "hm"}]}, "roles out of order"),
    ({"messages": [U, A, S, U, A]}, "roles out of order"),
    ({"messages": [U, A, {"role": "tool", "content": "x"}, U, A]}, "roles out of order"),
    ({"messages": [U]}, "no assistant turn"),
    ({"messages": [{"role": "user", "content": 5}, A]}, "content is not a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}, A]}, "content is not a string"),
    ({"messages": [U, {"role": "assistant", "content": None}]}, "content is not a string"),
    ({"instruction": "x"}, "content is not a string"),
    ({"instruction": "x", "output": " \n"}, "empty content"),
    ({"instruction": "x", "output": "y", "history": [["q"]]}, "history is a list of [question, answer]"),
    ({"messages": [U, {**A, "weight": 0.5}]}, "train, loss and weight are true or false (1 or 0)"),
    ({"messages": [U, {**A, "loss": "yes"}]}, "train, loss and weight are true or false (1 or 0)"),
    ({"messages": [U, {**A, "train": True, "weight": 0}]}, "train, loss and weight are true or false (1 or 0)"),
    ({"messages": [{**U, "train": True}, A]}, "only assistant messages can be trained"),
    ({"messages": [U, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
     "a tool call has a name and arguments"),
    ({"messages": [U, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
     "not valid JSON inside the record"),
    ({"messages": [U, A], "tools": {"name": "f"}}, "tools are a list of JSON schemas"),
    ({"messages": [U, {"role": "assistant", "content": "\ud800"}]}, "half a character"),
])
def test_every_rule_refuses_what_breaks_it(record, kind):
    assert kinds_of(record) == [kind]


def test_all_faults_of_a_record_are_named():
    assert kinds_of({"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": 1}]}) == [
        "unknown role", "content is not a string"]


def test_nearest_shape_is_named(real_data):
    with pytest.raises(BadRecord, match="rename 'conversation' to 'conversations'"):
        [(_, record), *_], _ = read(real_data / "datasets/sharegpt/ms-swift_sharegpt.jsonl")
        to_conversation(record, collections.Counter())


def test_broken_line_of_a_large_file_is_found(tmp_path):
    line = json.dumps(MESSAGES, ensure_ascii=False)
    lines = [line] * 200_000
    lines[123_456] = line[:-5]
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    start = time.process_time()
    found, problems = read(path)
    assert time.process_time() - start < 20
    assert len(found) == 199_999
    [row] = problems.rejected
    assert (row["line"], row["record"]) == (123_457, 123_457)
    assert f"{path}:123457 (record 123457): not valid JSON: " in problems.report()


@pytest.mark.parametrize("data, message", [
    (b"", "the file is empty"), (b" \n\n", "the file is empty"), (b"[]", "no records"),
    (b'[{"a": 1},\n{"b": }]', ":2: not valid JSON in record 2"),
    (b'[{"a": 1}\n{"b": 2}]', ":2: not valid JSON: expected ',' or ']' after record 1"),
    (b'[{"a": 1},\n {"b": 2}', "the file ends inside the array, after record 2"),
    (b'[{"a": 1}]\nxyz', ":2: text after the end of the array"),
    ('{"a": "你好"}\n'.encode("gb18030"), ":1: not UTF-8 (byte 0xc4), perhaps gb18030"),
    ('[\n{"a": "안녕하세요"}]'.encode("cp949"), ":2: not UTF-8"),
    ('[{"a": 1}]'.encode("utf-16"), "UTF-16, not UTF-8"),
    (b"[" * 100_000, "not valid JSON in record 1"),
])
def test_unreadable_files_say_what_and_where(tmp_path, data, message):
    path = tmp_path / "bad.json"
    path.write_bytes(data)
    _, problems = read(path)
    [fatal] = problems.fatal
    assert str(path) in fatal and message in fatal
    with pytest.raises(UserError):
        problems.stop_or_skip(allowed=1000)  # no number of skipped rows gets around it


def test_report_shows_twenty_and_counts_the_rest(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(['{"x": 1}'] * 30 + ['{"messages": []}'] * 5 + ["{"] * 7), encoding="utf-8")
    problems = Problems()
    for place, record in read_records(str(path), problems):
        try:
            to_conversation(record, collections.Counter())
        except BadRecord as bad:
            problems.add(place, bad.args[0], record)
    with pytest.raises(UserError) as error:
        problems.stop_or_skip(allowed=41)
    text = str(error.value)
    assert text.count("(record ") == 20 and "and 22 more" in text and "--skip_bad_rows 42" in text
    assert "30 x unknown shape" in text and "5 x empty conversation" in text and "7 x not valid JSON" in text
    problems.stop_or_skip(allowed=42)
    problems.write(tmp_path / "rejected.jsonl")
    rows = [json.loads(line) for line in open(tmp_path / "rejected.jsonl", encoding="utf-8")]
    assert len(rows) == 42 and set(rows[0]) == {"file", "line", "record", "reasons", "data"}


Q = {"role": "user", "content": "q"}


CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
TOOL = {"role": "tool", "content": "3"}
JOINED = {"two messages of one role in a row, joined": 1}


@pytest.mark.parametrize("record, messages", [
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, A]},
     [{"role": "user", "content": "ab"}, A]),
    ({"prompt": "q", "completion": "x"}, [Q, A]),
    ({"prompt": [S, Q], "completion": [A]}, [S, Q, A]),
    ({"prompt": [Q], "completion": "x"}, [Q, A]),
    ({"query": "q", "response": "x", "history": [["x", "x"]]}, [U, A, Q, A]),
    ({"query": "q", "response": "x", "history": '[["x", "x"]]'}, [U, A, Q, A]),
    ({"prompt": "q", "response": "x"}, [Q, A]),
    ({"question": "q", "answer": "x", "system": "x"}, [S, Q, A]),
    ({"instruction": "q", "context": "", "response": "x"}, [Q, A]),
    ({"instruction": "q", "context": "c", "response": "x"}, [{"role": "user", "content": "q\nc"}, A]),
    ({"instruction": "", "input": "q", "output": "x"}, [Q, A]),
    ({"data": ["q", "x", "x", "x"]}, [Q, A, U, A]),
    ({"data": [Q, A]}, [Q, A]),
    ({"messages": None, "conversations": [Q, A]}, [Q, A]),
    ({"messages": json.dumps([Q, A])}, [Q, A]),
    *[({"messages": [{"role": user, "content": "q"}, {"role": assistant, "content": "x"}]}, [Q, A])
      for user, assistant in (("User", "MODEL"), ("human", "bot"), ("HUMAN", "ChatGPT"))],
    ({"messages": [{"role": "developer", "content": "x"}, Q, A]}, [S, Q, A]),
    ({"messages": [Q, CALL, {"role": "tool", "content": ""}, A]}, [Q, CALL, {"role": "tool", "content": ""}, A]),
    ({"messages": [Q, CALL, {"role": "tool", "content": None}, A]}, [Q, CALL, {"role": "tool", "content": ""}, A]),
    ({"messages": [Q, {**A, "function_call": {"name": "f", "arguments": '{"x": 1}'}}, TOOL, A]},
     [Q, {**CALL, "content": "x"}, TOOL, A]),
    ({"messages": [Q, {"role": "function_call", "content": {"name": "f", "arguments": {"x": 1}}}, TOOL, A]},
     [Q, CALL, TOOL, A])])
def test_every_shape_gives_the_right_messages(record, messages):
    conversation, notices = shape(record)
    assert conversation.messages == messages and not notices


@pytest.mark.parametrize("messages, result", [
    ([Q, U, A], [{"role": "user", "content": "q\n\nx"}, A]),
    ([S, S, Q, A], [{"role": "system", "content": "x\n\nx"}, Q, A]),
    ([Q, A, A], [Q, {"role": "assistant", "content": "x\n\nx"}]),
    ([Q, A, CALL, TOOL, A], [Q, {**CALL, "content": "x"}, TOOL, A]),
    ([Q, CALL, CALL, TOOL, TOOL, A], [Q, {**CALL, "tool_calls": CALL["tool_calls"] * 2}, TOOL, TOOL, A])])
def test_two_messages_of_one_role_in_a_row_are_joined_and_counted(messages, result):
    conversation, notices = shape({"messages": messages})
    assert conversation.messages == result and notices == JOINED
    assert len(conversation.trained) == sum(message["role"] == "assistant" for message in result)


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}', json.dumps('{"x": 1}')])
def test_arguments_are_an_object_however_often_encoded(arguments):
    record = {"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}, TOOL, A]}
    assert shape(record)[0].messages[1] == CALL


@pytest.mark.parametrize("nothing", [None, "null", "", {}, "{}", '""'])
def test_arguments_of_nothing_are_an_empty_object(nothing):
    record = {"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": nothing}]}, TOOL, A]}
    assert shape(record)[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {}


@pytest.mark.parametrize("record, message", [
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "this program does not do; TRL's DPOTrainer trains on them"),
    ({"text": "Once upon a time"}, "continued pre-training is done by TRL's SFTTrainer or LLaMA-Factory's stage pt"),
    ({"question": "q", "solution": "x"}, "nearest: name the answer to 'question' 'answer'"),
    ({"instruction": "q", "input": 0, "output": "x"}, "input is 0"),
    ({"instruction": "q", "input": False, "output": "x"}, "input is false"),
    ({"instruction": "q", "input": [3, 4], "output": "x"}, "input is [3, 4]"),
    *[({"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}, TOOL, A]},
       f"message 2, those of f are {shown}")
      for arguments, shown in (("5", "5"), (5, "5"), ([1], "[1]"), (False, "false"))]])
def test_a_refusal_says_what_it_is(record, message):
    with pytest.raises(BadRecord) as bad:
        shape(record)
    assert message in ": ".join(bad.value.args[0][0])


@pytest.mark.parametrize("record, messages", [
    ({"system": "Rhyme.", "messages": [Q, A]}, [{"role": "system", "content": "Rhyme."}, Q, A]),
    ({"system": "x", "messages": [S, Q, A]}, [S, Q, A]),
    ({"messages": [Q, {**A, "reasoning": "hm"}]}, [Q, {**A, "reasoning_content": "hm"}]),
    ({"messages": [Q, {**A, "thinking": "hm", "reasoning_content": "hm"}]}, [Q, {**A, "reasoning_content": "hm"}]),
    ({"instruction": "q", "output": "x", "thinking": "hm"}, [Q, {**A, "reasoning_content": "hm"}]),
    ({"messages": [Q, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                   {"role": "function", "name": "f", "content": "3"}, A], "functions": [{"name": "f"}]},
     [Q, {"role": "assistant", "content": "", "tool_calls": [
         {"type": "function", "function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "3"}, A]),
    ({"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": None}]},
                   {"role": "tool", "content": "3"}, A]},
     [Q, {"role": "assistant", "content": "", "tool_calls": [
         {"type": "function", "function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "3"}, A]),
    ({"messages": [Q, {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
                   {"role": "tool_response", "content": "3"}, A]},
     [Q, {"role": "assistant", "content": "", "tool_calls": [
         {"type": "function", "function": {"name": "f", "arguments": {}}}]}, {"role": "tool", "content": "3"}, A])])
def test_content_is_used_wherever_it_stands(record, messages):
    conversation, notices = shape(record)
    assert conversation.messages == messages and not notices
    if "functions" in record:
        assert conversation.tools == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("record, kind", [
    ({"system": "Rhyme.", "messages": [S, Q, A]}, "two system messages"),
    ({"messages": [Q, A], "images": ["a.png"]}, "'images' cannot be used"),
    ({"messages": [{**Q, "images": ["a.png"]}, A]}, "'images' cannot be used"),
    ({"messages": [Q, {**A, "function_call": {"name": "f"}, "tool_calls": [{"name": "f"}]}]},
     "'function_call' cannot be used"),
    ({"messages": [Q, A], "tools": [{"name": "f"}], "functions": [{"name": "f"}]}, "'functions' cannot be used"),
    ({"messages": [Q, A], "reasoning": "hm"}, "'reasoning' cannot be used"),
    ({"messages": [Q, {**A, "reasoning": ["hm"]}]}, "thinking is one string of an assistant message"),
    ({"messages": [Q, {**A, "reasoning": "hm", "thinking": "no"}]}, "thinking is one string of an assistant message"),
    ({"messages": [{**Q, "reasoning": "hm"}, A]}, "thinking is one string of an assistant message"),
    ({"messages": [Q, {**A, "loss_weight": 0.5}]}, "train, loss and weight are true or false (1 or 0)"),
    ({"messages": [Q, {**A, "mask": True, "train": True}]}, "train, loss and weight are true or false (1 or 0)"),
    ({"instruction": "Double it.", "input": 21, "output": "42"}, "instruction and input are strings"),
    ({"instruction": "q", "output": "a", "history": 5}, "history is a list of [question, answer]"),
    ({"instruction": "q", "output": "a", "history": float("nan")}, "history is a list of [question, answer]"),
    ({"messages": [Q, A], "tools": "[" * 5000}, "nested too deeply"),
    ({"messages": [Q, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 500 + "]" * 500}]}]},
     "nested too deeply"),
    ({"messages": [Q, A], "tools": [functools.reduce(lambda inner, _: {"p": inner}, range(600), {})]},
     "nested too deeply")])
def test_content_that_cannot_be_used_is_a_problem(record, kind):
    assert kinds_of(record) == [kind]


def test_the_record_of_a_problem_can_always_be_shown(tmp_path):
    problems = Problems()
    deep = functools.reduce(lambda inner, _: [inner], range(900), [])
    problems.add(Place("a", 1, 1), [("kind", "detail")], {"messages": deep})
    problems.write(tmp_path / "rejected.jsonl")
    assert "nested too deeply to be shown" in problems.report()


@pytest.mark.parametrize("off", [{"mask": True}, {"loss_weight": 0}, {"loss_scale": 0.0}, {"train": False}])
def test_every_switch_is_honoured(off):
    assert shape({"messages": [Q, {**A, **off}, Q, A]})[0].trained == (False, True)
    on = {key: not value if key != "loss_scale" else 1.0 for key, value in off.items()}
    assert shape({"messages": [Q, {**A, **on}]})[0].trained == (True,)


def test_columns_say_what_is_what():
    record = {"question": "q", "answer_text": "a", "rules": "s", "prompt": "unused", "id": 1}
    columns, wrong = parse_columns(["prompt=question", "response=answer_text", "system=rules"])
    assert columns == {"prompt": "question", "response": "answer_text", "system": "rules"} and not wrong
    notices = Notices()
    assert [message["content"] for message in to_conversation(record, notices, columns).messages] == ["s", "q", "a"]
    assert notices == {"key 'prompt' of the record": 1}
    record = {"prompt": "q", "chosen": [U, A], "rejected": [U, {**A, "content": "worse"}]}
    assert to_conversation(record, Notices(), {"messages": "chosen"}).messages == [U, A]
    with pytest.raises(BadRecord) as bad:
        to_conversation({"q": "q", "answer_text": "a"}, Notices(), columns)
    assert bad.value.args[0] == [("a column that --columns names is missing",
                                  "'question' for prompt; there are 'q', 'answer_text'")]
    assert to_conversation({"question": "q", "answer_text": "a"}, notices, columns).messages[0]["content"] == "q"
    assert notices["record without 'rules' (--columns system=rules)"] == 1


@pytest.mark.parametrize("words, message", [
    (["promt=q", "response=a"], "--columns promt=q: there is no 'promt' to fill. There are messages, conversations, "),
    (["prompt"], "--columns prompt: write TARGET=COLUMN, as in prompt=question"),
    (["prompt=a", "prompt=b"], "--columns fills 'prompt' twice, from 'a' and 'b'"),
    (["prompt=a"], "--columns: unknown shape: keys 'prompt'; known are 'messages', "),
    (["instruction=a"], "--columns: output=... is missing, the answer"),
    (["system=a"], "--columns: unknown shape: keys 'system'; known are")])
def test_columns_that_cannot_be(words, message):
    [problem] = parse_columns(words)[1]
    assert problem.startswith(message)


def test_a_column_that_no_record_has_is_refused(make_model, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"q": "1", "a": "2"}\n{"q": "3", "a": "4"}\n')
    encoder, loaded = ConversationEncoder(load_tokenizer(str(make_model())), 64), {}
    for system in ("rules", "q"):
        columns = {"prompt": "q", "response": "a", "system": system}
        loaded[system] = load_dataset([str(path)], encoder, str(tmp_path), columns=columns)[1]
    assert loaded["rules"].problems.fatal == [
        "--columns system=rules: no record has 'rules'; the first one has 'q', 'a'"]
    assert loaded["q"].kept == 2 and not loaded["q"].problems.fatal  # and no cache is taken for another's


def test_the_assistant_may_speak_first_and_that_is_context():
    for before in ([], [S]):
        conversation, notices = shape({"messages": [*before, A, U, A, U, A]})
        assert conversation.trained == (False, True, True) and len(conversation.messages) == len(before) + 5
        assert notices == {"first message from the assistant: context, not trained": 1}
    assert shape({"messages": [A, A, U, A]})[0].trained == (False, True)
    for messages in ([A], [A, U], [S, A], [A, {"role": "tool", "content": "x"}, A]):
        with pytest.raises(BadRecord, match="roles out of order"):
            shape({"messages": messages})


def test_a_first_message_of_the_assistant_stands_where_inference_puts_it(real):
    _, tokenizer, encoder = real
    messages = [{"role": "assistant", "content": "Welcome!"}, U, {"role": "assistant", "content": "yes"}]
    [sample] = encoder(shape({"messages": messages})[0])
    prompt = tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True, enable_thinking=False,
                                           return_dict=False)
    assert sample.input_ids[:len(prompt)] == prompt and "Welcome!" in tokenizer.decode(prompt)
    assert tokenizer.decode([label for label in sample.labels if label != -100]) == "yes<|im_end|>"


def test_a_data_file_that_cannot_be_read_is_named(make_model, tmp_path):
    encoder = ConversationEncoder(load_tokenizer(str(make_model())), 64)
    for lazy in (False, True):
        with pytest.raises(UserError) as error:
            load_dataset(["/proc/self/mem", str(tmp_path)], encoder, str(tmp_path / "cache"), lazy)
        assert str(error.value).split("\n       ") == ["/proc/self/mem: cannot be read: Input/output error",
                                                       f"{tmp_path}: cannot be read: Is a directory"]
