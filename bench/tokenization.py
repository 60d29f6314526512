"""How fast records become tokens, how much memory that takes, and how soon a second run starts.

  python bench/tokenization.py                           # REAL_DATA=folder of the real tokenizers and data
  python bench/tokenization.py --records 1000000

The records are questions and answers of the real Alpaca files, paired anew by chance. finetune.py goes from the file to
its token cache, labels and report included; then it starts again and finds the cache. It is compared with a loop that
parses the same records (the first 100,000 of them) and calls `apply_chat_template` on each, without labels. Every run
is a process of its own.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import median_and_range

ALPACA = ("datasets/alpaca/alpaca_en_demo.json", "datasets/alpaca/alpaca_zh_demo.json",
          "datasets/alpaca/huanhuan.json", "datasets/alpaca/identity.json")
LOOPED = 100_000


def start(data, tokenizer_path, cache_dir):
    """What finetune.py does before it loads the model -> (samples, seconds, peak bytes here, of another process)."""
    import worker  # (first: it makes the project's modules importable)

    # isort: split
    import finetune
    from mechanisms.flags import prepare_command_line

    _, data_args, training_args, _ = finetune.parse_arguments(prepare_command_line(finetune.__file__, [
        "--data_path", data, "--cache_dir", cache_dir, "--output_dir", cache_dir, "--model_max_length", "512"]))
    tokenizer = finetune.load_tokenizer(tokenizer_path)
    began = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        dataset, *_ = finetune.prepare_datasets(data_args, training_args, tokenizer)
    return (len(dataset), time.time() - began, worker.peak_bytes("cpu"),
            1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def loop(data, tokenizer_path):
    """The same records by `apply_chat_template`, one by one -> (samples, seconds)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    began, count = time.time(), 0
    with open(data, encoding="utf-8") as file:
        for line in file:
            tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)
            count += 1
            if count == LOOPED:
                break
    return count, time.time() - began


def write_records(path, real, number):
    draw = random.Random(0)
    records = [record for name in ALPACA for record in json.loads((real / name).read_text())]
    with open(path, "w", encoding="utf-8") as file:
        for count in range(number):
            asked, answered = draw.choices(records, k=2)
            question = "\n".join(part for part in (f"{count}. {asked['instruction']}", asked.get("input")) if part)
            file.write(json.dumps({"messages": [{"role": "user", "content": question},
                                                {"role": "assistant", "content": answered["output"]}]}) + "\n")


def in_new_process(*job):
    done = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], stdout=subprocess.PIPE, text=True,
                          check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=200_000, help="(200000)")
    parser.add_argument("--repetitions", type=int, default=3, help="(3)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        task, *arguments = args.one
        print(json.dumps({"start": start, "loop": loop}[task](*arguments)))
        return
    if "REAL_DATA" not in os.environ:
        parser.error("REAL_DATA is not set: there the real Qwen tokenizer and Alpaca files are looked for")
    real, ratios = Path(os.environ["REAL_DATA"]), []
    tokenizer_path = str(real / "tokenizers/qwen2.5")
    with tempfile.TemporaryDirectory() as folder:
        data = os.path.join(folder, "data.jsonl")
        write_records(data, real, args.records)
        print(f"{args.records:,} records, {os.path.getsize(data) / 1e6:,.0f} MB")
        for repetition in range(args.repetitions):
            cache = os.path.join(folder, str(repetition))
            for name in ("first start", "second start"):
                samples, seconds, peak, other = in_new_process("start", data, tokenizer_path, cache)
                print(f"finetune.py, {name}: {seconds:.1f} s, {samples / seconds:,.0f} records/s, peak memory "
                      f"{peak / 1e9:.2f} GB" + (f", {other / 1e9:.2f} GB in each of its processes" if other else ""))
                ratios += [samples / seconds] if name == "first start" else []
            samples, seconds = in_new_process("loop", data, tokenizer_path)
            print(f"apply_chat_template in a loop: {samples / seconds:,.0f} records/s", flush=True)
            ratios[-1] /= samples / seconds
    print(f"ratio: {median_and_range(ratios)}")


if __name__ == "__main__":
    main()
