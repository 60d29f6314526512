"""Time and peak memory of many records in each kind of file: read alone, and in whole runs up to the first checkpoint.

  python -m bench.read_files --records 1000000

The records are made into conversations (no tokenizing), each file in a process of its own; the time is that of a core,
which other work on the machine disturbs less. Then finetune.py trains one step on two ranks (--dry_run), with a tiny
model; the peak memory is that of the process with the most, libraries included; what processes share counts in each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
KINDS = "jsonl", "json", "parquet"
WHOLE_RUNS = "json", "parquet"


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

    problems, began = Problems(), time.process_time()
    count = sum(1 for _ in to_conversations(read_files([path], problems), problems, Notices()))
    print(f"{os.path.basename(path):14} {count:>9,} conversations {os.path.getsize(path) / 1e6:>7.0f} MB "
          f"{time.process_time() - began:>6.1f} s of a core {peak('self') / 2 ** 20:>6,.0f} MiB at most", flush=True)


def peak(process):
    """Most bytes that a process has had in memory so far; 0 if it is gone. (getrusage would count its parent's, too.)
    """
    try:
        with open(f"/proc/{process}/status", encoding="utf-8") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")), 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0


def whole_run(path, model, folder, lazy):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "finetune.py",
               "--model_name_or_path", model, "--data_path", path, "--lazy_preprocess", str(lazy), "--dry_run",
               "--per_device_train_batch_size", "1", "--cache_dir", folder,
               "--output_dir", os.path.join(folder, "out"), "--ddp_timeout", "7200"]
    began, peaks = time.time(), {}
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            peaks[process.pid] = max(peaks.get(process.pid, 0), peak(process.pid))
        time.sleep(0.2)
    if run.returncode:
        raise SystemExit(f"the run ended with {run.returncode}")
    print(f"{os.path.basename(path):14} {'lazy' if lazy else 'eager':5} {time.time() - began:>6.0f} s, "
          f"{max(peaks.values()) / 1e9:.2f} GB at most in one of {len(peaks)} processes", flush=True)


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
            from examples.make_tiny_model import example_texts, make_tiny_model

            model = make_tiny_model(Path(folder, "model-instruct"), example_texts(), num_layers=2, hidden_size=64)
            for kind in WHOLE_RUNS:
                for lazy in (False, True):
                    whole_run(os.path.join(folder, f"data.{kind}"), model, os.path.join(folder, "cache"), lazy)
