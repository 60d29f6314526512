"""What must be trained of a conversation, worked out a second time.

This file knows the tokenizer and its `apply_chat_template` only, nothing of the encoder: two answers to one question.
"""

import functools
import json
import re
import unicodedata

from tokenizers import AddedToken

IGNORED = -100
END = "<|im_end|>"


class Difference(AssertionError):
    """What is trained is not what should be."""


class Oracle:
    """Compares the samples of conversations with what `apply_chat_template` makes of them.

    thinking: "auto", "on" or "off", as for the encoder; kept: the added tokens that are tokens in the data.
    """

    def __init__(self, tokenizer, thinking="auto", kept=()):
        self.tokenizer, self.thinking = tokenizer, thinking
        if kept:  # special ones are always sanitized
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in kept])
        sanitized = tokenizer.get_added_vocab().keys() - set(kept)
        self.tokenizer.chat_control_tokens = list(sanitized)
        self.added = set(tokenizer.convert_tokens_to_ids(sorted(sanitized)))
        self.end = tokenizer.convert_tokens_to_ids(END)
        question = [{"role": "user", "content": "q"}]
        thinks, plain = (self.text(question, mode, prompt=True) for mode in (True, False))
        self.both = thinks != plain
        shown = self.text([*question, {"role": "assistant", "content": "a", "reasoning_content": "probe"}], True)
        self.has_thinking = "probe" in shown or self.both or thinks.rstrip().endswith("<think>")
        call = self.text([*question, {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "probe", "arguments": {}}}]}], True)
        self.json_calls = "probe" in call and "<function=" not in call

    def possible(self):
        """Whether the template has such a prompt at all."""
        return self.both or self.thinking == "auto" or (self.thinking == "on") == self.has_thinking

    def refused(self, messages, trained):
        """Whether an answer with thinking would have to follow the prompt without."""
        return self.both and self.thinking == "off" and any(
            switch and self.split(message)[0]
            for message, switch in zip((message for message in messages if message["role"] == "assistant"), trained))

    def text(self, messages, mode, tools=None, prompt=False):
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt,
                                                  enable_thinking=mode)

    def ids(self, messages, mode, tools, prompt):
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, enable_thinking=mode, sanitize_control_tokens=True,
            return_dict=False)

    def split(self, message):
        """(thinking, words) of an assistant message."""
        thinking, words = message.get("reasoning_content") or "", message["content"]
        if self.has_thinking and words.lstrip().startswith("<think>") and words.count("<think>") == 1 \
                and words.count("</think>") == 1:
            inner, words = words.lstrip().removeprefix("<think>").split("</think>")
            thinking, words = thinking or inner.strip("\n"), words.lstrip("\n")
        return thinking if thinking.strip() else "", words

    def as_sent(self, message):
        """A message as a careful client sends it back: thinking and calls apart, so that no template cuts words."""
        if message["role"] != "assistant":
            return message
        if self.has_thinking:
            thinking, words = self.split(message)
            message = {**message, "content": words, "reasoning_content": thinking}
        calls = None if "tool_calls" in message or not self.json_calls else self.calls(message["content"])
        if calls:
            message = {**message, "content": message["content"].split("<tool_call>")[0].rstrip(), "tool_calls": calls}
        return message

    @staticmethod
    def calls(content):
        """The tool calls that a text ends in, or None."""
        words, *blocks = content.split("<tool_call>")
        calls = []
        for block in blocks:
            text, *after = block.split("</tool_call>")
            try:
                call = json.loads(text)
            except ValueError:
                return None
            if len(after) != 1 or after[0].strip() or sorted(call) != ["arguments", "name"]:
                return None
            calls.append({"type": "function", "function": call})
        return None if "</tool_call>" in words else calls

    def answer(self, message, opening):
        """What the model must say behind a prompt that ends in `opening`: [exact text, or the same trimmed]."""
        whole = self.split(message)
        for thinking, words in (whole, (whole[0].strip("\n"), whole[1].lstrip("\n")), map(str.strip, whole)):
            block = f"<think>\n{thinking}\n</think>\n\n" if self.has_thinking and "</think>" not in opening else ""
            if "<think>" in opening and "</think>" not in opening:
                block = block.removeprefix("<think>\n")
            yield block + words + END

    def compare(self, messages, tools, trained, samples):
        """The number of answers compared. Raises Difference.

        trained: for each assistant message, whether it is trained; samples: objects with input_ids and labels, all
        those of the conversation, none of them cut.
        """
        messages = [self.as_sent(message) for message in messages]
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for place, switch in zip(places, trained):
            if switch:
                spans.append((place, *self.find(messages, place, tools, samples)))
        labelled = sum(label != IGNORED for sample in samples for label in sample.labels)
        if labelled != sum(len(said) for *_, said in spans):
            raise Difference(f"{labelled} tokens are trained, the answers have {sum(len(said) for *_, said in spans)}")
        for sample in samples:
            last = max(end for end, label in enumerate(sample.labels, 1) if label != IGNORED)
            if self.added & set(sample.input_ids[last:]) or self.tokenizer.decode(sample.input_ids[last:]).strip():
                raise Difference(f"after the last answer: {self.tokenizer.decode(sample.input_ids[last:])!r}")
        needed = sum(not any(later[:len(prompt) + len(said)] == prompt + said for _, later, _ in spans[number:])
                     for number, (_, prompt, said) in enumerate(spans, 1))
        if len(samples) != needed:
            raise Difference(f"{len(samples)} samples, {needed} are needed")
        return len(spans)

    def find(self, messages, place, tools, samples):
        """(prompt, what is trained behind it) of one answer, as ids. Raises Difference if it is not just that."""
        message, decode = messages[place], self.tokenizer.decode
        mode = {"auto": bool(message.get("reasoning_content")), "on": True, "off": False}[self.thinking]
        prompt = self.ids(messages[:place], mode, tools, prompt=True)
        found = [sample for sample in samples if sample.input_ids[:len(prompt)] == prompt
                 and sample.labels[len(prompt) - 1:len(prompt)] == [IGNORED]
                 and sample.labels[len(prompt):len(prompt) + 1] not in ([], [IGNORED])]
        if len(found) != 1:
            raise Difference(f"message {place + 1} is trained behind its prompt in {len(found)} of {len(samples)} "
                             f"samples: prompt {decode(prompt)[-200:]!r}, samples "
                             f"{[decode(sample.input_ids)[-300:] for sample in samples]}")
        labels = found[0].labels[len(prompt):]
        said = labels[:labels.index(self.end) + 1] if self.end in labels else labels
        if said != found[0].input_ids[len(prompt):len(prompt) + len(said)]:
            raise Difference(f"message {place + 1}: labels are not the ids: {said}")
        opening = decode(prompt).rpartition("<|im_start|>assistant\n")[2]
        if message.get("tool_calls"):
            whole = decode(self.ids(messages[:place + 1], mode, tools, prompt=False))
            expected = [whole.removeprefix(decode(prompt)).rpartition(END)[0] + END]
        else:
            expected = [unicodedata.normalize("NFC", text) for text in self.answer(message, opening)]
        if decode(said) not in expected:
            raise Difference(f"message {place + 1}: {decode(said)!r} is trained, not {expected[0]!r}")
        self.check_control(message, opening, said)
        return prompt, said

    def check_control(self, message, opening, said):
        """No token of the tokenizer's added ones is there but those that the template writes."""
        written = [self.tokenizer.convert_ids_to_tokens(token) for token in said if token in self.added]
        if self.has_thinking and "</think>" not in opening:
            block = ["</think>"] if "<think>" in opening else ["<think>", "</think>"]
        else:
            block = []
        calls = ["<tool_call>", "</tool_call>"] * len(message.get("tool_calls", []))
        known = self.tokenizer.get_added_vocab()
        expected = [token for token in [*block, *calls, END] if token in known]
        if written != expected:
            raise Difference(f"control tokens {written} in an answer, the template writes {expected}")


def with_thoughts(messages, number):
    """The messages with thinking in front of some answers; which ones, and how it is written, depends on `number`."""
    def think(place, message):
        if message["role"] != "assistant" or (number + place // 2) % 3 == 0:
            return message
        thought = re.split(r"(?<=[.。!?！？\n])", message["content"])[0].strip() or "hm"
        if "think>" in message["content"]:
            return message
        if number % 2:
            return {**message, "reasoning_content": thought}
        return {**message, "content": f"<think>\n{thought}\n</think>\n\n{message['content']}"}

    return [think(place, message) for place, message in enumerate(messages)]


@functools.cache
def load(path, cache_dir):
    """The tokenizer as the programs load it."""
    from mechanisms.qwen1 import convert_if_qwen1
    from mechanisms.tokenizer import load_tokenizer

    return load_tokenizer(convert_if_qwen1(str(path), str(cache_dir)))
