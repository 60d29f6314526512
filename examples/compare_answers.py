"""Ask a model before and after fine-tuning every question it was trained on, and show its answers side by side.

    python examples/compare_answers.py --untrained demo_output/tiny-chat --finetuned demo_output/lumi-chat \\
        --adapter demo_output/haru-lora --data_path examples/data --persona_path examples/persona.jsonl

Every assistant turn of the data is asked for, after the turns, system message and tools that come before it in its
conversation, and answered greedily. Fails (exit code 1) unless nearly all answers are the trained ones word for word:
the fine-tuned model's those of the data, the adapter's those of the persona wherever the persona has the question.
"""

import argparse
import collections
import json
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python looks for modules in the script's folder only

from mechanisms.quiet import silence

if __name__ == "__main__":  # before torch: some of it is read when that is imported
    silence()

# isort: split
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer
from transformers.utils import logging

from mechanisms.data.datasets import read_files, to_conversations
from mechanisms.data.records import Problems, find_files
from mechanisms.errors import UserError, user_errors_end_the_program
from mechanisms.loading import load_to_answer

NEEDED = 0.9  # share of word-for-word answers that counts as learned


class Turn(NamedTuple):
    """One assistant turn: what comes before it (list of messages), the tools (list or None), and the message itself."""

    before: list
    tools: list | None
    answer: dict

    def key(self):
        """Equal for turns that the model is asked for with the same prompt."""
        return json.dumps([self.before, self.tools], ensure_ascii=False, sort_keys=True)


def read_turns(path):
    """Every assistant turn of every conversation in `path` (a file or a folder). Raises UserError for unusable data."""
    problems = Problems()
    files = find_files([path], problems)
    turns = [
        Turn(conversation.messages[:index], conversation.tools, message)
        for _, conversation in to_conversations(read_files(files, problems), problems, collections.Counter())
        for index, message in enumerate(conversation.messages) if message["role"] == "assistant"
    ]
    problems.stop_or_skip(0)
    return turns


def trained_text(tokenizer, turn):
    """(prompt, answer): the text a model gets for this turn, and the text it was trained to say then.

    Raises UserError for a chat template that renders a turn differently once others follow, as Qwen3's does.
    """
    prompt = tokenizer.apply_chat_template(turn.before, tools=turn.tools, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*turn.before, turn.answer], tools=turn.tools, tokenize=False)
    if not whole.startswith(prompt):
        raise UserError(f"the chat template of {tokenizer.name_or_path} changes earlier turns: cannot compare answers")
    return prompt, whole.removeprefix(prompt).removesuffix("<|im_end|>\n")


@torch.inference_mode()
def ask(folder, turns):
    """The greedy answers (list of str) of the checkpoint or adapter in `folder`, all in one batch."""
    model, tokenizer = load_to_answer(folder)
    tokenizer.padding_side = "left"
    texts = [trained_text(tokenizer, turn) for turn in turns]
    batch = tokenizer([prompt for prompt, _ in texts], padding=True, return_tensors="pt")
    # A few tokens more than the longest answer has: a model that does not stop in time gives a wrong answer.
    longest = max(len(ids) for ids in tokenizer([answer for _, answer in texts])["input_ids"])
    output = model.generate(**batch, do_sample=False, max_new_tokens=longest + 8)
    return tokenizer.batch_decode(output[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)


def matches(said, expected):
    """How many answers are the expected ones word for word."""
    return sum(answer == right for answer, right in zip(said, expected, strict=True))


def stop_unless_learned(name, said, expected):
    """End the program with exit code 1, showing what went wrong, unless nearly all answers are the expected ones."""
    right = matches(said, expected)
    if right < NEEDED * len(expected):
        wrong = [f"  expected: {one_line(should)}\n  said:     {one_line(answer)}"
                 for answer, should in zip(said, expected, strict=True) if answer != should]
        sys.exit(f"failed: '{name}' gave {right} of {len(expected)} answers word for word, {NEEDED:.0%} are needed:\n"
                 + "\n".join(wrong))


def show_answers(console, title, turns, answers, rows):
    """Print a table of the turns with these indices: the question, then the answer of each model."""
    table = Table("Question", *answers, title=title, title_justify="left", show_lines=True)
    for index in rows:
        cells = [one_line(turns[index].before[-1]["content"])]
        cells += [one_line(said[index], 40 if name == "Untrained" else 160) for name, said in answers.items()]
        table.add_row(*(Text(cell, overflow="fold") for cell in cells))
    console.print(table)


def one_line(text, limit=160):
    """The text without line breaks and unprintable characters (an untrained model says many), cut at `limit`."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= limit else text[:limit - 3] + "..."


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--untrained", required=True, help="checkpoint before any training")
    parser.add_argument("--finetuned", required=True, help="checkpoint trained on --data_path")
    parser.add_argument("--adapter", required=True, help="LoRA adapter trained on --persona_path on top of --finetuned")
    parser.add_argument("--data_path", required=True, help="file or folder")
    parser.add_argument("--persona_path", required=True, help="other answers to some of the questions of --data_path")
    args = parser.parse_args()
    logging.disable_progress_bar()

    turns = read_turns(args.data_path)
    persona = {turn.key(): turn.answer["content"] for turn in read_turns(args.persona_path)}
    shared = len(persona)
    if not persona.keys() <= {turn.key() for turn in turns}:
        raise UserError(f"{args.persona_path} has questions that {args.data_path} has not")
    place = {key: number for number, key in enumerate(persona)}
    turns.sort(key=lambda turn: place.get(turn.key(), shared))  # the persona's questions first, in its order

    answers = {
        "Untrained": ask(args.untrained, turns),
        "Fine-tuned": ask(args.finetuned, turns),
        "Then LoRA": ask(args.adapter, turns),
    }
    console = Console()
    show_answers(console, "Questions that both data sets answer", turns, answers, range(shared))
    show_answers(console, "Some of the other questions", turns, answers, range(shared, len(turns), 6))

    tokenizer = AutoTokenizer.from_pretrained(args.finetuned)
    data_answers = [trained_text(tokenizer, turn)[1] for turn in turns]
    persona_answers = [persona[turn.key()] for turn in turns[:shared]]
    counts = Table("", "of the persona", "of the data,\nsame questions", "of the data,\nall others",
                   title="Answers given word for word", title_justify="left")
    for name, said in answers.items():
        counts.add_row(name, f"{matches(said[:shared], persona_answers)} of {shared}",
                       f"{matches(said[:shared], data_answers[:shared])} of {shared}",
                       f"{matches(said[shared:], data_answers[shared:])} of {len(turns) - shared}")
    console.print(counts)
    stop_unless_learned("Fine-tuned", answers["Fine-tuned"], data_answers)
    stop_unless_learned("Then LoRA", answers["Then LoRA"][:shared], persona_answers)


if __name__ == "__main__":
    with user_errors_end_the_program():
        main()
