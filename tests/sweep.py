"""Long versions of tests: every label of much data against the oracle, mutated files, every flag, every family.

  REAL_DATA=folder python -m tests.sweep real             # all real datasets x all tokenizers x all modes
  REAL_DATA=folder python -m tests.sweep fuzz --cases 10000
  python -m tests.sweep files --cases 10000               # mutated data files of every kind; needs no REAL_DATA
  python -m tests.sweep flags                             # every flag of TrainingArguments: its effect, or its refusal
  python -m tests.sweep families                          # hybrids and mixtures of experts: all ways of training them
  python -m tests.sweep docs                              # writes what the code says into docs/
"""

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

from mechanisms.quiet import silence

silence()

from mechanisms.data.encoder import ConversationEncoder  # noqa: E402
from mechanisms.data.records import Notices, Problems, read_records  # noqa: E402
from mechanisms.data.shapes import BadRecord, to_conversation  # noqa: E402
from mechanisms.errors import UserError  # noqa: E402
from tests.oracle import Difference, Oracle, load, with_thoughts  # noqa: E402

LONGEST = 1 << 20  # tokens; nothing is cut
THINKING = "auto", "on", "off"


def tokenizer_paths(real_data):
    """{name: path} of all real tokenizers, Qwen-1's among them."""
    folders = sorted(path for path in (real_data / "tokenizers").iterdir() if (path / "vocab.json").exists())
    return {**{path.name: path for path in folders}, "qwen1": real_data / "checkpoints/Qwen-tiny-Chat"}


def dataset_paths(real_data):
    return sorted(path for path in (real_data / "datasets").rglob("*.json*"))


def conversations(path, every=1, longest=None):
    """Each `every`-th usable record of a file, as it is and with thinking: (record number, with thinking?, record)."""
    for place, record in read_records(str(path), Problems()):
        if place.number % every:
            continue
        try:
            conversation = to_conversation(record, Notices())
        except BadRecord:
            continue
        if longest and len(conversation.messages) > longest:
            continue
        yield place.number, False, conversation
        messages = with_thoughts(conversation.messages, place.number)
        if messages != conversation.messages:
            yield place.number, True, to_conversation({"messages": messages, "tools": conversation.tools}, Notices())


def compare(encoder, oracle, conversation):
    """Answers compared. Raises Difference, also where the encoder refuses what it should not, or the reverse."""
    refused = oracle.refused(conversation.messages, conversation.trained)
    try:
        samples = encoder(conversation)
    except BadRecord as bad:
        thinks = any(message.get("reasoning_content") for message in conversation.messages)
        if refused or thinks and not oracle.has_thinking:
            return 0
        raise Difference(f"refused: {bad.args[0]}") from bad
    if refused:
        raise Difference("not refused")
    return oracle.compare(conversation.messages, conversation.tools, conversation.trained, samples)


def sweep(tokenizer, files, thinking, every=1, longest=None):
    """-> (answers compared, [difference with its place])."""
    oracle = Oracle(tokenizer, thinking)
    try:
        encoder = ConversationEncoder(tokenizer, LONGEST, thinking=thinking)
    except UserError:
        return 0, ["refused"] if oracle.possible() else []
    answers, differences = 0, []
    for path in files:
        for number, with_thinking, conversation in conversations(path, every, longest):
            try:
                answers += compare(encoder, oracle, conversation)
            except Difference as difference:
                differences.append(f"{path.name}, record {number}{', with thinking' * with_thinking}: {difference}")
    return answers, differences


def sweep_flags():
    """Prints a line for each flag. Returns how many of them do not what they should."""
    from examples.make_tiny_model import example_texts, make_tiny_model
    from tests.flag_cases import Runner
    from tests.flag_cases import sweep as each_flag

    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "tiny", example_texts(), num_layers=2, hidden_size=64)
        for name, words, right, result in each_flag(Runner(model, Path(folder), Path(folder) / "cache")):
            wrong += not right
            print(f"{'ok   ' if right else 'WRONG'} {name:42} {words:70} {result}", flush=True)
    print(f"{wrong} wrong")
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["real", "fuzz", "files", "flags", "families", "docs"])
    parser.add_argument("--cases", type=int, default=10_000, help="of the fuzz, for each tokenizer together (10000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.what == "files":
        from tests.fuzz_files import fuzz_files

        with tempfile.TemporaryDirectory() as folder:
            counts = fuzz_files(args.cases, random.Random(args.seed), Path(folder))
        print(*(f"{count:>9,} {what}" for what, count in sorted(counts.items())), sep="\n")
        return
    if args.what == "docs":
        from tests.pages import DOCS, PAGES

        for name, page in PAGES.items():
            (DOCS / name).write_text(page(), encoding="utf-8")
        return
    if args.what == "families":
        import pytest

        raise SystemExit(pytest.main(["-m", "", "tests/runs/test_hybrids.py", "tests/ranks/test_families.py"]))
    if args.what == "flags":
        raise SystemExit(bool(sweep_flags()))
    real_data, total, wrong, began = Path(os.environ["REAL_DATA"]), 0, 0, time.time()
    with tempfile.TemporaryDirectory() as cache:
        for name, path in tokenizer_paths(real_data).items():
            if args.what == "fuzz":
                break
            for thinking in THINKING:
                answers, differences = sweep(load(path, cache), dataset_paths(real_data), thinking)
                total, wrong = total + answers, wrong + len(differences)
                print(f"{name:22} --thinking {thinking:5} {answers:>8,} answers, {len(differences)} differences",
                      flush=True)
                print(*differences[:3], sep="\n", end="\n" * bool(differences), flush=True)
        if args.what == "fuzz":
            from tests.fuzz import fuzz

            total, wrong = fuzz({name: load(path, cache) for name, path in tokenizer_paths(real_data).items()},
                                args.cases, args.seed)
    print(json.dumps({"answers": total, "differences": wrong, "seconds": round(time.time() - began)}))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
