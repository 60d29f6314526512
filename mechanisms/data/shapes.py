"""One JSON record of any shape people have -> a Conversation, or everything that is wrong with it.

Shapes: `messages` (role/content, OpenAI's), `conversations` (from/value, ShareGPT's and the original Qwen script's) and
`instruction`/`input`/`output` (Alpaca's).
"""

import hashlib
import json
from collections import Counter
from typing import NamedTuple

from mechanisms.data.records import DEEPEST, deeper

# Every spelling of a role met in the wild, and the role it is.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "function_call": "assistant", "tool_call": "assistant", "tool": "tool", "observation": "tool",
         "function_response": "tool", "tool_response": "tool", "function": "tool"}
CALL_ROLES = "function_call", "tool_call"  # of messages whose content is a call, or a list of calls
FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool"),
           "tool": ("assistant", "tool")}  # what may stand right before a message of this role
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys for what an assistant thinks before it answers
SHAPES = {"messages": {"messages"}, "conversations": {"conversations"},
          "instruction": {"instruction", "input", "output", "history", *REASONING}}
ANY_SHAPE = {"system", "tools", "functions"}
METADATA = {"id", "type", "source"}  # known keys that say nothing about the conversation
SWITCHES = ("train", "loss", "weight", "loss_weight", "loss_scale", "mask")  # mask: true means not trained
# Keys that hold a part of the conversation which this program cannot train on.
UNUSABLE = ("images", "image", "videos", "video", "audios", "audio", "function_call")
MESSAGE_KEYS = {"role", "from", "content", "value", "tool_calls", "tool_call_id", "name", *REASONING, *SWITCHES}


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


def to_conversation(record: object, notices: Counter[str]) -> Conversation:
    """One record of any of the three shapes -> Conversation. Raises BadRecord with all that is wrong with it."""
    if not isinstance(record, dict):
        raise BadRecord([("a record is a JSON object", f"this is {type(record).__name__}")])
    shape = next((shape for shape in SHAPES if shape in record), None)
    if shape is None:
        keys = ", ".join(map(repr, record)) or "none"
        raise BadRecord([("unknown shape", f"keys {keys}; known are 'messages', 'conversations' and 'instruction' with "
                          f"'output'{nearest_shape(record)}")])
    wrong = []  # (kind, detail)
    if deeper(record):
        raise BadRecord([("nested too deeply", f"more than {DEEPEST} levels")])
    unusable = {*UNUSABLE, *REASONING} - SHAPES[shape]
    for key in record.keys() - SHAPES[shape] - ANY_SHAPE - METADATA:
        if key not in unusable:
            notices[f"key {key!r} of the record"] += 1
        elif record[key]:
            wrong.append((f"{key!r} cannot be used", f"{shown(record[key])} of the record"))
    turns = record[shape] if shape != "instruction" else alpaca_turns(record, wrong)
    if not isinstance(turns, list) or not turns:
        raise BadRecord([("empty conversation", f"{shape!r} is {shown(turns)}")])
    if record.get("system") and shape != "instruction":
        turns = with_system(record["system"], turns, wrong)
    messages, trained = [], []
    for number, turn in enumerate(turns, 1):
        message, train = to_message(turn, f"message {number}", wrong, notices)
        messages.append(message)
        if message.get("role") == "assistant":
            trained.append(train)
    if not wrong:
        before = None
        for number, message in enumerate(messages, 1):
            if before not in FOLLOWS[message["role"]]:
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


def nearest_shape(record: dict) -> str:
    """A hint for a record of a shape like, but not quite, a known one."""
    hints = {"conversation": "conversations", "message": "messages", "dialog": "messages", "dialogue": "messages",
             "chat": "messages", "prompt": "instruction", "query": "instruction", "question": "instruction",
             "text": "messages"}
    found = next((f"; nearest: rename {key!r} to {hints[key]!r}" for key in record if key in hints), "")
    if "instruction" in found:
        return found + " and the answer to 'output'"
    return found


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


def alpaca_turns(record: dict, wrong: list[tuple[str, str]]) -> list[dict]:
    """instruction/input/output, with optional system and history [[question, answer], ...] -> messages."""
    question = record["instruction"]
    if record.get("input"):
        if isinstance(question, str) and isinstance(record["input"], str):
            question = f"{question}\n{record['input']}" if question else record["input"]
        else:
            wrong.append(("instruction and input are strings", f"input is {shown(record['input'])}"))
    turns = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    history = record.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BadRecord([("history is a list of [question, answer]", shown(pair))])
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    reasoning = {key: record[key] for key in REASONING if key in record}
    return [*turns, {"role": "user", "content": question},
            {"role": "assistant", "content": record.get("output"), **reasoning}]


def to_message(turn: object, name: str, wrong: list[tuple[str, str]], notices: Counter[str]) -> tuple[dict, bool]:
    """One turn in either spelling (role/content, from/value) -> (message, whether it may be trained)."""
    if not isinstance(turn, dict):
        wrong.append(("a message is a JSON object", f"{name} is {type(turn).__name__}"))
        return {}, False
    for key in turn.keys() - MESSAGE_KEYS:
        if key not in UNUSABLE:
            notices[f"key {key!r} of a message"] += 1
    written_role = turn.get("role", turn.get("from"))
    role = ROLES.get(written_role) if isinstance(written_role, str) else None
    content = turn.get("content", turn.get("value"))
    if role is None:
        wrong.append(("unknown role", f"{name} has role {written_role!r}; known are {', '.join(ROLES)}"))
        return {}, False
    message, called = {"role": role, "content": content}, turn.get("tool_calls")
    for key in UNUSABLE:
        if key == "function_call" and not content and not called and turn.get(key):  # OpenAI's older spelling
            called = [turn[key]]
        elif turn.get(key):
            wrong.append((f"{key!r} cannot be used", f"{shown(turn[key])} of {name}"))
    if written_role in CALL_ROLES:
        calls = parse_json(content, f"{name} ({written_role})", wrong)
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
    elif not message["content"].strip() and role != "system" and not message.get("tool_calls"):
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
        arguments = function.get("arguments")
        if arguments is None:
            arguments = {}
        elif isinstance(arguments, str):
            arguments = parse_json(arguments, f"{name}, arguments of {function['name']}", wrong)
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
