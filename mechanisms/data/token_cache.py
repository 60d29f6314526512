"""Samples on disk: written once, whole or not at all, and memory-mapped by every process that reads them."""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mechanisms.data.encoder import IGNORED, Excerpt
from mechanisms.errors import UserError
from mechanisms.paths import digest_of, digest_of_json, flush

REPORT, IDS, UNFINISHED = "report.json", "input_ids.int32", ".unfinished"
CONTENT = {IDS: np.int32, "trained.bool": np.bool_}
OF_SAMPLES = {"offsets.int64": np.int64, "digests.uint64": np.uint64, "places.int32": np.int32}
ARRAYS = CONTENT | OF_SAMPLES
LIBRARIES = "transformers", "tokenizers", "tiktoken", "jinja2"  # that render and tokenize


def cache_key(files: list[str], encoder, columns: dict[str, str] | None = None) -> str:
    """Hex key of everything the tokens depend on.

    That is the content of the data files and their names as given (problems are reported with them), the columns that
    are meant, every field of the encoder, of its tokenizer the chat template and all rules, the Python files of this
    folder, and the versions of the libraries that do the work. Raises UserError with all files that cannot be read.
    """
    digest, unreadable = hashlib.blake2b(digest_size=16), []
    here = Path(__file__).parent
    sources = sorted(here.glob("*.py"))
    for name, path in [*zip(files, files), *((source.name, source) for source in sources)]:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        try:
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            unreadable.append(f"{path}: cannot be read: {error.strerror or error}")
    if unreadable:
        raise UserError("\n       ".join(unreadable))
    rules = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
    tokenizer = rules.pop("tokenizer")
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    digest.update(json.dumps([rules, columns, tokenizer.chat_template, versions], sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


class DamagedCache(Exception):
    """A cache whose content is not what was written. The message says what is wrong with it."""


class TokenizedSamples(NamedTuple):
    """Samples end to end: input_ids int32 and trained bool (tokens of all), lengths int64 and digests uint64 (samples).

    A digest is equal for samples of equal conversations. places, int32 (samples, 3): the number of the file among the
    data files, the line, and the number of the record in the file.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    places: np.ndarray


class TextSamples(NamedTuple):
    """Samples that are not tokenized yet, end to end: content uint8, each the JSON of [Excerpt, its text].

    lengths (int64, bytes of each), digests and places as in TokenizedSamples.
    """

    content: np.ndarray
    lengths: np.ndarray
    digests: np.ndarray
    places: np.ndarray


class _Cache:
    """A sequence of samples {"input_ids": int32 (length,), "labels": int32 (length,)} in `folder`, and their report.

    It is a dataset as mechanisms/data/datasets.py says. files: the data files, which its places name; encoder: what
    made the samples. NAME: what the names of such folders begin with; CONTENT: {name of an array of all samples end to
    end: its dtype}.

    Raises DamagedCache if it is not what was written, and OSError if it cannot be read.
    """

    NAME, CONTENT = "", {}
    fill = None

    def __init__(self, folder, files=(), encoder=None):
        self.files, self.encoder = files, encoder
        manifest = _read_manifest(folder)
        self.report = manifest["report"]
        arrays = {}
        for name, dtype in (self.CONTENT | OF_SAMPLES).items():
            path = os.path.join(folder, name)
            if not os.path.isfile(path):
                raise DamagedCache(f"{name} is missing")
            if [os.path.getsize(path), digest_of(path)] != manifest["files"].get(name):
                raise DamagedCache(f"{name} is not as it was written")
            empty = os.path.getsize(path) == 0  # an empty file cannot be mapped
            arrays[name] = np.zeros(0, dtype) if empty else np.memmap(path, dtype, mode="r")
        *self.content, offsets, digests, places = arrays.values()
        self.offsets, self.digests, self.sample_places = np.array(offsets), np.array(digests), places.reshape(-1, 3)

    @classmethod
    def write(cls, folder, samples, make_report):
        """Write all samples, then the report, then give the folder its name, so that a kill leaves nothing half.

        samples: iterator of TokenizedSamples or TextSamples; make_report: called after the last one, returns a
        JSON-serialisable dict. Raises whatever `samples` or `make_report` raise, and OSError, leaving no folder behind.
        """
        _remove_stale(os.path.dirname(folder))
        unfinished = f"{folder}.{uuid.uuid4().hex}{UNFINISHED}"  # process ids are the same in every new container
        os.makedirs(unfinished)
        try:
            of_samples = [[np.zeros(1, np.int64)], [np.zeros(0, np.uint64)], [np.zeros((0, 3), np.int32)]]
            with contextlib.ExitStack() as stack:
                paths = {name: os.path.join(unfinished, name) for name in cls.CONTENT | OF_SAMPLES}
                files = {name: stack.enter_context(open(path, "wb")) for name, path in paths.items()}
                _try_lock(next(iter(files.values())))  # so that no other process takes this folder for a stale one
                for group in samples:
                    for file, array in zip(files.values(), group[:len(cls.CONTENT)]):
                        _append(file, array)
                    for arrays, array in zip(of_samples, group[len(cls.CONTENT):]):
                        arrays.append(array)
                lengths, *others = map(np.concatenate, of_samples)
                for name, array in zip(OF_SAMPLES, [np.cumsum(lengths), *others]):
                    _append(files[name], array)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                manifest = {"report": make_report(),
                            "files": {name: [os.path.getsize(path), digest_of(path)] for name, path in paths.items()}}
                with open(os.path.join(unfinished, REPORT), "w", encoding="utf-8") as file:
                    json.dump({**manifest, "digest": digest_of_json(manifest)}, file)
                    file.flush()
                    os.fsync(file.fileno())
                flush(unfinished)
                try:
                    os.replace(unfinished, folder)
                except OSError:  # another node or run that shares the cache was first
                    if not os.path.isfile(os.path.join(folder, REPORT)):
                        raise
                    shutil.rmtree(unfinished)
                flush(os.path.dirname(folder))
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    @staticmethod
    def remove(folder):
        """Take away a damaged cache, without a moment in which half of it stands under its name."""
        gone = f"{folder}.{uuid.uuid4().hex}{UNFINISHED}"
        os.replace(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def __len__(self):
        return len(self.digests)

    def content_of(self, index):
        """The parts of the arrays of CONTENT that are of one sample."""
        return [array[self.offsets[index]:self.offsets[index + 1]] for array in self.content]

    def places(self, index):
        file, line, _ = self.sample_places[index]
        return [f"{self.files[file]}:{line}"]

    def count_by_file(self, counts):
        """[(records, samples, tokens, trained tokens)] of each file, the last two only where they are known.

        counts: int64 (samples), how often each is counted.
        """
        file_of, record_of = self.sample_places[:, 0], self.sample_places[:, [0, 2]]
        begins = np.any(np.diff(record_of, axis=0, prepend=-1) != 0, axis=1)  # a record may have several samples
        return list(zip(*(np.bincount(file_of, counts * each, len(self.files)).astype(np.int64).tolist()
                          for each in (begins, 1, *self.tokens()))))

    def tokens(self):
        """(tokens, trained tokens), each int64 (samples); empty if they are not known."""
        return ()


class TokenCache(_Cache):
    """Tokenized samples."""

    NAME, CONTENT = "tokens", CONTENT

    def __init__(self, folder, files=(), encoder=None):
        super().__init__(folder, files, encoder)
        self.lengths = np.diff(self.offsets)

    def tokens(self):
        trained, starts, counts = self.content[1], self.offsets[:-1], []
        for part in range(0, len(starts), 1000):  # reduceat makes all it is given eight times as large
            begin, end = starts[part], self.offsets[min(part + 1000, len(starts))]
            counts.append(np.add.reduceat(trained[begin:end], starts[part:part + 1000] - begin, dtype=np.int64))
        return self.lengths, np.concatenate(counts) - trained[starts]  # the first token is never predicted

    def __getitem__(self, index):
        input_ids, trained = self.content_of(index)
        input_ids = np.array(input_ids)
        return {"input_ids": input_ids, "labels": np.where(trained, input_ids, IGNORED)}


class TextCache(_Cache):
    """Samples that are tokenized each time they are asked for."""

    NAME, CONTENT = "texts", {"excerpts.json": np.uint8}
    lengths = None

    def __getitem__(self, index):
        excerpt, text = json.loads(self.content_of(index)[0].tobytes())
        sample = self.encoder.encode(Excerpt(*excerpt), text)
        return {"input_ids": np.array(sample.input_ids, np.int32), "labels": np.array(sample.labels, np.int32)}


def _append(file, array):
    file.write(np.ascontiguousarray(array).view(np.uint8).data)  # tofile would not say why it failed


def _read_manifest(folder):
    """What `write` put beside the arrays. Raises DamagedCache."""
    try:
        with open(os.path.join(folder, REPORT), encoding="utf-8") as file:
            manifest = json.load(file)
        digest = manifest.pop("digest")
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError, FileNotFoundError,
            IsADirectoryError) as error:
        raise DamagedCache(f"{REPORT} is damaged or missing") from error
    if digest != digest_of_json(manifest):
        raise DamagedCache(f"{REPORT} is not as it was written")
    return manifest


def _try_lock(file):
    """Whether this process could lock an open file. The lock goes when the file is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_stale(root):
    """Remove what killed processes left in the cache: nobody holds the lock on it."""
    for kind in (TokenCache, TextCache):
        for unfinished in glob.glob(os.path.join(glob.escape(root), f"{kind.NAME}-*{UNFINISHED}")):
            with contextlib.suppress(FileNotFoundError):  # another run may be faster
                try:
                    with open(os.path.join(unfinished, next(iter(kind.CONTENT))), "r+b") as file:
                        stale = _try_lock(file)
                except OSError:  # killed before, or made right now
                    stale = time.time() - os.path.getmtime(unfinished) > 60
                if stale:
                    shutil.rmtree(unfinished, ignore_errors=True)
