"""The loss of the output layer, forward and backward: ours against what torch has.

    python bench/head_loss.py [--tokens 800] [--hidden 256] [--vocabulary 151936] [--device cpu] [--dtype float32]

Each way runs in a fresh process: seconds of the best of three, and how much the peak memory grew.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time

import torch
from torch.nn.functional import cross_entropy, linear_cross_entropy

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from mechanisms.head_loss import SummedCrossEntropy  # noqa: E402

WAYS = {
    "ours": lambda hidden, weight, targets: SummedCrossEntropy.apply(hidden, weight, None, None, None, targets, 0.0),
    "cross_entropy of all logits": lambda hidden, weight, targets: cross_entropy(
        (hidden @ weight.T).float(), targets, reduction="sum"),
    "linear_cross_entropy": lambda hidden, weight, targets: linear_cross_entropy(
        hidden, weight, targets, reduction="sum",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256, acc_policy="accurate")),
}


def measure(way, args, queue):
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dtype, device = getattr(torch, args.dtype), args.device
    hidden = torch.randn(args.tokens, args.hidden, dtype=dtype, device=device, requires_grad=True)
    weight = (torch.randn(args.vocabulary, args.hidden, device=device) * 0.02).to(dtype).requires_grad_(not args.frozen)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    before, times = peak(device), []
    for _ in range(3):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss = WAYS[way](hidden, weight, targets)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    queue.put((min(times), peak(device) - before, loss.item(), hidden.grad.float().norm().item()))


def peak(device):
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=800, help="labelled positions")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--frozen", action="store_true", help="the layer is not trained, as in LoRA")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for way in WAYS:
        queue = context.Queue()
        process = context.Process(target=measure, args=(way, args, queue))
        process.start()
        seconds, grew, loss, norm = queue.get()
        process.join()
        print(f"{way:30} {seconds:8.2f} s  {grew / 1e9:6.2f} GB  loss {loss:.6g}  gradient norm {norm:.6g}", flush=True)


if __name__ == "__main__":
    main()
