"""How long inspect_data.py takes: for one small file, and for many records, at the first and at the second start.

  python bench/inspect_time.py                           # REAL_DATA=folder of the real tokenizers and data

The records are those of `tokenization.py`. Seconds of the clock, and in brackets those of all processors together,
which a busy machine changes less.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tokenization import write_records

ROOT = Path(__file__).parents[1]
SMALL = "datasets/alpaca/identity.json"


def timed(real, data, cache, *flags):
    """Run inspect_data.py -> text with its seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    subprocess.run([sys.executable, ROOT / "inspect_data.py", "-m", real / "tokenizers/qwen2.5", "-d", data,
                    "--cache_dir", cache, *flags], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{time.time() - began:.1f} ({cpu:.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000, help="(100000)")
    parser.add_argument("--repetitions", type=int, default=3, help="(3)")
    args = parser.parse_args()
    if "REAL_DATA" not in os.environ:
        parser.error("REAL_DATA is not set: there the real Qwen tokenizer and Alpaca files are looked for")
    real = Path(os.environ["REAL_DATA"])
    for _ in range(args.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            data, page = os.path.join(folder, "data.jsonl"), os.path.join(folder, "page.html")
            write_records(data, real, args.records)
            print(f"{SMALL}: {timed(real, real / SMALL, folder)} s, {timed(real, real / SMALL, folder)} s again")
            print(f"{args.records:,} records: {timed(real, data, folder)} s, {timed(real, data, folder)} s again, "
                  f"{timed(real, data, folder, '--html', page)} s with a page of {os.path.getsize(page):,} bytes",
                  flush=True)


if __name__ == "__main__":
    main()
