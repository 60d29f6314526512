"""How fast records become tokens, how much memory that takes, and how soon a second run starts.

  python bench/tokenization.py                           # REAL_DATA=folder of the real tokenizers and data
  python bench/tokenization.py --synthetic 1000000       # peak memory and second start with so many records

finetune.py goes from files to its token cache, labels and report included. It is compared with a loop that parses the
same records and calls `apply_chat_template` on each, in the same process, in turn.
"""

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALPACA = ("datasets/alpaca/alpaca_en_demo.json", "datasets/alpaca/alpaca_zh_demo.json",
          "datasets/alpaca/huanhuan.json", "datasets/alpaca/identity.json")


def start(files, tokenizer_path, cache_dir):
    """What finetune.py does before it loads the model -> (samples, seconds, peak bytes of this process)."""
    import worker  # (first: it makes the project's modules importable)

    # isort: split
    import finetune
    from mechanisms.flags import prepare_command_line

    _, data_args, training_args, _ = finetune.parse_arguments(prepare_command_line(finetune.__file__, [
        "--data_path", *files, "--cache_dir", cache_dir, "--output_dir", cache_dir, "--model_max_length", "512"]))
    began = time.time()
    tokenizer = finetune.load_tokenizer(tokenizer_path)
    with contextlib.redirect_stdout(io.StringIO()):
        dataset, _ = finetune.prepare_datasets(data_args, training_args, tokenizer)
    return len(dataset), time.time() - began, worker.peak_bytes("cpu")


def loop(files, tokenizer_path):
    """The same records by `apply_chat_template`, one by one -> (samples, seconds)."""
    from transformers import AutoTokenizer

    began, count = time.time(), 0
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    for path in files:
        for record in json.loads(Path(path).read_text()):
            user = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
            tokenizer.apply_chat_template([{"role": "user", "content": user},
                                           {"role": "assistant", "content": record["output"]}], return_dict=False)
            count += 1
    return count, time.time() - began


def write_synthetic(path, records):
    """Conversations of words in random order, of the length of Alpaca's."""
    draw = random.Random(0)
    words = "the of and to in is you that it he was for on are with as his they be at one have this from".split()
    with open(path, "w", encoding="utf-8") as file:
        for number in range(records):
            question, answer = (" ".join(draw.choices(words, k=draw.randint(5, most))) for most in (40, 160))
            file.write(json.dumps({"messages": [{"role": "user", "content": f"{number} {question}"},
                                                {"role": "assistant", "content": answer}]}) + "\n")


def in_new_process(*job):
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], stdout=subprocess.PIPE, text=True,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--synthetic", type=int, metavar="RECORDS", help="use so many made-up records")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(start(*args.one)))
        return
    if "REAL_DATA" not in os.environ:
        parser.error("REAL_DATA is not set: there the real Qwen tokenizer and Alpaca files are looked for")
    real = Path(os.environ["REAL_DATA"])
    tokenizer_path = str(real / "tokenizers/qwen2.5")
    with tempfile.TemporaryDirectory() as folder:
        if args.synthetic:
            data = os.path.join(folder, "data.jsonl")
            write_synthetic(data, args.synthetic)
            for name in ("first start", "second start"):
                samples, seconds, peak = in_new_process([data], tokenizer_path, folder)
                print(f"{name}: {samples:,} records of {os.path.getsize(data) / 1e9:.2f} GB in {seconds:.1f} s "
                      f"({samples / seconds:,.0f} a second), peak {peak / 1e9:.2f} GB")
            return
        files, ours, theirs = [str(real / name) for name in ALPACA], [], []
        for number in range(args.repetitions):
            samples, seconds, _ = start(files, tokenizer_path, os.path.join(folder, str(number)))
            ours.append(samples / seconds)
            samples, seconds = loop(files, tokenizer_path)
            theirs.append(samples / seconds)
        for name, speeds in (("finetune.py", ours), ("apply_chat_template", theirs),
                             ("ratio", [our / their for our, their in zip(ours, theirs)])):
            form = ".2f" if name == "ratio" else ",.0f"
            print(f"{name:<20} {statistics.median(speeds):{form}} ({min(speeds):{form}}-{max(speeds):{form}})"
                  + ("" if name == "ratio" else " records/s"))


if __name__ == "__main__":
    main()
