"""An evaluation record by record: which have the highest loss, and how each file does."""

import os

import torch
from accelerate.utils import gather_object

from mechanisms.data.encoder import IGNORED

HARDEST = 10
SHOWN_TOKENS = 40  # of the answers of such a record


class RecordLosses:
    """Collects the loss of every sample of one evaluation of `dataset`, on this rank; all ranks end it together."""

    def __init__(self, dataset):
        self.dataset, self.numbers, self.sums = dataset, [], []

    def add(self, numbers, inputs, losses):
        """numbers: which samples are in the batch `inputs`; losses: (n) of its predicted tokens."""
        ends = inputs["cu_seq_lens_q"][1:].long()
        sample_of = torch.searchsorted(ends, inputs["logits_to_keep"], right=True)
        sums = torch.zeros(len(ends), 2, dtype=torch.float64, device=losses.device)
        sums.index_add_(0, sample_of, torch.stack([losses.double(), torch.ones_like(losses.double())], 1))
        self.numbers += numbers
        self.sums.append(sums)

    def end(self):
        """-> ([(mean loss, tokens, number of the sample)] of the HARDEST ones, {file: mean loss of its tokens})."""
        found, files = [], {}
        for number, (loss, tokens) in zip(self.numbers, torch.cat(self.sums).tolist() if self.sums else []):
            if number < len(self.dataset) and tokens:  # the others make the last batch a full one
                found.append((loss / tokens, int(tokens), number))
                total = files.setdefault(self.dataset.places(number)[0].rpartition(":")[0], [0.0, 0.0])
                total[0], total[1] = total[0] + loss, total[1] + tokens
        everywhere = gather_object([(sorted(found, reverse=True)[:HARDEST], files)])
        together = {}
        for _, of_rank in everywhere:
            for file, (loss, tokens) in of_rank.items():
                before = together.get(file, (0.0, 0.0))
                together[file] = before[0] + loss, before[1] + tokens
        hardest = sorted((record for records, _ in everywhere for record in records), reverse=True)[:HARDEST]
        return hardest, {file: loss / tokens for file, (loss, tokens) in sorted(together.items())}


def short_names(files):
    """{file: the end of its path that no other one has}."""
    parts = {file: file.split(os.sep) for file in files}
    names = {}
    for file, own in parts.items():
        length = next(length for length in range(1, len(own) + 1)
                      if length == len(own) or sum(other[-length:] == own[-length:] for other in parts.values()) == 1)
        names[file] = os.sep.join(own[-length:])
    return names


def described(hardest, dataset, tokenizer):
    """The hardest records as the report shows them: [{"place", "loss", "tokens", "text"}]."""
    return [{"place": dataset.places(number)[0], "loss": loss, "tokens": tokens, "text": tokenizer.decode(
        [label for label in dataset[number]["labels"].tolist() if label != IGNORED][:SHOWN_TOKENS],
        skip_special_tokens=True)} for loss, tokens, number in hardest]
