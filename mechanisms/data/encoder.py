"""A conversation -> the ids of its tokens and the label of each: what is trained and what is not."""

import collections
import dataclasses
import re
from typing import NamedTuple

import jinja2

from mechanisms.data.shapes import BadRecord, Conversation
from mechanisms.data.template import dict_keys, rendered_parts, split_thinking, strings, used_parts
from mechanisms.data.text_encoder import TextEncoder
from mechanisms.errors import UserError

IGNORED = -100  # the label of a token that is not trained (torch.nn.functional.cross_entropy's ignore_index)


class Sample(NamedTuple):
    """input_ids and labels (lists of int of one length; labels are IGNORED where nothing is trained).

    outcome: "kept", "truncated", or why it is left out ("nothing to learn", "too long").
    """

    input_ids: list
    labels: list
    outcome: str


@dataclasses.dataclass(eq=False)
class ConversationEncoder:
    """Conversation -> Sample, by one rendering with the tokenizer's own chat template.

    Control tokens in the content are encoded as plain text. The trained spans are found by walking the ids of that one
    rendering: from after `<|im_start|>assistant\\n` through its `<|im_end|>`, what the model itself will have to say
    after the prompt that inference builds.

    Its fields are all that a sample depends on beside the conversation: the token cache's key is made of them.

    Raises UserError if the tokenizer has no ChatML tokens or its template renders conversations in a way that cannot be
    walked so.
    """

    tokenizer: object
    max_length: int
    loss_on: str = "assistant"
    overlong: str = "truncate"

    def __post_init__(self):
        tokenizer = self.tokenizer
        self.ids_of = TextEncoder(tokenizer)
        vocabulary = tokenizer.get_added_vocab()
        if not {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys():
            raise UserError(f"the tokenizer in {tokenizer.name_or_path} has no <|im_start|> and <|im_end|> tokens: "
                            "this is not a ChatML (Qwen) model")
        self.start, self.end = vocabulary["<|im_start|>"], vocabulary["<|im_end|>"]
        *self.header, self.newline = tokenizer.encode("assistant\n", add_special_tokens=False)
        self.control_tokens = re.compile("|".join(map(re.escape, sorted(vocabulary, key=len, reverse=True))))
        self.rendered = rendered_parts(tokenizer)
        self._check_template()

    def __call__(self, conversation: Conversation, notices: collections.Counter | None = None) -> Sample:
        """Encode one conversation; `notices` counts what was changed in it. Raises BadRecord."""
        notices = collections.Counter() if notices is None else notices
        return self.encode(conversation, self.render(conversation, notices), notices)

    def render(self, conversation: Conversation, notices: collections.Counter) -> str | list[int]:
        """The conversation as text, or as ids where its content holds control tokens that must become plain text."""
        messages, tools = conversation.messages, conversation.tools
        left_out = used_parts(conversation) - self.rendered
        if left_out:
            raise BadRecord([("the model's chat template leaves this out", part) for part in sorted(left_out)])
        if "reasoning_content" in self.rendered:
            messages = [split_thinking(message) for message in messages]
        written = set(self.control_tokens.findall("\0".join(strings([messages, tools]))))
        if written and any(self.control_tokens.search(key) for key in dict_keys([messages, tools])):
            raise BadRecord([("control token in the name of an argument", ", ".join(sorted(written)))])
        for token in written:
            notices[f"{token} written in the data"] += 1
        try:
            if not written:
                return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            return self.tokenizer.apply_chat_template(messages, tools=tools, sanitize_control_tokens=True,
                                                      return_dict=False)
        except (jinja2.TemplateError, TypeError) as error:
            raise BadRecord([("the model's chat template refuses it", str(error))]) from error

    def encode(self, conversation: Conversation, rendered: str | list[int], notices: collections.Counter) -> Sample:
        """A conversation and its `render`ing -> Sample. Raises BadRecord."""
        ids = self.ids_of(rendered) if isinstance(rendered, str) else rendered
        labels = list(ids) if self.loss_on == "all" else [IGNORED] * len(ids)
        spans = self._assistant_spans(ids, labels, notices)
        if len(spans) != len(conversation.trained):
            raise BadRecord([("the rendering cannot be walked", f"{len(conversation.trained)} assistant messages, but "
                              f"{len(spans)} found in what the chat template makes of them")])
        for number, ((start, end), trained) in enumerate(zip(spans, conversation.trained), 1):
            if self.loss_on != "all" and trained and (self.loss_on == "assistant" or number == len(spans)):
                labels[start:end] = ids[start:end]
            elif not trained:
                labels[start:end] = [IGNORED] * (end - start)
        outcome = "kept"
        if len(ids) > self.max_length:
            if self.overlong == "error":
                raise BadRecord([("longer than --model_max_length", f"{len(ids)} tokens (--overlong error)")])
            if self.overlong == "drop":
                return Sample([], [], "too long")
            ids, labels, outcome = ids[:self.max_length], labels[:self.max_length], "truncated"
        if labels[1:].count(IGNORED) >= len(labels) - 1:  # the first token is never predicted
            return Sample([], [], "nothing to learn")
        return Sample(ids, labels, outcome)

    def _assistant_spans(self, ids, labels, notices):
        """[(start, end)] of every assistant turn's words and end token; corrects ids and labels on two points."""
        spans, position = [], -1
        while True:
            try:
                position = ids.index(self.start, position + 1)
            except ValueError:
                return spans
            start = position + 1 + len(self.header)
            if ids[position + 1:start] != self.header or start >= len(ids):
                continue
            if ids[start] != self.newline:
                # Words that begin with a line break: the tokenizer fused it with the header's. Inference will give
                # the model the header with its own "\n" token, so that is what is trained.
                fused = self.tokenizer.decode([ids[start]])
                if not fused.startswith("\n"):
                    continue
                parts = [self.newline, *self.tokenizer.encode(fused[1:], add_special_tokens=False)]
                ids[start:start + 1] = parts
                labels[start:start + 1] = parts if self.loss_on == "all" else [IGNORED] * len(parts)
            start += 1
            if self.end not in ids[start:]:
                # The template leaves the last turn open (Qwen1.5's does): without its end token the model would never
                # learn to stop.
                notices["last turn without <|im_end|>, which was added"] += 1
                ids.append(self.end)
                labels.append(self.end if self.loss_on == "all" else IGNORED)
            end = ids.index(self.end, start) + 1
            spans.append((start, end))
            position = end - 1

    def _check_template(self):
        """Refuse a template whose assistant turns do not come out word for word."""
        words, turns = ["Yes, 1.", "好的，2。"], []
        for word in words:
            turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": word}]
        ids = self.tokenizer.apply_chat_template(turns, return_dict=False)
        spans = self._assistant_spans(ids, list(ids), collections.Counter())
        found = [self.tokenizer.decode(ids[start:end]) for start, end in spans]
        if len(found) != 2 or not all(text.endswith(word + "<|im_end|>")
                                      for text, word in zip(found, words, strict=True)):
            raise UserError(f"the chat template of {self.tokenizer.name_or_path} does not render assistant turns as "
                            "<|im_start|>assistant, line break, words, <|im_end|>: which tokens are the assistant's "
                            f"cannot be told exactly (found: {found})")
