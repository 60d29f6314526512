"""Talk to a model or an adapter, with the chat template that it was trained with.

  python chat.py output_qwen                                          # a conversation; /help lists its commands
  python chat.py output_qwen --message "Who are you?"                 # one answer, alone on stdout
  python chat.py output_qwen --do_sample False < question.txt         # the same, the message from stdin
  python chat.py output_qwen --data held_out.jsonl                    # its questions, the wanted answers, the model's

The folder may hold a whole model (fine-tuned, merged or quantized) or an adapter of any kind. An adapter is put on the
base model it names, or on --base_model; one trained on 4-bit weights (Q-LoRA, NF4) on the 16-bit model they came from.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from mechanisms.data.shapes import BadRecord, parse_columns, to_conversation
from mechanisms.errors import UserError, user_errors_end_the_program
from mechanisms.flags import parse_into, prepare_command_line
from mechanisms.paths import find_base
from mechanisms.quiet import silence


@dataclass
class ChatArguments:
    system: str = field(default=None, metadata={"help": "System message (default: the chat template's own, if any)."})
    message: str = field(default=None, metadata={"help": "Answer this and end. Without it, and with a terminal: chat."})
    data: list[str] = field(default=None, metadata={
        "help": "Ask the questions of these files, and show the answers that are wanted beside the model's. Each comes "
                "after the turns before it as the record has them. On a terminal, Enter goes on.",
        "metavar": "PATH", "exists": "data"})
    columns: list[str] = field(default=None, metadata={
        "help": "Which column of --data is what, as --columns of finetune.py.", "metavar": "KEY=COLUMN"})
    base_model: str = field(default=None, metadata={
        "help": "For an adapter: where its base model is now.", "exists": "model"})
    thinking: Literal["on", "off"] = field(default=None, metadata={
        "help": "Whether the model is to think before it answers (default: the chat template's)."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default=None, metadata={
        "help": "Precision of the weights (default: on a GPU auto, the model's own; on a CPU float32)."})


@dataclass
class SamplingArguments:
    do_sample: bool | None = field(default=None, metadata={
        "help": "Draw each word at random by its probability; False: always the likeliest one.", "nargs": "?",
        "const": True})
    temperature: float = field(default=None, metadata={"help": "Below 1 likely words get likelier, above 1 rarer."})
    top_p: float = field(default=None, metadata={"help": "Draw from the likeliest words with this total probability."})
    top_k: int = field(default=None, metadata={"help": "Draw from this many likeliest words."})
    repetition_penalty: float = field(default=None, metadata={"help": "Above 1: words said before get less likely."})
    max_new_tokens: int = field(default=None, metadata={"help": "Longest answer in tokens."})


def parse_arguments(argv):
    """argv -> (path, chat arguments, {sampling flag: value} of the given ones).

    Raises UserError with everything that is wrong with them, a folder that is not there included.
    """
    chat_args, sampling_args, words = parse_into((ChatArguments, SamplingArguments), argv)
    given = {name: value for name, value in vars(sampling_args).items() if value is not None}
    problems = [] if len(words) == 1 else [f"one model or adapter to talk to, not {len(words)} {words or ''}".rstrip()]
    for name, good, allowed in (
            ("temperature", lambda value: value > 0, "above 0 (--do_sample False takes the likeliest word)"),
            ("top_p", lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("top_k", lambda value: value >= 0, "0 (all words) or more"),
            ("repetition_penalty", lambda value: value > 0, "above 0"),
            ("max_new_tokens", lambda value: value > 0, "1 or more")):
        if name in given and not good(given[name]):
            problems.append(f"--{name} {given[name]}: {allowed}")
    if chat_args.message is not None and chat_args.data:
        problems.append("--message and --data exclude each other: give one")
    if chat_args.columns and not chat_args.data:
        problems.append("--columns has no effect without --data")
    if chat_args.columns:
        chat_args.columns, wrong = parse_columns(chat_args.columns)
        problems += wrong
    drawing = [f"--{name}" for name in ("temperature", "top_p", "top_k") if name in given]
    if drawing and given.setdefault("do_sample", True) is False:
        problems.append(f"{' '.join(drawing)}: no effect with --do_sample False")
    if problems:
        raise UserError("\n       ".join(problems))
    find_base(words[0], chat_args.base_model)
    return words[0], chat_args, given


if __name__ == "__main__":  # wrong flags and folders are worth knowing before torch is imported
    with user_errors_end_the_program():
        silence()
        COMMAND_LINE = prepare_command_line(__file__, sys.argv[1:])
        parse_arguments(COMMAND_LINE)

import contextlib
import json
import os
import re

import torch
from transformers import TextStreamer
from transformers.utils import logging

from mechanisms.console import visible
from mechanisms.data.datasets import read_files
from mechanisms.data.records import Notices, Problems, find_files
from mechanisms.data.template import CLOSE, OPEN, ChatTemplate
from mechanisms.device import runs_on_cpu
from mechanisms.loading import load_to_answer

MAX_NEW_TOKENS = 2048  # where neither a flag nor the generation config sets a limit
HELP = '''\
  /reset         forget the conversation
  /system TEXT   start over with this system message (without TEXT: the template's own)
  /exit          end, as Ctrl-D does
  Ctrl-C         stop the answer
  """            begin and end a message of several lines; pasted text needs none'''


BOLD, DIM = "\033[1m", "\033[2m"


def styled(text, style, file):
    """Text in a style, where it is shown on a terminal that is to have styles."""
    return f"{style}{text}\033[0m" if file.isatty() and not os.environ.get("NO_COLOR") else text


class AnswerStreamer(TextStreamer):
    """Prints an answer while it is made: its words on stdout, what the model thinks before them on stderr.

    thinks: whether the prompt has opened a thinking block. `thinking` and `words` are what was printed.
    """

    def __init__(self, tokenizer, thinks):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said, self.thinks, self.thinking, self.words = "", thinks, "", ""

    def on_finalized_text(self, text, stream_end=False):
        self.said += text
        thinking, words = self.split(stream_end)
        said, self.thinking, self.words = (self.thinking, self.words), thinking, words
        labels = sys.stderr.isatty()  # what is piped is the thinking alone
        begins, ends = thinking and not said[0], thinking and words and not said[1]
        self.show_thinking("thinking:\n" * bool(labels and begins) + thinking[len(said[0]):]
                           + ("\nanswer:\n" if labels and ends else "\n" if ends else ""))
        print(words[len(said[1]):], end="\n" if stream_end else "", flush=True)

    def split(self, ended):
        """(thinking, words) of what was said so far, without what may still become a tag."""
        said = self.said if self.thinks else self.said.lstrip()
        if not self.thinks and not ended and OPEN.startswith(said):
            return "", ""
        if not self.thinks and not said.startswith(OPEN):
            return "", self.said
        thinking, closed, words = said.removeprefix("" if self.thinks else OPEN).partition(CLOSE)
        if not closed and not ended:
            thinking = thinking[:len(thinking) - max(n for n in range(len(CLOSE)) if thinking.endswith(CLOSE[:n]))]
        return thinking.strip("\n"), words.lstrip("\n")

    def show_thinking(self, text):
        if text:
            print(styled(text, DIM, sys.stderr), end="", file=sys.stderr, flush=True)


class ChatSession:
    """What was said so far; `ask` prints the next answer and remembers it.

    thinking: whether the model is to think, or None for the chat template's default.
    """

    def __init__(self, model, tokenizer, sampling, system=None, thinking=None):
        self.model, self.tokenizer, self.template = model, tokenizer, ChatTemplate(tokenizer)
        style = self.template.style(None)
        self.mode = style.default if thinking is None else thinking
        if self.mode not in style.endings:
            raise UserError(f"--thinking {'on' if thinking else 'off'}: the model's chat template has only "
                            f"{'no thinking' if thinking else 'a thinking'} prompt")
        self.opened = style.endings[self.mode].strip() == OPEN
        self.keeps_thinking = "reasoning_content" in style.parts
        settings = model.generation_config
        settings.update(use_cache=True, **sampling)  # off in the configs of bases that were trained elsewhere
        if not settings.do_sample:
            settings.update(temperature=None, top_p=None, top_k=None)  # transformers warns of what has no effect
        self.longest = settings.max_new_tokens or MAX_NEW_TOKENS
        self.start(system)

    def start(self, system):
        """Forget everything; `system`: the system message, or None for what the template does without one."""
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def prompt(self, text):
        """The conversation with this message as the model gets it."""
        return self.prompt_for([*self.messages, {"role": "user", "content": text}])

    def prompt_for(self, messages, tools=None):
        """Messages as the model gets them. Control tokens in them are plain text."""
        try:
            messages, tools = self.template.prepare(messages, tools, Notices())
            ids = self.template.ids_of(self.template.prompt(messages, tools, self.mode))
        except BadRecord as bad:
            raise UserError("; ".join(": ".join(reason) for reason in bad.args[0])) from bad
        ids = torch.tensor([ids], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def ask(self, text):
        """Print the answer to `text`. Ctrl-C is passed on, after what was said until then is remembered.

        Raises UserError when the model has no room for more.
        """
        prompt, answer = self.prompt(text), AnswerStreamer(self.tokenizer, self.opened)
        try:
            self.answer(prompt, answer)
        finally:
            if answer.said:
                thinking = {"reasoning_content": answer.thinking} if answer.thinking and self.keeps_thinking else {}
                self.messages += [{"role": "user", "content": text},
                                  {"role": "assistant", "content": answer.words, **thinking}]

    def answer(self, prompt, answer):
        """Print the answer to a prompt by `answer`, an AnswerStreamer. Raises UserError."""
        length, limit = prompt["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length >= limit:
            raise UserError(f"the conversation has {length} tokens and the model holds {limit}: it must be shorter")
        longest = min(self.longest, limit - length)
        try:
            ids = self.model.generate(**prompt, max_new_tokens=longest, streamer=answer)[0, length:]
            if len(ids) == longest and ids[-1] not in self.model.generation_config.eos_token_id:
                print(f"(cut after {longest} tokens: see --max_new_tokens)", file=sys.stderr)
        except KeyboardInterrupt:
            answer.end()
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory after {length} tokens: the conversation must be shorter") from error


def read_message():
    '''One message from the terminal; several lines between """ or pasted. Raises EOFError at Ctrl-D.'''
    text = input("> ")
    if text.startswith('"""'):
        text = text[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + input("... ")
        text = text.rstrip()[:-3]
    return text


def converse(session):
    """Read messages and commands from the terminal until /exit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing, history, and pasted text as one message)
    while True:
        try:
            text = read_message().strip()
            command, _, rest = text.partition(" ")  # a command that begins a pasted text is none
            if command == "/exit":
                return
            elif command == "/help":
                print(HELP)
            elif command == "/reset":
                session.start(session.system)
            elif command == "/system":
                session.start(rest.strip() or None)
            elif re.fullmatch(r"/[a-z]+", command):
                print(f"no such command: {command} (/help lists them)")
            elif text:
                with contextlib.suppress(KeyboardInterrupt):  # ends the answer only
                    session.ask(text)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends the chat)")
        except UserError as error:
            print(f"{error} (/reset starts over)")


def questions_of(paths, columns, system):
    """[(place, messages before an answer, tools, the answer)] of all answers of data files that are to be trained.

    Raises UserError with all records that cannot be used.
    """
    problems, found = Problems(), []
    files = find_files(paths, problems)
    for path, share in files.items():
        if share != 1:
            problems.fatal.append(f"--data {path}:{share:g}: files are taken whole here")
    for place, record in read_files(files, problems):
        try:
            conversation = to_conversation(record, Notices(), columns)
        except BadRecord as bad:
            problems.add(place, bad.args[0], record)
            continue
        messages, trained = conversation.messages, iter(conversation.trained)
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        found += [(place, messages[:number], conversation.tools, message) for number, message in enumerate(messages)
                  if message["role"] == "assistant" and next(trained)]
    problems.stop_or_skip(0)
    return found


def walk(session, questions, wait):
    """Show each question of `questions_of` with the answer that is wanted and the model's; wait: for Enter in between.
    """
    same = asked = 0
    for number, (place, messages, tools, wanted) in enumerate(questions, 1):
        print(styled(f"{number} of {len(questions)} - {place.path}:{place.line}", BOLD, sys.stdout))
        [shown] = session.template.structured([wanted], tools, Notices())
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in shown.get("tool_calls", [])]
        for label, *parts in ((messages[-1]["role"] + ":", messages[-1]["content"]),
                              ("wanted, thinking:", shown.get("reasoning_content") or ""),
                              ("wanted:", shown["content"], *calls)):
            if text := "\n".join(filter(None, parts)):
                print(f"{styled(label, DIM, sys.stdout)}\n{visible(text)}")
        print(styled("answered:", DIM, sys.stdout), flush=True)
        answer = AnswerStreamer(session.tokenizer, session.opened)
        try:
            session.answer(session.prompt_for(messages, tools), answer)
        except UserError as error:
            print(f"(no answer: {error})")
        except KeyboardInterrupt:  # ends the answer only
            answer.end()
            if not wait:
                raise
        asked += 1
        same += not calls and answer.words.strip() == shown["content"].strip()
        print()
        if wait and number < len(questions):
            try:
                if input("(Enter: the next one, q: end) ").strip().lower() == "q":
                    break
            except (EOFError, KeyboardInterrupt):
                print()
                break
    print(f"{same} of {asked} answers are the wanted ones, word for word")


def main(argv):
    with user_errors_end_the_program():
        path, args, sampling = parse_arguments(argv)
        questions = questions_of(args.data, args.columns, args.system) if args.data else None
        interactive = args.message is None and sys.stdin.isatty()
        message = args.message
        if questions is None and not interactive and message is None:
            message = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
        if questions is None and not interactive and not message.strip():
            raise UserError("an empty message: nothing to answer")
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        gpu = not runs_on_cpu("set CUDA_VISIBLE_DEVICES= ")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            model, tokenizer = load_to_answer(path, args.base_model, args.dtype or ("auto" if gpu else "float32"),
                                    "auto" if gpu else None)
        session = ChatSession(model, tokenizer, sampling, args.system, args.thinking and args.thinking == "on")
        if questions is not None:
            walk(session, questions, interactive and sys.stdout.isatty())
        elif interactive:
            print(f"{path} is listening. /help lists the commands, Ctrl-D ends.")
            converse(session)
        else:
            session.ask(message)


if __name__ == "__main__":
    main(COMMAND_LINE)
