"""One JSON record of any shape people have -> a Conversation, or everything that is wrong with it.

Shapes: lists of messages (`messages`, OpenAI's; `conversations`, ShareGPT's and the original script's; `data`), and a
question with its answer (`instruction`/`input`/`output`, Alpaca's, and the others of PAIRS).
"""

import hashlib
import json
from collections import Counter
from typing import NamedTuple

from mechanisms.data.records import DEEPEST, deeper

# Every spelling of a role met in the wild, and the role it is.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
         "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
         "function_call": "assistant", "tool_call": "assistant", "tool": "tool", "observation": "tool",
         "function_response": "tool", "tool_response": "tool", "function": "tool"}
CALL_ROLES = "function_call", "tool_call"  # of messages whose content is a call, or a list of calls
FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool"),
           "tool": ("assistant", "tool")}  # what may stand right before a message of this role
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys for what an assistant thinks before it answers
LISTS = "messages", "conversations", "data"  # keys of a list of messages, in the order of use
# Keys of a question, of what it is about, and of its answer, in the order of use.
PAIRS = (("instruction", "input", "output"), ("instruction", "context", "response"), ("prompt", None, "completion"),
         ("query", None, "response"), ("prompt", None, "response"), ("question", None, "answer"))
ANY_SHAPE = {"system", "tools", "functions"}
TARGETS = dict.fromkeys([*LISTS, *(key for pair in PAIRS for key in pair if key), "history", *sorted(ANY_SHAPE),
                         *REASONING])  # what --columns may name
METADATA = {"id", "type", "source"}  # known keys that say nothing about the conversation
SWITCHES = ("train", "loss", "weight", "loss_weight", "loss_scale", "mask")  # mask: true means not trained
# Keys that hold a part of the conversation which this program cannot train on.
UNUSABLE = ("images", "image", "videos", "video", "audios", "audio")
MESSAGE_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", "tool_call_id", "name", *REASONING,
                *SWITCHES}


class Conversation(NamedTuple):
    """messages: dicts with "role" and "content" (str) as chat templates take them; tools: JSON schemas or None;
    trained: for each assistant message in order, whether it may be trained; digest: a 64-bit number, equal for equal
    conversations."""

    messages: list[dict]
    tools: list[dict] | None
    trained: tuple[bool, ...]
    digest: int

    def shown(self) -> dict:
        """What rejected.jsonl shows of it."""
        return {"messages": self.messages, "tools": self.tools, "trained": self.trained}


class BadRecord(Exception):
    """A record that cannot be trained on. args[0]: list of (kind, detail)."""


def parse_columns(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Words of --columns, each TARGET=COLUMN -> ({key of a known shape: column of the data}, lines: what is wrong)."""
    columns, problems = {}, []
    for word in words:
        target, _, column = word.partition("=")
        if not column:
            problems.append(f"--columns {word}: write TARGET=COLUMN, as in prompt=question")
        elif target not in TARGETS:
            problems.append(f"--columns {word}: there is no {target!r} to fill. There are {', '.join(TARGETS)}")
        elif columns.setdefault(target, column) != column:
            problems.append(f"--columns fills {target!r} twice, from {columns[target]!r} and {column!r}")
    if not problems:
        try:
            if missing := [key for key in needed_keys(columns) if key not in columns]:
                problems.append(f"--columns: {missing[0]}=... is missing, the answer")
        except BadRecord as bad:
            problems.append(f"--columns: {': '.join(bad.args[0][0])}")
    return columns, problems


def needed_keys(columns: dict[str, str]) -> list[str]:
    """The keys that every record must have with these --columns: its list of messages, or its question and answer."""
    shape = find_shape(dict.fromkeys(columns, []))
    return [shape[0], *shape[2:]]


def with_columns(record: dict, columns: dict[str, str], notices: Counter[str]) -> dict:
    """The record under the keys of a known shape: the columns that --columns names, and no others. Raises BadRecord."""
    there = ", ".join(map(repr, record)) or "none"
    lacking = [target for target, column in columns.items() if column not in record]
    if wrong := [("a column that --columns names is missing", f"{columns[target]!r} for {target}; there are {there}")
                 for target in lacking if target in needed_keys(columns)]:
        raise BadRecord(wrong)
    for target in lacking:
        notices.note(no_column(target, columns[target]), there)
    for key in record.keys() - columns.values() - METADATA:
        notices[f"key {key!r} of the record"] += 1
    return {target: record[column] for target, column in columns.items() if column in record}


def no_column(target: str, column: str) -> str:
    """The notice of it, where it need not be there."""
    return f"record without {column!r} (--columns {target}={column})"


def to_conversation(record: object, notices: Counter[str], columns: dict[str, str] | None = None) -> Conversation:
    """One record of any of the shapes -> Conversation. Raises BadRecord with all that is wrong with it.

    columns: {key of a shape: key of the record that is meant}; without it a record has keys of a shape itself.
    """
    if not isinstance(record, dict):
        raise BadRecord([("a record is a JSON object", f"this is {type(record).__name__}")])
    if columns:
        record = with_columns(record, columns, notices)
    shape = find_shape(record)
    wrong = []  # (kind, detail)
    if deeper(record):
        raise BadRecord([("nested too deeply", f"more than {DEEPEST} levels")])
    used = {*shape, "history", *REASONING} if len(shape) > 1 else {*shape}
    used.update(key for key in LISTS if key in record and record[key] is None)
    for key in record.keys() - used - ANY_SHAPE - METADATA:
        if key not in (*UNUSABLE, *REASONING, "function_call"):
            notices[f"key {key!r} of the record"] += 1
        elif record[key]:
            wrong.append((f"{key!r} cannot be used", f"{shown(record[key])} of the record"))
    turns = pair_turns(record, *shape, wrong) if len(shape) > 1 else list_turns(record[shape[0]], shape[0], wrong)
    if not isinstance(turns, list) or not turns:
        raise BadRecord(wrong or [("empty conversation", f"{shape[0]!r} is {shown(turns)}")])
    if record.get("system"):
        turns = with_system(record["system"], turns, wrong)
    messages, trained = [], []
    for number, turn in enumerate(turns, 1):
        message, train = to_message(turn, f"message {number}", wrong, notices)
        messages.append(message)
        if message.get("role") == "assistant":
            trained.append(train)
    if not wrong:
        messages, trained = joined(messages, trained, wrong, notices)
        before, greeting = None, greeted(messages)
        if greeting:
            trained[0] = False
            notices["first message from the assistant: context, not trained"] += 1
        for number, message in enumerate(messages, 1):
            if before not in FOLLOWS[message["role"]] and message is not greeting:
                wrong.append(("roles out of order",
                              f"message {number} ({message['role']}) comes after {before or 'nothing'}"))
            before = message["role"]
        if not trained:
            wrong.append(("no assistant turn", "there is nothing to learn from"))
    tools = to_tools(record, wrong)
    if wrong:
        raise BadRecord(wrong)
    while messages[-1]["role"] != "assistant":  # nobody answers it: nothing is learned from it
        messages.pop()
        notices["unanswered last message"] += 1
    try:
        written = json.dumps([messages, tools, trained], ensure_ascii=False, sort_keys=True).encode()
    except UnicodeEncodeError as error:
        raise BadRecord([("half a character", f"{error.object[error.start]!r} is half of a surrogate pair: the text "
                          "was cut or converted wrongly")]) from error
    digest = int.from_bytes(hashlib.blake2b(written, digest_size=8).digest(), "big")
    return Conversation(messages, tools, tuple(trained), digest)


def greeted(messages: list[dict]) -> dict | None:
    """The message with which the assistant begins a conversation that a user goes on with, and it answers; or None.

    (Every template of Qwen renders it where it stands, and so does inference; but no prompt asks for it.)
    """
    roles = [message["role"] for message in messages]
    first = roles[:1] == ["system"]
    if roles[first:first + 2] == ["assistant", "user"] and "assistant" in roles[first + 2:]:
        return messages[first]
    return None


def find_shape(record: dict) -> tuple[str | None, ...]:
    """The keys of the shape of a record: one of LISTS or of PAIRS. Raises BadRecord, also for records that other
    programs train on."""
    if record.get("chosen") is not None and record.get("rejected") is not None:
        raise BadRecord([("preference record", "'chosen' and 'rejected' are for DPO, which this program does not do; "
                          "TRL's DPOTrainer trains on them")])
    lists = [key for key in LISTS if key in record and (key != "data" or isinstance(record[key], list))]
    shapes = [(key,) for key in lists if record[key] is not None]
    shapes += [pair for pair in PAIRS if pair[0] in record and pair[2] in record]
    shapes += [(key,) for key in lists] + [PAIRS[0]] * ("instruction" in record)
    if shapes:
        return shapes[0]
    if isinstance(record.get("text"), str):
        raise BadRecord([("plain text", "'text' has no question and no answer; continued pre-training is done by "
                          "TRL's SFTTrainer or LLaMA-Factory's stage pt")])
    keys = ", ".join(map(repr, record)) or "none"
    raise BadRecord([("unknown shape", f"keys {keys}; known are 'messages', 'conversations', 'data' and "
                      + ", ".join(f"{question!r} with {answer!r}" for question, _, answer in PAIRS)
                      + nearest_shape(record))])


def nearest_shape(record: dict) -> str:
    """A hint for a record of a shape like, but not quite, a known one."""
    hints = {"conversation": "conversations", "message": "messages", "dialog": "messages", "dialogue": "messages",
             "chat": "messages"}
    answers = {question: answer for question, _, answer in reversed(PAIRS)}
    return next((f"; nearest: rename {key!r} to {hints[key]!r}" for key in record if key in hints),
                next((f"; nearest: name the answer to {key!r} {answers[key]!r}"
                      for key in record if key in answers), ""))


def shown(value: object) -> str:
    """The beginning of a JSON value, for a message."""
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


def with_system(system: object, turns: list, wrong: list[tuple[str, str]]) -> list:
    """The turns after the system message that stands beside them in the record."""
    first = turns[0] if isinstance(turns[0], dict) else {}
    if first.get("role", first.get("from")) != "system":
        return [{"role": "system", "content": system}, *turns]
    if first.get("content", first.get("value")) != system:
        wrong.append(("two system messages", f"'system' of the record is {shown(system)}, and message 1 is another"))
    return turns


def to_tools(record: dict, wrong: list[tuple[str, str]]) -> list[dict] | None:
    """The tools of a record: its `tools`, as a list or a string of JSON, or OpenAI's older `functions`; or None."""
    tools, key = record.get("tools") or None, "tools"
    if record.get("functions"):
        if tools:
            wrong.append(("'functions' cannot be used", "beside 'tools' of the record"))
        tools, key = record["functions"], "functions"
    if isinstance(tools, str):
        tools = parse_json(tools, key, wrong)
    if tools is None:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        wrong.append(("tools are a list of JSON schemas", f"this is {type(tools).__name__}"))
        return None
    return tools if key == "tools" else [{"type": "function", "function": function} for function in tools]


def list_turns(turns: object, key: str, wrong: list[tuple[str, str]]) -> object:
    """The messages of a record: a list of them, JSON text of one, or strings said by user and assistant in turns."""
    if isinstance(turns, str) and turns.strip():
        turns = parse_json(turns, key, wrong)
    if key == "data" and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return turns


def pair_turns(record: dict, question_key: str, about_key: str | None, answer_key: str,
               wrong: list[tuple[str, str]]) -> list[dict]:
    """A question, what it is about, and its answer, with optional history [[question, answer], ...] -> messages."""
    question, about, answer = record[question_key], record.get(about_key), record.get(answer_key)
    if about not in (None, "", [], {}):
        if isinstance(question, str) and isinstance(about, str):
            question = f"{question}\n{about}" if question else about
        else:
            wrong.append((f"{question_key} and {about_key} are strings", f"{about_key} is {shown(about)}"))
    history, turns = record.get("history") or [], []
    if isinstance(history, str):
        history = parse_json(history, "history", wrong) or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BadRecord([("history is a list of [question, answer]", shown(pair))])
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    reasoning = {key: record[key] for key in REASONING if key in record}
    if is_messages(question):
        turns += question
    else:
        turns.append({"role": "user", "content": question})
    if is_messages(answer) and not any(reasoning.values()):
        return turns + answer
    return [*turns, {"role": "assistant", "content": answer, **reasoning}]


def is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in value)


def joined(messages: list[dict], trained: list[bool], wrong: list[tuple[str, str]],
           notices: Counter[str]) -> tuple[list[dict], list[bool]]:
    """Two messages of one role in a row as one, joined by a blank line; text and the tool call after it as one.

    Tool results stay apart. An answer after a call without its result, or trained otherwise than the one before, is
    refused.
    """
    result, switches, after = [], [], iter(trained)
    for number, message in enumerate(messages, 1):
        train = next(after) if message["role"] == "assistant" else None
        before = result[-1] if result else {}
        if message["role"] == "tool" or message["role"] != before.get("role"):
            result.append(message)
            switches += [train] if train is not None else []
            continue
        if train is not None and (train != switches[-1] or message.get("reasoning_content")
                                  or before.get("tool_calls") and not message.get("tool_calls")):
            wrong.append(("roles out of order", f"message {number} (assistant) comes after assistant, and the two are "
                          "not one: a call without its result, thinking in between, or only one is trained"))
        both = {**before, "content": "\n\n".join(filter(str.strip, (before["content"], message["content"])))}
        calls = [*before.get("tool_calls", []), *message.get("tool_calls", [])]
        result[-1] = {**both, "tool_calls": calls} if calls else both
        notices["two messages of one role in a row, joined"] += 1
    return result, switches


def to_message(turn: object, name: str, wrong: list[tuple[str, str]], notices: Counter[str]) -> tuple[dict, bool]:
    """One turn in either spelling (role/content, from/value) -> (message, whether it may be trained)."""
    if not isinstance(turn, dict):
        wrong.append(("a message is a JSON object", f"{name} is {type(turn).__name__}"))
        return {}, False
    for key in turn.keys() - MESSAGE_KEYS:
        if key not in UNUSABLE:
            notices[f"key {key!r} of a message"] += 1
    written_role = turn.get("role", turn.get("from"))
    role = ROLES.get(written_role.strip().lower()) if isinstance(written_role, str) else None
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and content and all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in content):
        content = "".join(part["text"] for part in content)
    if role is None:
        wrong.append(("unknown role", f"{name} has role {written_role!r}; known are {', '.join(ROLES)}"))
        return {}, False
    message, called = {"role": role, "content": content}, turn.get("tool_calls")
    if turn.get("function_call") and not called:  # OpenAI's older spelling
        called = [turn["function_call"]]
    elif turn.get("function_call"):
        wrong.append(("'function_call' cannot be used", f"beside 'tool_calls' of {name}"))
    wrong += [(f"{key!r} cannot be used", f"{shown(turn[key])} of {name}") for key in UNUSABLE if turn.get(key)]
    if role == "tool" and content is None:
        message["content"] = ""
    if role == "assistant" and written_role.strip().lower() in CALL_ROLES:
        calls = parse_json(content, f"{name} ({written_role})", wrong) if isinstance(content, str) else content
        message = {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    elif called:
        message = {"role": role, "content": "" if content is None else content, "tool_calls": called}
    reasoning = [turn[key] for key in REASONING if turn.get(key)]
    if role != "assistant" or any(text != reasoning[0] or not isinstance(text, str) for text in reasoning):
        wrong += [("thinking is one string of an assistant message", f"{name} ({role}) has {shown(text)}")
                  for text in reasoning[:1]]
    elif reasoning and reasoning[0].strip():
        message["reasoning_content"] = reasoning[0]
    if not isinstance(message["content"], str):
        kind = "null" if content is None else type(content).__name__
        wrong.append(("content is not a string", f"{name} ({role}) has {kind}"))
    elif not message["content"].strip() and role not in ("system", "tool") \
            and not message.get("tool_calls"):
        wrong.append(("empty content", f"{name} ({role}) says nothing"))
    if "tool_calls" in message:
        message["tool_calls"] = to_tool_calls(message["tool_calls"], role, name, wrong)
    return message, train_switch(turn, role, name, wrong)


def to_tool_calls(calls: object, role: str, name: str, wrong: list[tuple[str, str]]) -> list[dict]:
    """Tool calls with their arguments as objects: templates print them as JSON, a string would be quoted twice."""
    if role != "assistant" or not isinstance(calls, list):
        wrong.append(("tool_calls are a list in an assistant message", name))
        return []
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wrong.append(("a tool call has a name and arguments", name))
            continue
        arguments, faults = function.get("arguments"), len(wrong)
        for _ in range(2):  # JSON text, or JSON text of JSON text
            if isinstance(arguments, str) and arguments:
                arguments = parse_json(arguments, f"{name}, arguments of {function['name']}", wrong)
        if arguments is None or arguments == "":
            arguments = {}
        if not isinstance(arguments, dict) and len(wrong) == faults:
            wrong.append(("arguments are a JSON object", f"{name}, those of {function['name']} are {shown(arguments)}"))
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def parse_json(text: object, name: str, wrong: list[tuple[str, str]]) -> object:
    """The value of a JSON text; None, and the fault added to `wrong`, if it is not one."""
    try:
        value = json.loads(text)
        if deeper(value):
            raise RecursionError
        return value
    except RecursionError:
        wrong.append(("nested too deeply", f"{name}: more than {DEEPEST} levels"))
    except (TypeError, ValueError) as error:
        wrong.append(("not valid JSON inside the record", f"{name}: {error}"))


def train_switch(turn: dict, role: str, name: str, wrong: list[tuple[str, str]]) -> bool:
    """What SWITCHES of a message say (true/false or 1/0), all meaning the same but for mask; absent: trained."""
    given = {key: turn[key] for key in SWITCHES if turn.get(key) is not None}
    trained = {bool(value) != (key == "mask") for key, value in given.items()}
    if any(isinstance(value, (list, dict)) or value not in (0, 1) for value in given.values()) or len(trained) > 1:
        wrong.append(("train, loss and weight are true or false (1 or 0)", f"{name} has {shown(given)}"))
    elif True in trained and role != "assistant":
        wrong.append(("only assistant messages can be trained", f"{name} ({role}) asks for it: {shown(given)}"))
    return trained != {False}
