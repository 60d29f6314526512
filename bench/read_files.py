"""Time and peak memory of reading many records out of each kind of file, each in a process of its own.

  python -m bench.read_files --records 1000000
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time

KINDS = "jsonl", "json", "parquet"


def write(folder, records):
    """Write the same records as each of KINDS."""
    import pyarrow
    import pyarrow.parquet

    texts = [f"Question {number}: what is {number} + {number}? 请回答。" * 2 for number in range(1000)]
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "It is this: " + text}]}
            for text in texts]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    table = pyarrow.Table.from_pylist(rows)
    with open(os.path.join(folder, "data.jsonl"), "w", encoding="utf-8") as jsonl, \
            open(os.path.join(folder, "data.json"), "w", encoding="utf-8") as array, \
            pyarrow.parquet.ParquetWriter(os.path.join(folder, "data.parquet"), table.schema) as parquet:
        array.write("[")
        for part in range(records // len(rows)):
            jsonl.write("\n".join(lines) + "\n")
            array.write(("," if part else "") + ",".join(lines))
            parquet.write_table(table)
        array.write("]")


def read(path):
    from mechanisms.data.datasets import read_files, to_conversations
    from mechanisms.data.records import Notices, Problems

    problems, began = Problems(), time.time()
    count = sum(1 for _ in to_conversations(read_files([path], problems), problems, Notices()))
    with open("/proc/self/status", encoding="utf-8") as status:  # getrusage would count the parent's peak too
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    print(f"{os.path.basename(path):14} {count:>9,} conversations {os.path.getsize(path) / 1e6:>7.0f} MB "
          f"{time.time() - began:>6.1f} s {peak:>6.0f} MiB at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.read:
        read(args.read)
    else:
        with tempfile.TemporaryDirectory() as folder:
            write(folder, args.records)
            for kind in KINDS:
                subprocess.run([sys.executable, "-m", "bench.read_files", "--read",
                                os.path.join(folder, f"data.{kind}")], check=True)
