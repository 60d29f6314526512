"""Data files -> datasets of samples on disk, tokenized once, or each when it is needed.

What every dataset here has, beside a length and items by their number:

  lengths: int64 (items), tokens of each; None where samples are tokenized when they are needed
  digests: uint64 (samples), equal for samples of equal conversations
  places(number): where the records of an item stand, as a list of "file:line"
  fill: share of the tokens of its rows that samples fill, where an item is a row of samples; None where it is a sample
"""

import contextlib
import itertools
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import numpy as np
from huggingface_hub.constants import HF_HOME

from mechanisms import console
from mechanisms.data.cores import count_cores, on_all_cores
from mechanisms.data.encoder import IGNORED, ConversationEncoder
from mechanisms.data.packing import best_fit_decreasing
from mechanisms.data.records import Notices, Place, Problems, find_files, read_records
from mechanisms.data.report import DataReport, Source
from mechanisms.data.shapes import BadRecord, Conversation, no_column, parse_columns, to_conversation
from mechanisms.data.token_cache import DamagedCache, TextCache, TextSamples, TokenCache, TokenizedSamples, cache_key
from mechanisms.errors import UserError

MUCH_TEXT = 8 << 20  # bytes of data per core from which tiktoken saves more time than it takes to prepare


def read_files(files: Iterable[str], problems: Problems) -> Iterator[tuple[Place, object]]:
    """Yield (Place, record) of all files, one after the other."""
    for path in files:
        yield from read_records(path, problems)


def to_conversations(records: Iterable, problems: Problems, notices: dict, columns: dict[str, str] | None = None
                     ) -> Iterator[tuple[Place, Conversation]]:
    """Yield (Place, Conversation) for every usable one of (Place, record) pairs.

    The others go to `problems`; `notices` (a Counter) counts what is left out of usable ones, by its name. columns: see
    `shapes.to_conversation`.
    """
    for place, record in records:
        try:
            yield place, to_conversation(record, notices, columns)
        except BadRecord as bad:
            problems.add(place, bad.args[0], record)


def check_records(words: list[str], skip: int, columns: dict[str, str] | None = None,
                  cache_dir: str | None = None) -> None:
    """Read all files without a tokenizer. Raises UserError with their problems if there are more than `skip`."""
    problems = Problems()
    for _ in to_conversations(read_files(find_files(words, problems, cache_dir), problems), problems, Notices(),
                              columns):
        pass
    problems.stop_or_skip(skip)


def check_arguments(data_args) -> list[str]:
    """What is wrong with the DataArguments, as lines; changes `columns` to what `load_dataset` takes."""
    problems = [] if data_args.data_path else ["--data_path is missing: which data to train on?"]
    if data_args.columns:
        data_args.columns, wrong = parse_columns(data_args.columns)
        problems += wrong
    if not 0 <= data_args.eval_ratio < 1:
        problems.append(f"--eval_ratio {data_args.eval_ratio}: a share of the data, from 0 to below 1")
    if data_args.eval_ratio and data_args.eval_data_path:
        problems.append("--eval_ratio and --eval_data_path exclude each other: give one")
    if data_args.packing and data_args.lazy_preprocess:
        problems.append("--packing and --lazy_preprocess exclude each other: rows are filled by the samples' lengths, "
                        "which are not known before they are tokenized")
    return problems


def load_datasets(data_args, encoder: ConversationEncoder, cache_dir: str | None = None, **options):
    """The data that the DataArguments name -> ({"train": dataset, "eval": dataset}, {name: DataReport}, Problems).

    The second dataset is there with --eval_data_path only. options: of `load_dataset`.
    """
    problems, datasets, reports = Problems(), {}, {}
    for name, paths in (("train", data_args.data_path), ("eval", data_args.eval_data_path)):
        files = find_files(paths or [], problems, cache_dir)
        if files:
            datasets[name], reports[name] = load_dataset(
                files, encoder, cache_dir, columns=data_args.columns, **options)
            problems.extend(reports[name].problems)
    return datasets, reports, problems


def load_dataset(files: Iterable[str] | dict[str, float], encoder: ConversationEncoder, cache_dir: str | None = None,
                 lazy: bool = False, columns: dict[str, str] | None = None,
                 first_before_others: Callable[[], AbstractContextManager[Callable[[], None]]] | None = None):
    """Files -> (dataset, DataReport). Tokenized once per node; the other ranks, and later runs, read the cache.

    Args:
        files: with the share of each that is taken, if not all of it; the cache and the report are of all of it.
        cache_dir: parent of the folder of tokens (default: below Hugging Face's cache).
        lazy: each sample is tokenized when it is needed; what is kept on disk is its text.
        columns: {key of a shape: key of the records that is meant}, of --columns.
        first_before_others: makes a context which the first process of a node enters before the others. What it gives
            is called after each piece of work, so that those who wait know of it.
    """
    report, kind = DataReport(), TextCache if lazy else TokenCache
    shares = files if isinstance(files, dict) else dict.fromkeys(files, 1.0)
    files = list(shares)
    cache_root = cache_dir or os.path.join(HF_HOME, "finetune_tokens")
    with first_before_others() if first_before_others else contextlib.nullcontext(lambda: None) as at_work:
        folder = os.path.join(cache_root, f"{kind.NAME}-{cache_key(files, encoder, columns)}")
        try:
            cache = open_cache(folder, files, encoder, kind)
            if cache is None:
                kind.write(folder, tokenize(files, encoder, report, at_work, lazy, columns), report.to_json)
                cache = kind(folder, files, encoder)
        except OSError as error:
            raise UserError(f"the cache of {kind.NAME} {folder} cannot be used: {error.strerror or error}. Give "
                            "another folder with --cache_dir") from error
    report = DataReport.from_json(cache.report)
    if not report.kept:
        return cache, report
    counts = times_taken(cache, shares)
    report.sources = [Source(path, shares[path], *numbers) for path, numbers in zip(files, cache.count_by_file(counts))]
    if none := [source for source in report.sources if source.share < 1 and not source.records]:
        raise UserError("\n       ".join(f"{source.path}:{source.share:g} takes none of its records: it has too few"
                                          for source in none))
    return cache if (counts == 1).all() else Subset(cache, np.repeat(np.arange(len(cache)), counts)), report


def times_taken(cache: TokenCache | TextCache, shares: dict[str, float]) -> np.ndarray:
    """How often each sample is taken: a share of 2.3 is all of a file twice and of its conversations 0.3, chosen by
    content, so that they are the same ones in any order."""
    counts, file_of = np.ones(len(cache), np.int64), cache.sample_places[:, 0]
    # Not in the order in which `split` chooses: of a file with a share it would hold out far too much.
    mixed = cache.digests * np.uint64(0x9E3779B97F4A7C15)
    for number, share in enumerate(shares.values()):
        if share != 1:
            own = mixed[file_of == number]
            distinct = np.unique(own)
            chosen = distinct[:round(len(distinct) * (share % 1))]
            counts[file_of == number] = int(share) + np.isin(own, chosen)
    return counts


def open_cache(folder: str, files: list[str], encoder: ConversationEncoder | None = None, kind=TokenCache):
    """The cache in `folder`; None if there is none, or a damaged one, which is said and removed."""
    if not os.path.lexists(folder):
        return None
    try:
        return kind(folder, files, encoder)
    except DamagedCache as damage:
        console.say(f"note: the cache of {kind.NAME} {folder} is made again: {damage}")
        kind.remove(folder)
        return None


def tokenize(files: Iterable[str], encoder: ConversationEncoder, report: DataReport, at_work: Callable[[], None]
             = lambda: None, lazy: bool = False, columns: dict[str, str] | None = None
             ) -> Iterator[TokenizedSamples | TextSamples]:
    """Yield the TokenizedSamples worth training on; everything else is counted in `report`.

    at_work is called after each of them. lazy: the same samples in the same order, as TextSamples. Which are left out
    must be known all the same: a byte-level tokenizer never makes more tokens than there are bytes, so only those with
    more bytes than the maximum length have to be tokenized to know.
    """
    files = list(files)

    def encode(records):
        """Some (Place, record) pairs -> their samples and DataReport; runs in another process."""
        found, kept, digests, places = DataReport(), [], [], []
        for place, conversation in to_conversations(records, found.problems, found.notices, columns):
            try:
                excerpts = encoder.excerpts(conversation, found.notices)
                samples = [None if lazy and _bytes(text) <= encoder.max_length else encoder.encode(excerpt, text)
                           for excerpt, text in excerpts]
            except BadRecord as bad:
                found.problems.add(place, bad.args[0], conversation.shown())
                continue
            for number in found.count(conversation, [excerpt for excerpt, _ in excerpts], samples):
                kept.append(excerpts[number] if lazy else samples[number])
                digests.append(conversation.digest)
                places.append((files.index(place.path), place.line, place.number))
        about = np.array(digests, np.uint64), np.array(places, np.int32).reshape(-1, 3)
        return (_texts if lazy else _tokens)(kept, *about), found

    if not lazy and sum(map(os.path.getsize, files)) > MUCH_TEXT * count_cores():
        encoder.ids_of.prepare_tiktoken()
    report.counts_tokens = not lazy
    records = console.counted(read_files(files, report.problems), "preparing" if lazy else "tokenizing", "records")
    groups = iter(lambda: list(itertools.islice(records, 500)), [])
    for samples, found in on_all_cores(encode, groups):
        report.add(found)
        yield samples
        at_work()
    for target, column in (columns or {}).items():
        lacking = report.notices[notice := no_column(target, column)]
        if lacking and lacking >= report.records():
            report.problems.fatal.append(f"--columns {target}={column}: no record has {column!r}; the first one has "
                                         f"{report.notices.examples[notice]}")
    report.problems.rejected.sort(key=lambda row: (files.index(row["file"]), row["line"]))  # reading is ahead


def _bytes(text):
    return len(unicodedata.normalize("NFC", text).encode())


def _tokens(samples, digests, places):
    ids = [token for sample in samples for token in sample.input_ids]
    labels = [label for sample in samples for label in sample.labels]
    return TokenizedSamples(np.array(ids, np.int32), np.array(labels, np.int32) != IGNORED,
                            np.array([len(sample.input_ids) for sample in samples], np.int64), digests, places)


def _texts(excerpts, digests, places):
    written = [json.dumps(excerpt, ensure_ascii=False).encode() for excerpt in excerpts]
    return TextSamples(np.frombuffer(b"".join(written), np.uint8), np.array([len(line) for line in written], np.int64),
                       digests, places)


class Subset:
    """Some samples of a dataset, by their numbers there."""

    fill = None

    def __init__(self, dataset, indices):
        self.dataset, self.indices, self.digests = dataset, indices.tolist(), dataset.digests[indices]
        self.lengths = None if dataset.lengths is None else dataset.lengths[indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        return self.dataset[self.indices[index]]

    def places(self, index):
        return self.dataset.places(self.indices[index])


def split(dataset, ratio: float) -> tuple[Subset, Subset]:
    """Hold out about `ratio` of the samples, chosen by content: the same ones in any order and with any seed, and never
    a duplicate of a trained one. Returns (the others, those held out)."""
    digests = np.unique(dataset.digests)
    held_out = np.isin(dataset.digests, digests[:round(len(digests) * ratio)])
    indices = np.arange(len(dataset))
    return Subset(dataset, indices[~held_out]), Subset(dataset, indices[held_out])


class PackedRows:
    """Lists of samples, as many as fit into max_length tokens; the same ones for the same seed."""

    def __init__(self, dataset, max_length, seed):
        self.dataset, self.digests = dataset, dataset.digests
        self.rows = best_fit_decreasing(dataset.lengths, max_length, seed)
        self.lengths = np.array([dataset.lengths[row].sum() for row in self.rows])
        self.fill = self.lengths.sum() / (len(self.rows) * max_length)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return [self.dataset[index] for index in self.rows[row]]

    def places(self, row):
        return [place for index in self.rows[row] for place in self.dataset.places(index)]
