"""A conversation -> samples: the ids of tokens and the label of each, what is trained and what is not."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from mechanisms.data.records import Notices
from mechanisms.data.shapes import BadRecord, Conversation
from mechanisms.data.template import END, HEADER, ChatTemplate
from mechanisms.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100  # the label of a token that is not trained (torch.nn.functional.cross_entropy's ignore_index)


class Sample(NamedTuple):
    """input_ids and labels (lists of int of one length; labels are IGNORED where nothing is trained).

    outcome: "kept", "truncated", or why it is left out ("nothing to learn", "too long").
    """

    input_ids: list[int]
    labels: list[int]
    outcome: str


class Excerpt(NamedTuple):
    """One sample of a conversation, before it is tokenized.

    answers: (start, end, mode) of each answer trained in it: text[:start] is the prompt for it, text[start:end] what
        the model must say. The last one's mode is that of the whole rendering.
    trained: (start, end) of each trained piece of the text: the answers, or more with --loss_on all
    """

    answers: list[tuple[int, int, bool]]
    trained: list[tuple[int, int]]


@dataclasses.dataclass(eq=False)
class ConversationEncoder:
    """Conversation -> list of Samples, by the tokenizer's own chat template.

    Every trained answer stands in the context that inference builds: the ids before it are those of the generation
    prompt for the messages before it, in the mode (thinking or not) that it belongs to, and it is tokenized apart from
    them. Answers whose prompts, with the answer, are beginnings of one another share a sample: with most templates that
    is the whole conversation. Control tokens in the content are encoded as plain text.

    thinking: "auto" (an answer with thinking is trained after the thinking prompt, one without after the other one),
        "on" or "off" (all after the one prompt)
    earlier_answers: those that the prompt of the last one does not show as they were said are trained in samples of
        their "own", or left out ("skip")
    system: the system message of conversations that have none
    keep_added_tokens: see `ChatTemplate`

    Its fields are all that a sample depends on beside the conversation: the token cache's key is made of them.

    Raises UserError if the tokenizer has no ChatML tokens, or its template is broken, renders answers in a way that
    cannot be told from their prompts, or has no such mode.
    """

    tokenizer: "PreTrainedTokenizerFast"
    max_length: int
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    thinking: Literal["auto", "on", "off"] = "auto"
    earlier_answers: Literal["own", "skip"] = "own"
    system: str | None = None
    keep_added_tokens: bool | None = None

    def __post_init__(self):
        self.template = ChatTemplate(self.tokenizer, self.keep_added_tokens)
        self.keep_added_tokens = self.template.keep_added_tokens
        self.ids_of = self.template.ids_of
        for style in self.template.styles.values():
            if self.thinking != "auto" and (self.thinking == "on") not in style.endings:
                raise UserError(f"--thinking {self.thinking}: the chat template of {self.tokenizer.name_or_path} has "
                                f"only {'a thinking' if self.thinking == 'off' else 'no thinking'} prompt")

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", max_length: int, data_args) -> "ConversationEncoder":
        """The encoder that the flags of training ask for; data_args: its DataArguments. Raises UserError."""
        return cls(tokenizer, max_length, data_args.loss_on, data_args.overlong, data_args.thinking,
                   data_args.earlier_answers, data_args.system, data_args.keep_added_tokens)

    def __call__(self, conversation: Conversation, notices: Notices | None = None) -> list[Sample]:
        """Encode one conversation; `notices` counts what was changed in it. Raises BadRecord."""
        excerpts = self.excerpts(conversation, Notices() if notices is None else notices)
        return [self.encode(excerpt, text) for excerpt, text in excerpts]

    def excerpts(self, conversation: Conversation, notices: Notices) -> list[tuple[Excerpt, str]]:
        """The samples of a conversation as (Excerpt, its text); none if nothing of it is trained. Raises BadRecord."""
        messages, tools = self._prepared(conversation, notices)
        said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        wanted = [number for number, trained in zip(said, conversation.trained) if trained]
        if self.loss_on == "last":
            wanted = wanted[-1:] if conversation.trained[-1] else []
        if not wanted:
            return []
        modes = self._modes(messages, tools, wanted)
        excerpts = self._share(self._located(messages, tools, said, wanted, modes, notices))
        if self.earlier_answers == "skip" and len(excerpts) > 1:
            left_out = sum(len(excerpt.answers) for excerpt, _ in excerpts[:-1])
            notices["earlier answer left out (--earlier_answers skip)"] += left_out
            excerpts = excerpts[-1:]
        if self.loss_on == "all":
            excerpt, text = excerpts[-1]
            excerpts[-1] = excerpt._replace(trained=_all_but_other_answers(excerpt, text)), text
        return excerpts

    def pieces(self, excerpt: Excerpt, text: str) -> Iterator[tuple[int, list[int], bool]]:
        """Yield (start, ids, whether they are trained) of each piece of an excerpt's text that is tokenized apart: one
        begins with each answer, and where training begins and ends."""
        trained, until = dict(excerpt.trained), 0
        cuts = {0, len(text), *(start for start, _, _ in excerpt.answers), *itertools.chain(*excerpt.trained)}
        for start, end in itertools.pairwise(sorted(cuts)):
            until = trained.get(start, until)
            yield start, self.ids_of(text[start:end]), start < until

    def encode(self, excerpt: Excerpt, text: str) -> Sample:
        """An excerpt of a conversation -> Sample. Raises BadRecord."""
        ids, labels = [], []
        for _, piece, trained in self.pieces(excerpt, text):
            ids += piece
            labels += piece if trained else [IGNORED] * len(piece)
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

    def with_system(self, messages: list[dict]) -> list[dict]:
        """The messages of a conversation, with the system message of those that have none."""
        if self.system and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.system}, *messages]
        return messages

    def _prepared(self, conversation, notices):
        return self.template.prepare(self.with_system(conversation.messages), conversation.tools, notices)

    def _modes(self, messages, tools, wanted):
        """{message number: mode} of the answers to train."""
        style, modes, wrong = self.template.style(tools), {}, []
        for number in wanted:
            thinks = bool(messages[number].get("reasoning_content"))
            modes[number] = thinks if self.thinking == "auto" else self.thinking == "on"
            if modes[number] not in style.endings:
                modes[number] = not modes[number]  # there is one mode only
            if thinks and not modes[number]:
                wrong.append(("an answer with thinking cannot follow the prompt without (--thinking off)",
                              f"message {number + 1}"))
        if wrong:
            raise BadRecord(wrong)
        return modes

    def _located(self, messages, tools, said, wanted, modes, notices):
        """[(message number, mode, text, start, end)] of the answers to train, as `ChatTemplate.answered` has them."""
        template, last = self.template, wanted[-1]
        text, start, end = template.answered(messages[:last + 1], tools, modes[last], notices)
        located = [(last, modes[last], text, start, end)]
        if len(wanted) == 1:
            return located
        if set(modes.values()) == {modes[last]} and modes[last] in template.style(tools).flat:
            turns = dict(zip(said, template.turns(text, modes[last], tools)))
            found = turns.get(last) == (start, end)  # not if one that is not trained belongs to the other mode
            if found and not any(template.joined(text, turns[number][0]) for number in wanted[:-1]):
                for number in wanted[:-1]:
                    template.check_words(messages[number], text[slice(*turns[number])], modes[number], notices)
                return [(number, modes[number], text, *turns[number]) for number in wanted]
        for number in wanted[-2::-1]:
            text, start, end = template.answered(messages[:number + 1], tools, modes[number], notices)
            located.insert(0, (number, modes[number], text, start, end))
        for number, mode, text, start, _ in located:
            if text[:start] != template.prompt(messages[:number], tools, mode):
                raise BadRecord([("the rendering cannot be walked", f"message {number + 1} does not stand behind the "
                                  "prompt for it in what the chat template makes of them")])
        return located

    def _share(self, located):
        """As few excerpts as there can be: an answer joins the excerpt of a later one whose prompt begins with it."""
        excerpts = []
        for _, mode, text, start, end in reversed(located):
            alone = excerpts and self.template.joined(text, start)  # a longer prompt has its first token otherwise
            for excerpt, longer in () if alone else excerpts:
                if longer.startswith(text[:end]):
                    excerpt.answers.insert(0, (start, end, mode))
                    excerpt.trained.insert(0, (start, end))
                    break
            else:
                excerpts.insert(0, (Excerpt([(start, end, mode)], [(start, end)]), text))
        return excerpts


def _all_but_other_answers(excerpt, text):
    """The pieces of an excerpt's text outside the answers that are not trained in it."""
    own, pieces, place = {end for _, end, _ in excerpt.answers}, [], 0
    header = text.find(HEADER)
    while header >= 0:
        start = header + len(HEADER)
        end = text.index(END, start) + len(END)
        if end not in own:
            pieces.append((place, start - text[start].isspace()))  # a cut must not part a token of the prompt
            place = end
        header = text.find(HEADER, end)
    return [*pieces, (place, len(text))]
