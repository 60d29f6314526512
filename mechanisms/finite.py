"""Numbers that are not finite: no step is made with one, nothing that holds one is saved, and its records are named."""

import collections
import math
import statistics

import torch

from mechanisms.console import say
from mechanisms.errors import UserError

SHOWN = 20  # records that a message names
WINDOW, FIRST = 50, 10  # steps whose losses a step is compared with: at most, and before anything is said


class NotFinite(UserError):
    """A loss, gradient or weight that is inf or nan."""

    exit_code = 3

    def __init__(self, what, step, rate, places=()):
        records = f"\n       Records of that step: {shown(places)}" if places else ""
        super().__init__(
            f"{what} at step {step}, learning rate {rate:.3g}. Nothing was saved since; the checkpoints before it are "
            f"whole.{records}\n       Usual causes: a learning rate too high for this model, or --fp16 where only "
            "--bf16 has the range.")


def shown(places):
    """A list of places as text."""
    more = len(places) - SHOWN
    return ", ".join(map(str, places[:SHOWN])) + (f" and {more} more" if more > 0 else "")


def all_finite(tensors):
    """Whether no floating-point number in the tensors is inf or nan, in one pass over each and without a copy."""
    bounds = [torch.stack(torch.aminmax(tensor)).float() for tensor in tensors
              if tensor.is_floating_point() and tensor.numel()]  # nan, where there is one
    return all(bound.isfinite().all() for bound in bounds)


def lost_where_not_finite(loss):
    """Let the gradients of a loss that is not finite be nan, so that their norm tells all ranks, and costs none."""
    finite = loss.detach().isfinite()
    loss.register_hook(lambda gradient: gradient.where(finite, math.nan))


class Numbered(torch.utils.data.Dataset):
    """Items of a dataset, each with its number."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return index, self.dataset[index]


class CollateNumbered:
    """A collator that takes `Numbered` items too; the batch then says under "numbers" (list of int) which they are."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, items):
        if not isinstance(items[0], tuple):
            return self.collate(items)
        numbers, items = zip(*items)
        return {**self.collate(items), "numbers": list(numbers)}


class SpikeWatch:
    """Names the records of a step whose loss is far above the median of the steps before it."""

    def __init__(self, factor):
        self.factor, self.losses = factor, collections.deque(maxlen=WINDOW)

    def is_spike(self, loss):
        """Whether `loss`, that of all ranks, is `factor` times the median of up to 50 steps before."""
        spike = len(self.losses) >= FIRST and loss > self.factor * statistics.median(self.losses)
        self.losses.append(loss)
        return spike

    def report(self, step, loss, places):
        before = statistics.median(list(self.losses)[:-1])
        say(f"note: step {step}: loss {loss:.4g} is {loss / before:.1f} times the median of the steps before "
            f"({before:.4g}). Its records, those with the highest loss first: {shown(places)}")
