"""Peak memory of one packed row, forward and backward, with Qwen's vocabulary and with one of 8,192 words.

  python bench/row_memory.py
  python bench/row_memory.py --lengths 8192 32768 131072 --device cuda

The difference between the two columns is the vocabulary's share: the output layer, its gradient and one chunk of
logits. It does not grow with the row (it shrinks once the blocks' backward is what takes most). Each number is from a
process of its own, every token is labelled, samples are of 512 tokens (hidden size 256, 4 layers, fp32).
"""

import argparse
import subprocess
import sys

VOCABULARIES = (151_936, 8_192)


def measure(length, vocabulary, device):
    """Peak bytes of a forward and backward in this process."""
    import worker  # (first: it makes the project's modules importable)

    # isort: split
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from finetune import PaddingFreeCollator
    from mechanisms.attention import WITHIN_SAMPLES
    from mechanisms.head_loss import HeadLoss

    torch.manual_seed(0)
    shape = worker.SHAPES["head-heavy"] | {"vocab_size": vocabulary}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(Qwen2Config(max_position_embeddings=length, use_cache=False, **shape),
                                                 dtype=torch.float32, attn_implementation=WITHIN_SAMPLES)
    draw = np.random.default_rng(0)
    ids = [draw.integers(vocabulary, size=min(512, length - start)) for start in range(0, length, 512)]
    batch = PaddingFreeCollator()([{"input_ids": sample, "labels": sample} for sample in ids])
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    with HeadLoss(model).computing(batch["shift_labels"]):
        model(**batch).loss.backward()
    return worker.peak_bytes(device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="tokens of a row")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)  # length, vocabulary: measure once
    args = parser.parse_args()
    if args.one:
        print(measure(*args.one, args.device))
        return
    print("| tokens in the row | " + " | ".join(f"peak, {vocabulary:,} words, GB" for vocabulary in VOCABULARIES)
          + " | difference, GB | full fp32 logits would take, GB |\n|---|---|---|---|---|")
    for length in args.lengths:
        peaks = []
        for vocabulary in VOCABULARIES:
            done = subprocess.run([sys.executable, __file__, "--device", args.device, "--one", str(length),
                                   str(vocabulary)], stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(int(done.stdout.splitlines()[-1]) / 1e9)
        logits = 4 * VOCABULARIES[0] * length / 1e9
        print(f"| {length:,} | {peaks[0]:.2f} | {peaks[1]:.2f} | {peaks[0] - peaks[1]:.2f} | {logits:.2f} |",
              flush=True)


if __name__ == "__main__":
    main()
