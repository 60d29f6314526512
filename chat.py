"""Talk to a model or an adapter, with the chat template that it was trained with.

  python chat.py output_qwen                                          # a conversation; /help lists its commands
  python chat.py output_qwen --message "Who are you?"                 # one answer, alone on stdout
  python chat.py output_qwen --do_sample False < question.txt         # the same, the message from stdin

The folder may hold a whole model (fine-tuned, merged or quantized) or an adapter of any kind. An adapter is put on the
base model it names, or on --base_model; one trained on 4-bit weights (Q-LoRA, NF4) on the 16-bit model they came from.
"""

import sys
from dataclasses import dataclass, field
from typing import Literal

from mechanisms.errors import UserError, user_errors_end_the_program
from mechanisms.flags import parse_into, prepare_command_line
from mechanisms.paths import find_base
from mechanisms.quiet import silence


@dataclass
class ChatArguments:
    system: str = field(default=None, metadata={"help": "System message (default: the chat template's own, if any)."})
    message: str = field(default=None, metadata={"help": "Answer this and end. Without it, and with a terminal: chat."})
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
import re

import torch
from transformers import TextStreamer
from transformers.utils import logging

from mechanisms.data.records import Notices
from mechanisms.data.shapes import BadRecord
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
        self.show_thinking(thinking[len(said[0]):] + ("\n" if thinking and words and not said[1] else ""))
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
            dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
            print(f"{dim}{text}{plain}", end="", file=sys.stderr, flush=True)


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
        """The conversation with this message as the model gets it. Control tokens typed by the user are plain text."""
        try:
            messages, _ = self.template.prepare([*self.messages, {"role": "user", "content": text}], None, Notices())
            ids = self.template.ids_of(self.template.prompt(messages, None, self.mode))
        except BadRecord as bad:
            raise UserError("; ".join(": ".join(reason) for reason in bad.args[0])) from bad
        ids = torch.tensor([ids], device=self.model.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def ask(self, text):
        """Print the answer to `text`. Ctrl-C is passed on, after what was said until then is remembered.

        Raises UserError when the model has no room for more.
        """
        prompt = self.prompt(text)
        length, limit = prompt["input_ids"].shape[1], self.model.config.max_position_embeddings
        if length >= limit:
            raise UserError(f"the conversation has {length} tokens and the model holds {limit}: it must be shorter")
        longest = min(self.longest, limit - length)
        answer = AnswerStreamer(self.tokenizer, self.opened)
        try:
            ids = self.model.generate(**prompt, max_new_tokens=longest, streamer=answer)[0, length:]
            if len(ids) == longest and ids[-1] not in self.model.generation_config.eos_token_id:
                print(f"(cut after {longest} tokens: see --max_new_tokens)", file=sys.stderr)
        except KeyboardInterrupt:
            answer.end()
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(f"out of memory after {length} tokens: the conversation must be shorter") from error
        finally:
            if answer.said:
                thinking = {"reasoning_content": answer.thinking} if answer.thinking and self.keeps_thinking else {}
                self.messages += [{"role": "user", "content": text},
                                  {"role": "assistant", "content": answer.words, **thinking}]


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


def main(argv):
    with user_errors_end_the_program():
        path, args, sampling = parse_arguments(argv)
        interactive = args.message is None and sys.stdin.isatty()
        message = args.message
        if not interactive and message is None:
            message = sys.stdin.buffer.read().decode("utf-8", "replace").strip()
        if not interactive and not message.strip():
            raise UserError("an empty message: nothing to answer")
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        gpu = not runs_on_cpu("set CUDA_VISIBLE_DEVICES= ")
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
            model, tokenizer = load_to_answer(path, args.base_model, args.dtype or ("auto" if gpu else "float32"),
                                    "auto" if gpu else None)
        session = ChatSession(model, tokenizer, sampling, args.system, args.thinking and args.thinking == "on")
        if interactive:
            print(f"{path} is listening. /help lists the commands, Ctrl-D ends.")
            converse(session)
        else:
            session.ask(message)


if __name__ == "__main__":
    main(COMMAND_LINE)
