"""The tokenizer's chat template: what it makes of a conversation, and what it silently leaves out.

Training, chat.py and the check of a template all render here, so what is trained is what inference builds.
"""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from mechanisms.data.records import Notices
from mechanisms.data.shapes import BadRecord, to_tool_calls
from mechanisms.data.text_encoder import MARK, TextEncoder
from mechanisms.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
OPEN, CLOSE = "<think>", "</think>"
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
# What a template may raise: it is foreign code.
TEMPLATE_ERRORS = jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError
BLOCK = re.compile(rf"\s*{OPEN}(.*?){CLOSE}(.*)", re.DOTALL)
CALL = re.compile(rf"{CALL_OPEN}(.*?){CALL_CLOSE}\s*", re.DOTALL)
XML_CALL = re.compile(r"<function=([^>\n]+)>\n?(.*?)</function>", re.DOTALL)
XML_ARGUMENT = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\s*", re.DOTALL)


KEEP = "keep_added_tokens"  # in tokenizer_config.json


class Style(NamedTuple):
    """What is known of a chat template, found by rendering probes.

    parts: what it renders beyond role and content, of the names in `used_parts`
    endings: {mode: what its prompt puts behind HEADER}; the modes are True (the model is to think) and False. A
        template with both takes the mode as `enable_thinking`.
    default: the mode of a prompt that asks for none
    flat: modes in which the prompt of each answer, with the answer, is the beginning of the rendering of the whole
        conversation: one rendering holds all of them
    xml_calls: tool calls are written as <function=name>, not as JSON
    """

    parts: frozenset[str]
    endings: dict[bool, str]
    default: bool
    flat: frozenset[bool]
    xml_calls: bool

    def variables(self, mode: bool) -> dict:
        """The template variables that ask for a mode."""
        return {"enable_thinking": mode} if len(self.endings) > 1 else {}


class ChatTemplate:
    """Renders the messages of a conversation with the tokenizer's own chat template.

    Added tokens in the content are marked on the way (see `text_encoder.MARK`), so that they are encoded as the text
    they are, and the only control tokens are those that the template writes.

    keep_added_tokens: those that have no part in the template and no end of a text are tokens in the content too (None:
        as the tokenizer's saved folder says, where training has left it)

    Raises UserError if the template is broken, or its answers are not found where its prompts end.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", keep_added_tokens: bool | None = None):
        self.tokenizer, self.ids_of = tokenizer, TextEncoder(tokenizer)
        vocabulary = tokenizer.get_added_vocab()
        if not {"<|im_start|>", END} <= vocabulary.keys():
            raise UserError(f"the tokenizer in {tokenizer.name_or_path} has no <|im_start|> and <|im_end|> tokens: "
                            "this is not a ChatML (Qwen) model")
        self.added = re.compile("|".join(map(re.escape, sorted(vocabulary, key=len, reverse=True))))
        if keep_added_tokens is None:
            keep_added_tokens = tokenizer.init_kwargs.get(KEEP, False)
        self.keep_added_tokens = keep_added_tokens
        self.kept = free_tokens(tokenizer) if keep_added_tokens else frozenset()
        self.styles: dict[str, Style] = {}  # of the one template, or of those for conversations with and without tools
        self.style(None)
        self.style([_TOOL])

    def style(self, tools: list[dict] | None) -> Style:
        """The Style of the template for a conversation with these tools."""
        try:
            template = self.tokenizer.get_chat_template(tools=tools)
        except ValueError as error:  # several templates, none of them the default
            raise UserError(f"{self.tokenizer.name_or_path}: {first_line(error)}") from error
        if template not in self.styles:
            self.styles[template] = self._probe(tools and [_TOOL])
        return self.styles[template]

    # -----------------------------------------------------------------------------------------------------------------
    # Messages as people write them -> messages as the template takes them
    # -----------------------------------------------------------------------------------------------------------------

    def prepare(self, messages: list[dict], tools: list[dict] | None, notices: Notices) -> tuple[list, list | None]:
        """-> (messages, tools) to render: thinking and tool calls in fields of their own, added tokens marked.

        Raises BadRecord for what the template leaves out.
        """
        style = self.style(tools)
        messages = self.structured(messages, tools, notices)
        left_out = used_parts(messages, tools) - style.parts
        if left_out:
            raise BadRecord([("the model's chat template leaves this out", part) for part in sorted(left_out)])
        text = "\0".join(strings([messages, tools]))
        if MARK in text:
            raise BadRecord([("a character that is used to mark control tokens", f"U+{ord(MARK):X}")])
        written = set(self.added.findall(text))
        for token in written:
            notices[f"{token} written in the data, {'kept as a token' if token in self.kept else 'read as text'}"] += 1
        written -= self.kept
        if written and not written.isdisjoint(self.added.findall("\0".join(dict_keys([messages, tools])))):
            raise BadRecord([("control token in the name of an argument", ", ".join(sorted(written)))])
        return self._marked([messages, tools]) if written else (messages, tools)

    def structured(self, messages: list[dict], tools: list[dict] | None, notices: Notices) -> list[dict]:
        """The messages, an assistant's thinking and tool calls out of its content where the template has fields for
        them. Raises BadRecord."""
        style = self.style(tools)
        return [self._structured(message, style, notices) for message in messages]

    def _structured(self, message, style, notices):
        if message["role"] != "assistant":
            return message
        if "reasoning_content" in style.parts:
            message = split_thinking(message)
        if "tool_calls" in style.parts and CALL_OPEN in message["content"] and "tool_calls" not in message:
            called = split_calls(message, style.xml_calls)
            notices["tool calls written in an answer, trained as tool calls" if called else
                    "<tool_call> in an answer that is no tool call, trained as text"] += 1
            message = called or message
        return message

    def _marked(self, value):
        if isinstance(value, str):
            return self.added.sub(lambda token: token[0] if token[0] in self.kept else
                                  f"{MARK}{token[0][0]}{MARK}{token[0][1:]}{MARK}", value)
        if isinstance(value, dict):
            return {key: self._marked(child) for key, child in value.items()}
        return [self._marked(child) for child in value] if isinstance(value, list) else value

    # -----------------------------------------------------------------------------------------------------------------
    # Rendering
    # -----------------------------------------------------------------------------------------------------------------

    def prompt(self, messages: list[dict], tools: list[dict] | None, mode: bool) -> str:
        """What inference gives the model for an answer to these prepared messages, as text for `ids_of`."""
        return self._render(messages, tools, self.style(tools).variables(mode), add_generation_prompt=True)

    def answered(self, messages: list[dict], tools: list[dict] | None, mode: bool,
                 notices: Notices) -> tuple[str, int, int]:
        """(text, start, end): the rendering of prepared messages, and where in it the last one, an answer, stands.

        text[:start] is the prompt, text[start:end] what the model must then say, through its <|im_end|>. Raises
        BadRecord if it does not stand behind the prompt's ending, or if words of it are lost.
        """
        style, answer = self.style(tools), messages[-1]
        text = self._render(messages, tools, style.variables(mode))
        start, ending = text.rfind(HEADER) + len(HEADER), style.endings[mode]
        if not text.startswith(ending, start) and ending.lstrip().startswith(OPEN) and CLOSE not in ending:
            # Such a template (QwQ's) shows the words only, and its prompt opens the block that the model must close.
            text = f"{text[:start]}{ending}{answer.get('reasoning_content', '')}\n{CLOSE}\n\n{text[start:]}"
        if start < len(HEADER) or not text.startswith(ending, start):
            raise BadRecord([("the rendering cannot be walked", "the answer does not begin as the prompt for it ends")])
        start += len(ending)
        end = text.find(END, start) + len(END)
        if end < start:
            # The template leaves the last turn open (Qwen1.5's does): without its end token the model would never
            # learn to stop.
            notices[OPEN_END] += 1
            text += END
            end = len(text)
        self.check_words(answer, text[start:end], mode, notices)
        return text, start, end

    def turns(self, text: str, mode: bool, tools: list[dict] | None) -> list[tuple[int, int]]:
        """[(start, end)] of all answers in a rendering that is flat in this mode, as `answered` finds the last one."""
        header, spans = HEADER + self.style(tools).endings[mode], []
        start = text.find(header)
        while start >= 0:
            start += len(header)
            end = text.find(END, start) + len(END)
            spans.append((start, end))
            start = text.find(header, end)
        return spans

    def check_words(self, answer: dict, said: str, mode: bool, notices: Notices) -> None:
        """Raise BadRecord if what is trained of an answer is not what it says; count what is trimmed."""
        words, reasoning = answer["content"], answer.get("reasoning_content") or ""
        kept = said[:-len(END)]
        if not (kept.endswith(words) if "tool_calls" not in answer else words in kept) or reasoning not in kept:
            if words.strip() not in kept or reasoning.strip() not in kept:
                raise BadRecord([("the model's chat template changes the words of an answer",
                                  f"{words[:60]!r} comes out as {kept[:60]!r}")])
            notices.note("blank space around an answer or its thinking, which the chat template trims",
                         (words if words.strip() != words else reasoning).replace(MARK, "")[:40])
        if mode and not reasoning and CLOSE in kept:
            notices[NO_THINKING] += 1

    def _render(self, messages, tools, variables, **options):
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **variables, **options)
        except TEMPLATE_ERRORS as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise BadRecord([("the model's chat template refuses it", reason)]) from error

    def joined(self, text: str, start: int) -> bool:
        """Whether the tokenizer joins the end of the prompt text[:start] with the beginning of the answer behind it.

        (Line breaks are. An answer is trained apart from its prompt; in a longer prompt that holds both they are one.)
        """
        if not text[start:start + 1].isspace():
            return False
        header = text.rindex("<|im_start|>", 0, start)
        end = text.index(END, start)
        return self.ids_of(text[header:end]) != self.ids_of(text[header:start]) + self.ids_of(text[start:end])

    # -----------------------------------------------------------------------------------------------------------------
    # Probes
    # -----------------------------------------------------------------------------------------------------------------

    def _probe(self, tools):
        prompts = {}
        for mode in (None, True, False):
            variables = {} if mode is None else {"enable_thinking": mode}
            try:
                prompts[mode] = self._render([_QUESTION], tools, variables, add_generation_prompt=True)
            except BadRecord as bad:
                if mode is None:
                    raise UserError(f"the chat template of {self.tokenizer.name_or_path} is broken: "
                                    f"{bad.args[0][0][1]}") from bad
        parts = self._rendered_parts(tools)
        if prompts.get(True, 0) != prompts.get(False, 0) and {True, False} <= prompts.keys():
            modes, default = (True, False), prompts[None] == prompts[True]
        else:  # one kind of prompt
            ending = prompts[None].rpartition(HEADER)[2]
            default = "reasoning_content" in parts or OPEN in ending and CLOSE not in ending
            modes, prompts = (default,), {default: prompts[None]}
        if not all(HEADER in prompts[mode] for mode in modes):
            self._refuse("its prompt for an answer does not end in them")
        if True in modes:
            parts |= {"reasoning_content"}
        call = ""
        if "tool_calls" in parts:
            call = self._render([_QUESTION, _calls("f")], tools, {})
        style = Style(frozenset(parts), {mode: prompts[mode].rpartition(HEADER)[2] for mode in modes}, default,
                      frozenset(), "<function=" in call.rpartition(HEADER)[2])
        template = self.tokenizer.get_chat_template(tools=tools)
        self.styles[template] = style  # which the following renders with
        for mode in modes:
            self._check(tools, mode)
        return style._replace(flat=frozenset(mode for mode in modes if self._is_flat(style, tools, mode)))

    def _rendered_parts(self, tools):
        """The parts of a conversation beyond role and content that the template renders."""
        parts = set()
        for part, (messages, times) in _PROBES.items():
            try:
                text = self._render(messages, [_tool("probename")] if part == "tools" else tools, {})
            except BadRecord:
                continue  # a template that cannot render it does not render it
            if text.count("probename") == times:
                parts.add(part)
        return parts

    def _check(self, tools, mode):
        """Refuse a template whose answers do not come out word for word behind its prompts."""
        messages = []
        for word in ("Yes, 1.", "好的，2。"):
            messages += [_QUESTION, {"role": "assistant", "content": word}]
            try:
                text, start, end = self.answered(messages, tools, mode, Notices())
                prompt = self.prompt(messages[:-1], tools, mode)
            except BadRecord as bad:
                self._refuse(": ".join(bad.args[0][0]))
            if text[:start] != prompt or not text[start:end].endswith(word + END):
                self._refuse(f"found: {text[len(prompt):end]!r} behind {prompt[-30:]!r}")

    def _refuse(self, reason):
        raise UserError(f"the chat template of {self.tokenizer.name_or_path} does not render assistant turns as "
                        "<|im_start|>assistant, line break, words, <|im_end|>: which tokens are the assistant's cannot "
                        f"be told exactly ({reason})")

    def _is_flat(self, style, tools, mode):
        """Whether no probe shows an answer otherwise than it was said (see `Style.flat`)."""
        alone = isinstance(self.tokenizer.chat_template, str) and "tools" in style.parts
        for tools in (None, [_TOOL]) if alone else (tools,):  # noqa: B020
            for messages in _dialogs(style, mode):
                try:
                    whole = self._render(messages, tools, style.variables(mode)) + END
                    for number, message in enumerate(messages):
                        if message["role"] == "assistant":
                            text, start, end = self.answered(messages[:number + 1], tools, mode, Notices())
                            prompt = self.prompt(messages[:number], tools, mode)
                            if text[:start] != prompt or not whole.startswith(text[:end]):
                                return False
                except BadRecord:
                    return False
        return True


OPEN_END = "last turn without <|im_end|>, which was added"
NO_THINKING = "answer without thinking, trained to close its thinking block at once"

_QUESTION = {"role": "user", "content": "q"}


def _tool(name):
    return {"type": "function", "function": {"name": name, "parameters": {}}}


_TOOL = _tool("f")
_RESULT = {"role": "tool", "content": "probename"}


def _calls(*names, **fields):
    return {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": name, "arguments": {}}} for name in names], **fields}


_PROBES = {  # part of a conversation: (messages, how often "probename" must appear)
    "tools": ([_QUESTION], 1),
    "tool_calls": ([_QUESTION, _calls("probename")], 1),
    "messages of role tool": ([_QUESTION, _calls("probename"), _RESULT], 2),
    "reasoning_content": ([_QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "probename"}], 1)}


def _dialogs(style, mode):
    """Conversations in which a template may show an answer otherwise than it was said."""
    turns = [[_QUESTION, {"role": "assistant", "content": "a"}] for _ in range(3)]
    chain = [_QUESTION, _calls("f"), _RESULT, _calls("f", "g", content="b"), _RESULT, _RESULT,
             {"role": "assistant", "content": "c"}]
    for dialog in (sum(turns, []), chain + turns[0] + chain):
        if dialog[1].get("tool_calls") and not {"tool_calls", "messages of role tool"} <= style.parts:
            continue
        for every in (0, 1, 2) if mode and "reasoning_content" in style.parts else (0,):
            messages = [{**message, "reasoning_content": "r"}
                        if every and message["role"] == "assistant" and number // 2 % every == 0 else message
                        for number, message in enumerate(dialog)]
            yield messages
            yield [{"role": "system", "content": "s"}, *messages]


def free_tokens(tokenizer: "PreTrainedTokenizerFast") -> frozenset[str]:
    """The added tokens that the chat template does not write, and that neither begin, end nor pad a text."""
    template = "\0".join(strings(tokenizer.chat_template))
    own = {"<|im_start|>", END, "<|endoftext|>", tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token,
           tokenizer.unk_token}
    return frozenset(token for token in tokenizer.get_added_vocab() if token not in own and token not in template)


def used_parts(messages: list[dict], tools: list[dict] | None) -> set[str]:
    """The parts of `Style.parts` that prepared messages and tools use."""
    parts = {"tools"} if tools else set()
    for message in messages:
        parts |= {part for part in ("tool_calls", "reasoning_content") if message.get(part)}
        if message["role"] == "tool":
            parts.add("messages of role tool")
    return parts


def split_thinking(message: dict) -> dict:
    """An answer that starts with one well-formed `<think>...</think>`: that as reasoning_content.

    Raises BadRecord if it has reasoning of its own beside it.
    """
    block = BLOCK.fullmatch(message["content"])
    if not block or any(tag in part for tag in (OPEN, CLOSE) for part in block.groups()):
        return message
    reasoning, words = block[1].strip("\n"), block[2].lstrip("\n")
    if message.get("reasoning_content") and reasoning.strip():
        raise BadRecord([("reasoning both in the content and in a key of its own", f"{message['content'][:60]!r}")])
    if not words.strip() and "tool_calls" not in message:
        raise BadRecord([("empty content", f"nothing comes after the thinking {message['content'][:60]!r}")])
    reasoning = message.get("reasoning_content") or reasoning
    return {**message, "content": words, "reasoning_content": reasoning if reasoning.strip() else ""}


def split_calls(message: dict, xml: bool) -> dict | None:
    """An answer that ends in `<tool_call>...</tool_call>` blocks: those as tool_calls; None if one is not a call."""
    words, opening, blocks = message["content"].partition(CALL_OPEN)
    blocks = opening + blocks
    calls = [_xml_call(block[1]) if xml else _json_call(block[1]) for block in CALL.finditer(blocks)]
    if CALL.sub("", blocks) or None in calls or CALL_CLOSE in words:
        return None
    return {**message, "content": words.rstrip(), "tool_calls": calls}


def _json_call(text):
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return None
    wrong = []
    calls = to_tool_calls([call], "assistant", "", wrong)
    return None if wrong else calls[0]


def _xml_call(text):
    call = XML_CALL.fullmatch(text.strip())
    if not call or XML_ARGUMENT.sub("", call[2]).strip():
        return None
    arguments = XML_ARGUMENT.findall(call[2])
    if len(dict(arguments)) < len(arguments):
        return None
    return {"type": "function", "function": {"name": call[1], "arguments": dict(arguments)}}


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
    values = [value]
    while values:
        value = values.pop()
        yield value
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
