"""Data files -> datasets of samples, tokenized once and read from disk, or each when it is needed."""

import itertools
import os
import unicodedata

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME

from mechanisms import console
from mechanisms.data.cores import count_cores, on_all_cores
from mechanisms.data.encoder import IGNORED
from mechanisms.data.packing import best_fit_decreasing
from mechanisms.data.records import read_records
from mechanisms.data.report import DataReport
from mechanisms.data.shapes import BadRecord, to_conversation
from mechanisms.data.token_cache import TokenCache, TokenizedSamples, cache_key

MUCH_TEXT = 8 << 20  # bytes of data per core from which TextEncoder.hasten saves more time than it takes


def read_files(files, problems):
    """Yield (Place, record) of all files, one after the other."""
    for path in files:
        yield from read_records(path, problems)


def to_conversations(records, problems, notices):
    """Yield (Place, Conversation) for every usable one of (Place, record) pairs.

    The others go to `problems`; `notices` (a Counter) counts what is left out of usable ones, by its name.
    """
    for place, record in records:
        try:
            yield place, to_conversation(record, notices)
        except BadRecord as bad:
            problems.add(place, bad.args[0], record)


class LazyConversations(torch.utils.data.Dataset):
    """The samples of `TokenCache`, each tokenized when it is asked for."""

    def __init__(self, conversations, digests, encoder):
        self.conversations, self.digests, self.encoder = conversations, np.array(digests, np.uint64), encoder

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        sample = self.encoder(self.conversations[index])
        return {"input_ids": np.array(sample.input_ids, np.int32), "labels": np.array(sample.labels)}


def tokenize(files, encoder, report):
    """Yield the TokenizedSamples worth training on; everything else is counted in `report`."""

    def encode(records):
        """Some (Place, record) pairs -> their TokenizedSamples and DataReport; runs in another process."""
        found, ids, labels, lengths, digests = DataReport(), [], [], [], []
        encoder.notices = found.notices
        for place, conversation in to_conversations(records, found.problems, found.notices):
            try:
                sample = encoder(conversation)
            except BadRecord as bad:
                found.problems.add(place, bad.args[0], conversation.shown())
                continue
            if found.count(sample, conversation.digest):
                ids += sample.input_ids
                labels += sample.labels
                lengths.append(len(sample.input_ids))
                digests.append(conversation.digest)
        return TokenizedSamples(np.array(ids, np.int32), np.array(labels, np.int32) != IGNORED,
                                np.array(lengths, np.int64), np.array(digests, np.uint64)), found

    if sum(map(os.path.getsize, files)) > MUCH_TEXT * count_cores():
        encoder.ids_of.hasten()
    records = console.counted(read_files(files, report.problems), "tokenizing", "records")
    groups = iter(lambda: list(itertools.islice(records, 500)), [])
    for samples, found in on_all_cores(encode, groups):
        report.add(found)
        yield samples
    report.problems.rejected.sort(key=lambda row: (files.index(row["file"]), row["line"]))  # reading is ahead


def load_lazily(files, encoder, report):
    """The same samples as `tokenize`, in the same order, not tokenized yet.

    Which samples are left out must be known before the start. A byte-level tokenizer never makes more tokens than there
    are bytes, so only samples with more bytes than the maximum length have to be tokenized to know.
    """
    conversations, digests = [], []
    for place, conversation in to_conversations(
            read_files(files, report.problems), report.problems, report.notices):
        try:
            rendered, sample = encoder.render(conversation), None
            if (not isinstance(rendered, str) or not all(conversation.trained)
                    or len(unicodedata.normalize("NFC", rendered).encode()) > encoder.max_length
                    or rendered.count("<|im_start|>assistant\n") != len(conversation.trained)):
                sample = encoder.encode(conversation, rendered)
        except BadRecord as bad:
            report.problems.add(place, bad.args[0], conversation.shown())
            continue
        if report.count(sample, conversation.digest):
            conversations.append(conversation)
            digests.append(conversation.digest)
    report.counts_tokens = False
    report.notices.update(encoder.notices)
    return LazyConversations(conversations, digests, encoder)


def load_dataset(files, encoder, data_args, training_args):
    """Files -> (dataset, DataReport). Tokenized once per node; the other ranks, and later runs, read the cache."""
    if data_args.lazy_preprocess:
        report = DataReport()
        return load_lazily(files, encoder, report), report
    flags = {"max_length": encoder.max_length, "loss_on": encoder.loss_on, "overlong": encoder.overlong}
    here = os.path.dirname(os.path.abspath(__file__))
    sources = [os.path.join(here, name) for name in sorted(os.listdir(here)) if name.endswith(".py")]
    cache_root = training_args.cache_dir or os.path.join(HF_HOME, "finetune_tokens")
    with training_args.main_process_first(desc="tokenizing"):
        folder = os.path.join(cache_root, "tokens-" + cache_key(files, encoder.tokenizer, flags, sources))
        if not TokenCache.exists(folder):
            report = DataReport()
            TokenCache.write(folder, tokenize(files, encoder, report), report.to_json)
    cache = TokenCache(folder)
    return cache, DataReport.from_json(cache.report)


def split(dataset, ratio):
    """Hold out about `ratio` of the samples, chosen by content: the same ones in any order and with any seed, and never
    a duplicate of a trained one."""
    digests = np.unique(dataset.digests)
    held_out = np.isin(dataset.digests, digests[:round(len(digests) * ratio)])
    indices = np.arange(len(dataset))
    return (torch.utils.data.Subset(dataset, indices[~held_out].tolist()),
            torch.utils.data.Subset(dataset, indices[held_out].tolist()))


def sample_lengths(dataset):
    """Tokens of each sample, int64 (samples), or None where they are tokenized when they are needed."""
    if isinstance(dataset, torch.utils.data.Subset):
        lengths = sample_lengths(dataset.dataset)
        return None if lengths is None else lengths[dataset.indices]
    return np.diff(dataset.offsets) if isinstance(dataset, TokenCache) else None


class PackedRows(torch.utils.data.Dataset):
    """Lists of samples, as many as fit into max_length tokens; the same ones for the same seed."""

    def __init__(self, dataset, max_length, seed):
        self.dataset, lengths = dataset, sample_lengths(dataset)
        self.rows = best_fit_decreasing(lengths, max_length, seed)
        self.fill = lengths.sum() / (len(self.rows) * max_length)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return [self.dataset[index] for index in self.rows[row]]
