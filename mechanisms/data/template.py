"""What a chat template renders and what it silently leaves out, found by rendering probes."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jinja2

from mechanisms.data.shapes import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CALL = {"type": "function", "function": {"name": "probename", "arguments": {}}}
_QUESTION = {"role": "user", "content": "q"}
_PROBES = {  # part of a conversation: (messages, tools, how often "probename" must appear)
    "tools": ([_QUESTION], [{"type": "function", "function": {"name": "probename", "parameters": {}}}], 1),
    "tool_calls": ([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]}], None, 1),
    "messages of role tool": ([_QUESTION, {"role": "assistant", "content": "", "tool_calls": [_CALL]},
                               {"role": "tool", "content": "probename"}], None, 2),
    "reasoning_content": ([_QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "probename"}],
                          None, 1)}


def rendered_parts(tokenizer: "PreTrainedTokenizerFast") -> set[str]:
    """The parts of a conversation beyond role and content that the tokenizer's chat template renders, as a set."""
    parts = set()
    for part, (messages, tools, times) in _PROBES.items():
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except (jinja2.TemplateError, TypeError):
            continue  # a template that cannot render it does not render it
        if text.count("probename") == times:
            parts.add(part)
    return parts


def used_parts(conversation: Conversation) -> set[str]:
    """The parts of `rendered_parts` that a conversation uses."""
    parts = {"tools"} if conversation.tools else set()
    for message in conversation.messages:
        parts |= {part for part in ("tool_calls", "reasoning_content") if message.get(part)}
        if message["role"] == "tool":
            parts.add("messages of role tool")
    return parts


def split_thinking(message: dict) -> dict:
    """`<think>...</think>` in an assistant's content as reasoning_content, which is what Qwen3's template makes of it.

    Done here because neutralised control tokens would keep the template from recognising them.
    """
    content = message["content"]
    if message["role"] != "assistant" or "reasoning_content" in message or "</think>" not in content:
        return message
    reasoning = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
    return {**message, "reasoning_content": reasoning, "content": content.split("</think>")[-1].lstrip("\n")}


def strings(value: object) -> Iterator[str]:
    """Every string inside a JSON value, keys of dicts included."""
    for part in _parts(value):
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            yield from part


def dict_keys(value: object) -> Iterator[str]:
    """Every key of every dict inside a JSON value."""
    for part in _parts(value):
        if isinstance(part, dict):
            yield from part


def _parts(value):
    """A JSON value and everything inside it, keys of dicts aside."""
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _parts(child)
