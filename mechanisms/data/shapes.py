"""One JSON record of any shape people have -> a Conversation, or everything that is wrong with it.

Shapes: `messages` (role/content, OpenAI's), `conversations` (from/value, ShareGPT's and the original Qwen script's) and
`instruction`/`input`/`output` (Alpaca's).
"""

import hashlib
import json
from collections import Counter
from typing import NamedTuple

# Every spelling of a role met in the wild, and the role it is.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "function_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool"}
FOLLOWS = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user", "tool"),
           "tool": ("assistant", "tool")}  # what may stand right before a message of this role
SHAPES = {"messages": {"messages", "tools"}, "conversations": {"conversations", "tools", "system"},
          "instruction": {"instruction", "input", "output", "system", "history"}}
METADATA = {"id", "type", "source"}  # known keys that say nothing about the conversation
MESSAGE_KEYS = {"role", "from", "content", "value", "tool_calls", "tool_call_id", "name", "reasoning_content", "train",
                "loss", "weight"}


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
    for key in record.keys() - SHAPES[shape] - METADATA:
        notices[f"key {key!r} of the record"] += 1

    wrong = []  # (kind, detail)
    turns = record[shape] if shape != "instruction" else alpaca_turns(record)
    if not isinstance(turns, list) or not turns:
        raise BadRecord([("empty conversation", f"{shape!r} is {json.dumps(turns, ensure_ascii=False)[:60]}")])
    if shape == "conversations" and record.get("system"):
        turns = [{"role": "system", "content": record["system"]}, *turns]
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
    tools = record.get("tools") or None
    if isinstance(tools, str):
        tools = parse_json(tools, "tools", wrong)
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        wrong.append(("tools are a list of JSON schemas", f"this is {type(tools).__name__}"))
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


def alpaca_turns(record: dict) -> list[dict]:
    """instruction/input/output, with optional system and history [[question, answer], ...] -> messages."""
    question = record["instruction"]
    if record.get("input") and isinstance(question, str) and isinstance(record["input"], str):
        question = f"{question}\n{record['input']}" if question else record["input"]
    turns = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for pair in record.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise BadRecord([("history is a list of [question, answer]", json.dumps(pair, ensure_ascii=False)[:60])])
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": record.get("output")}]


def to_message(turn: object, name: str, wrong: list[tuple[str, str]], notices: Counter[str]) -> tuple[dict, bool]:
    """One turn in either spelling (role/content, from/value) -> (message, whether it may be trained)."""
    if not isinstance(turn, dict):
        wrong.append(("a message is a JSON object", f"{name} is {type(turn).__name__}"))
        return {}, False
    for key in turn.keys() - MESSAGE_KEYS:
        notices[f"key {key!r} of a message"] += 1
    written_role = turn.get("role", turn.get("from"))
    role = ROLES.get(written_role) if isinstance(written_role, str) else None
    content = turn.get("content", turn.get("value"))
    if role is None:
        wrong.append(("unknown role", f"{name} has role {written_role!r}; known are {', '.join(ROLES)}"))
        return {}, False
    message = {"role": role, "content": content}
    if written_role == "function_call":
        calls = parse_json(content, f"{name} (function_call)", wrong)
        message = {"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    elif turn.get("tool_calls"):
        message = {"role": role, "content": "" if content is None else content, "tool_calls": turn["tool_calls"]}
    if isinstance(turn.get("reasoning_content"), str) and role == "assistant":
        message["reasoning_content"] = turn["reasoning_content"]
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
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{name}, arguments of {function['name']}", wrong)
        result.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def parse_json(text: object, name: str, wrong: list[tuple[str, str]]) -> object:
    """The value of a JSON text; None, and the fault added to `wrong`, if it is not one."""
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        wrong.append(("not valid JSON inside the record", f"{name}: {error}"))


def train_switch(turn: dict, role: str, name: str, wrong: list[tuple[str, str]]) -> bool:
    """"train", "loss" (true/false) or "weight" (0/1) of a message, all meaning the same; absent: trained."""
    switches = [turn[key] for key in ("train", "loss", "weight") if turn.get(key) is not None]
    if any(switch not in (0, 1) for switch in switches) or len(set(map(bool, switches))) > 1:
        wrong.append(("train, loss and weight are true or false (1 or 0)", f"{name} has {switches}"))
    elif switches and switches[0] and role != "assistant":
        wrong.append(("only assistant messages can be trained", f"{name} ({role}) asks for it"))
    return bool(switches[0]) if switches else True
