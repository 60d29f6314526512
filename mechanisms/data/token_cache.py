"""Tokenized samples on disk: written once, whole or not at all, and memory-mapped by every process that reads them."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

LIBRARIES = "transformers", "tokenizers", "tiktoken", "jinja2"  # that render and tokenize


def cache_key(files: list[str], encoder) -> str:
    """Hex key of everything the tokens depend on.

    That is the content of the data files and their names as given (problems are reported with them), every field of
    the encoder, of its tokenizer the chat template and all rules, the Python files of this folder, and the versions of
    the libraries that do the work.
    """
    digest = hashlib.blake2b(digest_size=16)
    here = Path(__file__).parent
    sources = sorted(here.glob("*.py"))
    for name, path in [*zip(files, files), *((source.name, source) for source in sources)]:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        with open(path, "rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    rules = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
    tokenizer = rules.pop("tokenizer")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    digest.update(json.dumps([rules, tokenizer.chat_template, versions], sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


class TokenizedSamples(NamedTuple):
    """Samples end to end: input_ids int32 and trained bool (tokens of all), lengths int64 and digests uint64 (samples).

    A digest is equal for samples of equal conversations.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray


class TokenCache:
    """A sequence of samples {"input_ids": int32 (length,), "labels": int32 (length,)} in `folder`, and their report.

    It is a dataset as mechanisms/data/datasets.py says.
    """

    fill = None

    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "report.json"), encoding="utf-8") as file:
            self.report = json.load(file)
        self.offsets = np.fromfile(os.path.join(folder, "offsets.int64"), dtype=np.int64)
        self.digests = np.fromfile(os.path.join(folder, "digests.uint64"), dtype=np.uint64)
        self.lengths = np.diff(self.offsets)
        length = int(self.offsets[-1])
        shape = {"shape": (length,), "mode": "r"} if length else None  # an empty file cannot be mapped
        self.input_ids = np.memmap(os.path.join(folder, "input_ids.int32"), np.int32, **shape) if shape else []
        self.trained = np.memmap(os.path.join(folder, "trained.bool"), np.bool_, **shape) if shape else []

    @staticmethod
    def exists(folder):
        """Whether a whole cache lies in `folder`: the report is written last, then the folder renamed into place."""
        return os.path.isfile(os.path.join(folder, "report.json"))

    @staticmethod
    def write(folder, samples, make_report):
        """Write all samples, then the report, then give the folder its name, so that a kill leaves nothing half.

        samples: iterator of TokenizedSamples; make_report: called after the last one, returns a JSON-serialisable
        dict. Raises whatever `samples` or `make_report` raise, leaving no folder behind.
        """
        unfinished = f"{folder}.{os.getpid()}.unfinished"
        os.makedirs(unfinished)
        try:
            lengths, digests = [np.zeros(1, np.int64)], [np.zeros(0, np.uint64)]
            with open(os.path.join(unfinished, "input_ids.int32"), "wb") as ids_file, \
                    open(os.path.join(unfinished, "trained.bool"), "wb") as trained_file:
                for group in samples:
                    group.input_ids.tofile(ids_file)
                    group.trained.tofile(trained_file)
                    lengths.append(group.lengths)
                    digests.append(group.digests)
            np.cumsum(np.concatenate(lengths)).tofile(os.path.join(unfinished, "offsets.int64"))
            np.concatenate(digests).tofile(os.path.join(unfinished, "digests.uint64"))
            with open(os.path.join(unfinished, "report.json"), "w", encoding="utf-8") as file:
                json.dump(make_report(), file)
            try:
                os.replace(unfinished, folder)
            except OSError:  # another node or run that shares the cache was first
                if not TokenCache.exists(folder):
                    raise
                shutil.rmtree(unfinished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def __len__(self):
        return len(self.digests)

    def __getitem__(self, index):
        start, end = self.offsets[index], self.offsets[index + 1]
        input_ids = np.array(self.input_ids[start:end])
        return {"input_ids": input_ids, "labels": np.where(self.trained[start:end], input_ids, -100)}
