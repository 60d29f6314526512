"""Train the same samples by the original's recipe, by TRL and by finetune.py, and compare speed and memory.

  python bench/compare.py                                    # REAL_DATA=folder of the real tokenizers and data
  python bench/compare.py --model body-heavy --contestants O P F FP
  python bench/compare.py --model hybrid --rows-per-forward O=1 "O'=1"     # these: one sample at a time
  python bench/compare.py --width 2048 --rows-per-forward O=2 --output results.json
  python bench/compare.py --device cuda --dtype bf16 --model qwen2.5-7b --lora --width 8192

Every contestant starts from the same weights and takes the same samples with the same labels in each optimizer step.
One process per run, contestants in turn, the whole round several times. The loss and the gradient norm of the first
step must be those of contestant O, or the comparison fails: who trains something else is no contestant.

Contestants:
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONTESTANTS = {
    "O": "the original's recipe: every row padded to --width, stock model, logits of all positions",
    "O'": "the same, rows padded to the longest of the batch",
    "T": "TRL's SFTTrainer with its defaults (without gradient checkpointing)",
    "P": "the same with packing (bfd)",
    "F": "finetune.py",
    "FP": "finetune.py --packing",
    "F/padded": "F with padded batches through the stock attention",
    "F/mask": "F with stock attention and a block mask",
    "F/labelled": "F with the stock loss from the logits of labelled positions",
    "F/all": "F with the stock loss from the logits of all positions",
    "O+gc": "O with gradient checkpointing, as the original's launchers have it",
    "T+gc": "T with gradient checkpointing, TRL's default",
    "P+gc": "P with gradient checkpointing, TRL's default",
}
MODELS = "head-heavy", "body-heavy", "hybrid", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"  # shapes: worker.py
ALPACA = ("datasets/alpaca/alpaca_en_demo.json", "datasets/alpaca/alpaca_zh_demo.json")
# How far a contestant's first loss and gradient norm may be from O's, relative. bf16 has 8 bits of precision.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__ + "\n".join(f"  {name:<11} {what}" for name, what in CONTESTANTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="head-heavy",
                        help=f"{', '.join(MODELS)} (random weights), or a checkpoint folder (default: head-heavy)")
    parser.add_argument("--width", type=int, default=512, help="longest sample, and length of a packed row (512)")
    parser.add_argument("--samples-per-step", type=int, default=8, help="samples in an optimizer step (8)")
    parser.add_argument("--rows-per-forward", nargs="+", default=[], metavar="CONTESTANT=N", help="rows that a "
                        "contestant computes at once, where memory does not hold all of a step (default: all)")
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps; the first is not timed (6)")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds of all contestants (3)")
    parser.add_argument("--contestants", nargs="+", default=["O", "O'", "T", "P", "F", "FP"], metavar="NAME",
                        help="see above; O is always needed (default: O O' T P F FP)")
    parser.add_argument("--data", nargs="+", help="data files (default: two Alpaca files of REAL_DATA)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(cpu)")
    parser.add_argument("--dtype", choices=TOLERANCE, help="of the computation (fp32 on cpu, bf16 on cuda)")
    parser.add_argument("--lora", action="store_true", help="train adapters instead of all weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--output", help="write every single measurement there, as JSON")
    parser.add_argument("--plant-fault", help=argparse.SUPPRESS)  # this contestant loses labels: for the test
    args = parser.parse_args(argv)

    unknown = [name for name in args.contestants if name not in CONTESTANTS]
    if unknown:
        parser.error(f"--contestants {' '.join(unknown)}: no such contestant; there are {' '.join(CONTESTANTS)}")
    if "O" not in args.contestants:
        parser.error("--contestants: O is always needed, the others are compared with it")
    peers = [name for name in args.contestants if name[0] in "TP"]
    if peers and not importlib.util.find_spec("trl"):
        parser.error(f"--contestants {' '.join(peers)}: trl is not installed here: "
                     "pip install -r bench/requirements.txt, or leave them out")
    if args.steps < 2:
        parser.error("--steps: at least 2, the first is not timed")
    try:
        args.rows_per_forward = {name: int(number) for name, number in
                                 (word.split("=") for word in args.rows_per_forward)}
    except ValueError:
        parser.error("--rows-per-forward: CONTESTANT=NUMBER, for instance O=2")
    strangers = args.rows_per_forward.keys() - set(args.contestants)
    if strangers:
        parser.error(f"--rows-per-forward {' '.join(strangers)}: not among --contestants")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    real = os.environ.get("REAL_DATA")
    if not real and (not args.data or args.model in MODELS):
        parser.error("REAL_DATA is not set: there the real Qwen tokenizer and Alpaca files are looked for. Without it, "
                     "give --data FILES and --model FOLDER")
    args.data = args.data or [str(Path(real, name)) for name in ALPACA]
    args.tokenizer_path = str(Path(real, "tokenizers/qwen2.5")) if real else None
    return args


class Failure(Exception):
    """Why there is no comparison."""


def run(job):
    """Have worker.py do a job in a process of its own; returns its result."""
    job = job | {"started": time.time(), "result": str(Path(job["folder"], "result.json"))}
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"]),
                                "TOKENIZERS_PARALLELISM": "true"}
    if job["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    Path(job["result"]).unlink(missing_ok=True)
    done = subprocess.run([sys.executable, HERE / "worker.py", json.dumps(job)], env=environment, text=True,
                          errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        end = "\n".join(done.stdout.strip().splitlines()[-20:])
        raise Failure(f"{job.get('contestant', job['task'])}: exit code {done.returncode}. Its last words:\n{end}")
    return json.loads(Path(job["result"]).read_text())


def check(name, result, reference, tolerance):
    """Raise Failure unless the contestant's first step is O's."""
    for key, what in (("loss", "loss"), ("grad_norm", "gradient norm")):
        value, wanted = result[key], reference[key]
        if not math.isfinite(value) or value <= 0:
            raise Failure(f"{name}: the {what} of the first step is {value}")
        if abs(value - wanted) > tolerance * wanted:
            raise Failure(f"{name}: the {what} of the first step is {value:.7g}, and O's is {wanted:.7g}: they differ "
                          f"by {abs(value - wanted) / wanted:.1e}, more than {tolerance:.0e}")


def measure(args, folder):
    """-> (facts about the samples, list of rounds); a round is {contestant: its result}."""
    job = {"folder": folder, "model": args.model, "data": args.data, "tokenizer_path": args.tokenizer_path,
           "model_path": str(Path(folder, "model")) if args.model in MODELS else args.model,
           **{name: getattr(args, name) for name in (
               "width", "samples_per_step", "steps", "device", "dtype", "lora", "threads")}}
    facts = run(job | {"task": "prepare"})
    rounds = []
    for number in range(args.repetitions):
        rounds.append({})
        for name in sorted(args.contestants, key=lambda name: name != "O"):
            result = run(job | {"task": "train", "contestant": name, "fault": name == args.plant_fault,
                                "rows_per_forward": args.rows_per_forward.get(name)})
            rounds[-1][name] = result
            check(name, result, rounds[0]["O"], TOLERANCE[args.dtype])
            print(f"round {number + 1}: {name:<10} {speed(result):8,.0f} tokens/s  loss {result['loss']:.6f}  "
                  f"gradient norm {result['grad_norm']:.6f}", file=sys.stderr, flush=True)
    return facts, rounds


def speed(result):
    return result["tokens"] / result["seconds"]


def median_and_range(values, form=".2f"):
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def report(args, facts, rounds):
    """The results as Markdown: median, and in brackets the least and the most, over the rounds."""
    names = [name for name in CONTESTANTS if name in args.contestants]
    samples = args.steps * args.samples_per_step
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    roofline = median_and_range((round_["O"]["roofline"] / 1e9 for round_ in rounds), ",.0f")
    lines = [
        f"    python bench/compare.py {shlex.join(sys.argv[1:])}", "",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, {processor(args)}. {versions}.", "",
        f"Model {args.model}, {'LoRA' if args.lora else 'all weights trained'}, {args.dtype}; {samples} samples "
        f"({facts['tokens']:,} tokens, {facts['labelled']:,} of them labelled, the longest {facts['longest']}), "
        f"{args.samples_per_step} a step, width {args.width}. Matrix products reach {roofline} GFLOP/s here. "
        f"First loss {rounds[0]['O']['loss']:.6f}, gradient norm {rounds[0]['O']['grad_norm']:.6f}; all agree to "
        f"{TOLERANCE[args.dtype]:.0e}.", "",
        "| | tokens/s | x O | computed / real tokens | share of matmul speed | peak memory, GB | x O "
        "| to the first step, s | preprocessing, records/s |", "|---|---|---|---|---|---|---|---|---|"]
    for name in names:
        runs = [round_[name] for round_ in rounds]
        share = (run_["flops"] / run_["seconds"] / round_["O"]["roofline"]
                 for run_, round_ in zip(runs, rounds))
        lines.append("| " + " | ".join([
            f"**{name}** {CONTESTANTS[name]}", median_and_range(map(speed, runs), ",.0f"), ratio(rounds, name, "O"),
            f"{runs[0]['computed_tokens_ratio']:.2f}", median_and_range(share, ".1%"),
            median_and_range(run_["peak_bytes"] / 1e9 for run_ in runs),
            ratio(rounds, name, "O", lambda run_: run_["peak_bytes"]),
            median_and_range((run_["first_step_seconds"] for run_ in runs), ".1f"),
            f"{statistics.median(run_['preprocessed_per_second'] for run_ in runs):,.0f}"]) + " |")
    ours = [name for name in names if name in ("F", "FP")]
    if ours:
        others = [name for name in names if name not in ours]
        for what, key in (("tokens/s", speed), ("peak memory", lambda run_: run_["peak_bytes"])):
            lines += ["", f"| {what} | " + " | ".join(f"x {name}" for name in others) + " |",
                      "|---" * (len(others) + 1) + "|"]
            lines += [f"| **{name}** | " + " | ".join(ratio(rounds, name, other, key) for other in others) + " |"
                      for name in ours]
    return "\n".join(lines)


def ratio(rounds, name, other, key=speed):
    """Of each round, so that a machine that is slow for a while is so for both."""
    return median_and_range(key(round_[name]) / key(round_[other]) for round_ in rounds)


def processor(args):
    if args.device == "cuda":
        return subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True,
                              capture_output=True).stdout.splitlines()[0]
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {args.threads} threads"


def main(argv):
    args = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            facts, rounds = measure(args, folder)
        except Failure as failure:
            print(f"FAILED: {failure}", file=sys.stderr)
            return 1
    if args.output:
        Path(args.output).write_text(json.dumps(
            {"command": argv, "arguments": vars(args), "facts": facts, "rounds": rounds}, indent=1))
    print(report(args, facts, rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
