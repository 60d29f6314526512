"""What the model answers to a few questions while it is trained, greedily, by the forward pass that it is trained with.

`generate` would need a cache, another attention and other settings of the model, and under ZeRO-3 ranks that agree on
when to stop. Here every rank computes every step alike, with what the first rank has chosen: nothing of the training
changes, no random number is drawn, and no rank waits for one that has stopped.
"""

import json
import time
from typing import NamedTuple

import numpy as np
import torch

from mechanisms import strategies
from mechanisms.console import say
from mechanisms.data.encoder import IGNORED
from mechanisms.data.records import Notices
from mechanisms.data.shapes import BadRecord
from mechanisms.data.template import END, HEADER, ChatTemplate
from mechanisms.errors import UserError

HELD_OUT = 3  # questions that are taken of the held-out data
LONGEST_PROMPT = 1024  # tokens of those
MOST_LOOKED_AT = 100  # samples, to find them
LONGEST = 128  # tokens of an answer
SECONDS = 30  # for one round of answers


class Question(NamedTuple):
    text: str
    prompt: list[int]  # input_ids that the answer follows
    wanted: str | None = None


def questions(training_args, tokenizer, dataset, system):
    """-> list of Question: those of --sample_prompts, or where that is not given those of the evaluation data, if any.

    Raises UserError.
    """
    file = training_args.sample_prompts
    if file:
        return [] if file.lower() == "none" else read_questions(file, tokenizer, system)
    if dataset and strategies.is_sharded(training_args):
        say(f"note: no sample answers in the report: under {strategies.strategy_name(training_args)} each of their "
            "tokens gathers all weights once. --sample_prompts FILE asks for them all the same")
        return []
    return held_out_questions(dataset, tokenizer) if dataset else []


def read_questions(path, tokenizer, system=None):
    """--sample_prompts FILE -> list of Question: one of each line that is not empty.

    A line that begins with { is JSON, {"messages": [...]}; any other is what the user says. Raises UserError with all
    lines that are of no use.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--sample_prompts {path}: cannot be read: {reason}") from error
    if not lines:
        raise UserError(f"--sample_prompts {path}: it is empty. Write one question on each line")
    template, questions, problems = ChatTemplate(tokenizer), [], []
    for number, line in lines:
        try:
            messages = _messages(line)
            if system and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": system}, *messages]
            prepared, _ = template.prepare(messages, None, Notices())
            prompt = template.ids_of(template.prompt(prepared, None, template.style(None).default))
            questions.append(Question(messages[-1]["content"], prompt))
        except BadRecord as bad:
            reasons = "; ".join(": ".join(reason) for reason in bad.args[0])
            problems.append(f"--sample_prompts {path}:{number}: {reasons}")
    if problems:
        raise UserError("\n       ".join(problems))
    return questions


def _messages(line):
    if not line.startswith("{"):
        return [{"role": "user", "content": line}]
    try:
        messages = json.loads(line)["messages"]
        messages = [{"role": message["role"], "content": message["content"]} for message in messages]
        if not messages or not all(isinstance(value, str) for message in messages for value in message.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise BadRecord([("not a question", 'text, or JSON such as {"messages": [{"role": "user", "content": "..."}]}')]
                        ) from error
    if messages[-1]["role"] != "user":
        raise BadRecord([("not a question", "its last message must be the user's")])
    return messages


def held_out_questions(dataset, tokenizer):
    """Up to HELD_OUT different Questions of a dataset: the last answers of its samples are wanted."""
    found = {}
    for number in range(min(len(dataset), MOST_LOOKED_AT)):
        sample = dataset[number]
        ids, trained = sample["input_ids"].tolist(), sample["labels"] != IGNORED
        start, end = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]])))[-2:]
        text = tokenizer.decode(ids[:start])
        if HEADER in text and start <= LONGEST_PROMPT:  # with --loss_on all, the prompt is trained as well
            question = text.rpartition("<|im_start|>user\n")[2].partition(END)[0]
            found.setdefault(question, Question(question, ids[:start], tokenizer.decode(ids[start:end],
                                                                                        skip_special_tokens=True)))
        if len(found) == HELD_OUT:
            break
    return list(found.values())


def answers(trainer, questions):
    """The greedy answers of the model that `trainer` trains, as [{"question", "answer", "cut", "wanted"}].

    All ranks must call it. It is what the model says in evaluation: without dropout.
    """
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled else trainer.model
    rows = [list(question.prompt) for question in questions]
    going, ends = list(range(len(rows))), set(trainer.model.generation_config.eos_token_id)
    was_training, deadline = model.training, time.monotonic() + SECONDS
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        for _ in range(LONGEST):
            chosen = model(**_row([rows[number] for number in going], trainer.args.device)).logits[0].argmax(-1)
            if time.monotonic() > deadline:
                chosen.fill_(-1)
            if trainer.args.world_size > 1:
                torch.distributed.broadcast(chosen, 0)
            for number, token in zip(going, chosen.tolist()):
                rows[number].append(token)
            going = [number for number in going if rows[number][-1] not in ends | {-1}]
            if not going:
                break
    model.train(was_training)
    said = [row[len(question.prompt):] for row, question in zip(rows, questions)]
    decode = trainer.processing_class.decode
    return [{"question": question.text, "cut": tokens[-1] not in ends, "wanted": question.wanted,
             "answer": decode([token for token in tokens if token >= 0], skip_special_tokens=True)}
            for question, tokens in zip(questions, said)]


def _row(rows, device):
    """The batch that `finetune.PaddingFreeCollator` would make of these ids, for the token after each."""
    lengths = [len(row) for row in rows]
    bounds = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
    positions = np.concatenate([np.arange(length) for length in lengths])
    return {"input_ids": torch.tensor([sum(rows, [])], device=device),
            "position_ids": torch.tensor(positions, device=device)[None],
            "logits_to_keep": bounds[1:].long() - 1, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths), "max_length_k": max(lengths), "use_cache": False}
