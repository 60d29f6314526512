"""What a data set is made of, and single records of it token by token, as they are trained.

All of it comes from the datasets, reports and encoder that finetune.py trains with.
"""

import collections
import copy
import dataclasses
import functools
import itertools
import json
import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken

from mechanisms.data.cores import on_all_cores
from mechanisms.data.datasets import Subset, read_files
from mechanisms.data.encoder import ConversationEncoder
from mechanisms.data.records import Notices, Place, Problems, deeper
from mechanisms.data.report import DataReport
from mechanisms.data.shapes import BadRecord, find_shape, to_conversation, with_columns
from mechanisms.data.template import HEADER, ChatTemplate, strings
from mechanisms.limits import limited

NEAR_EMPTY = 3  # characters that a near-empty answer has at most
TURNS = 8  # answers of a record that are counted apart; the others are counted with the last of these
SCRIPT_TEXT = 1000  # characters of each message that are looked at for its script
SCRIPTS = {"CJK": "Chinese", "HANGUL": "Korean", "HIRAGANA": "Japanese", "KATAKANA": "Japanese"}


# ---------------------------------------------------------------------------------------------------------------------
# All records, counted
# ---------------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Survey:
    """Counts over a data set, and which of its records are of which kind.

    files: paths of the data files
    places: int64 (records, 3): number of the file in `files`, line, number of the record in its file
    kinds: {kind: bool (records)}
    lengths, times: int64 (samples), tokens of each without any cut, and how often it is taken
    counts: {"shapes" | "roles" | "scripts": Counter of records, messages, records}
    turns: int64 (TURNS, 2): trained answers, and their tokens, by which trained answer of its record each is; None
        where all is trained, not only answers
    digests: uint64 (samples) of the data set, for `overlap`
    """

    files: list[str]
    places: np.ndarray
    kinds: dict[str, np.ndarray]
    lengths: np.ndarray
    times: np.ndarray
    counts: dict[str, collections.Counter]
    turns: np.ndarray | None
    digests: np.ndarray

    def place(self, record: int) -> str:
        file, line, _ = self.places[record]
        return f"{short_names(self.files)[self.files[file]]}:{line}"

    def overlap(self, other: "Survey") -> int:
        """Different conversations that both data sets have."""
        return len(np.intersect1d(self.digests, other.digests))


def short_names(files: Iterable[str]) -> dict[str, str]:
    """{path: its last part, or all of it where another file has the same}"""
    times = collections.Counter(map(os.path.basename, files))
    return {path: path if times[os.path.basename(path)] > 1 else os.path.basename(path) for path in files}


class _Found(NamedTuple):
    """What one process finds in some records.

    rows: file, line, number, `_FLAGS` as bits, and the longest sample of a record that may be cut or left out
    """

    rows: list[tuple[int, int, int, int, int]]
    digests: list[int]
    uncut: list[tuple[int, int, list[int]]]  # file, number and lengths of the samples of records that may be cut
    counts: dict[str, collections.Counter]


_FLAGS = "with tools", "with thinking", "with control tokens", "near-empty answer"


def survey(dataset, report: DataReport, encoder: ConversationEncoder, columns: dict[str, str] | None = None,
           held_out: Subset | None = None) -> Survey:
    """Look at all records behind a dataset of `load_dataset` that was not loaded lazily.

    held_out: the part of it that `split` gives evaluation.
    """
    part = isinstance(dataset, Subset)
    cache, indices = (dataset.dataset, dataset.indices) if part else (dataset, range(len(dataset)))
    files = {path: number for number, path in enumerate(cache.files)}
    rejected = {_key(files[row["file"]], row["record"]) for row in report.problems.rejected}
    sample_keys = _sample_keys(cache)
    kept, full = set(sample_keys.tolist()), set(sample_keys[cache.lengths >= encoder.max_length].tolist())
    uncut = uncut_encoder(encoder)

    def look(records):
        found = _Found([], [], [], {name: collections.Counter() for name in ("shapes", "roles", "scripts")})
        for place, record in records:
            file = files[place.path]
            if (key := _key(file, place.number)) in rejected:
                continue
            conversation = to_conversation(record, Notices(), columns)
            lengths = []
            if key in full or key not in kept:
                excerpts = encoder.excerpts(conversation, Notices())
                lengths = [len(uncut.encode(*excerpt).input_ids) for excerpt in excerpts]
                found.uncut.append((file, place.number, lengths))
            found.rows.append((file, place.line, place.number, _flags(conversation, encoder.template),
                               max(lengths, default=0)))
            found.digests.append(conversation.digest)
            found.counts["shapes"][_shape(record, columns)] += 1
            found.counts["roles"].update(message["role"] for message in conversation.messages)
            found.counts["scripts"][script_of(conversation.messages)] += 1
        return found

    rows, digests, uncut_lengths, counts = [np.zeros((0, 5), np.int64)], [], [], {}
    records = read_files(files, Problems())
    for found in on_all_cores(look, iter(lambda: list(itertools.islice(records, 500)), [])):
        rows.append(np.array(found.rows, np.int64).reshape(-1, 5))
        digests += found.digests
        uncut_lengths += found.uncut
        for name, counter in found.counts.items():
            counts.setdefault(name, collections.Counter()).update(counter)
    bad = report.problems.rejected
    rows.append(np.array([(files[row["file"]], row["line"], row["record"], 0, 0) for row in bad],
                         np.int64).reshape(-1, 5))
    times, held = (np.bincount(np.array(indices, np.int64)[part], minlength=len(cache))
                   for part in (slice(None), held_out.indices if held_out else slice(0)))
    return _survey(cache, times, held > 0, encoder, np.concatenate(rows), np.array(digests, np.uint64), uncut_lengths,
                   counts)


def _survey(cache, times, held, encoder, rows, digests, uncut, counts):
    usable, keys = len(digests), _key(rows[:, 0], rows[:, 2])
    sample_keys = _sample_keys(cache)
    kept_keys, first, samples = np.unique(sample_keys, return_index=True, return_counts=True)
    kept, where = np.isin(keys, kept_keys), np.searchsorted(kept_keys, keys)

    def of_records(values):
        """A value of each kept record -> of each record, 0 for the others."""
        found = np.zeros(len(keys), np.int64)
        found[kept] = values[where[kept]]
        return found

    longest = np.maximum(rows[:, 4], of_records(np.maximum.reduceat(cache.lengths, first) if len(first) else first))
    turns, shortest = _turns(cache, times) if encoder.loss_on != "all" else (None, None)
    numbers = np.arange(len(rows))
    kinds = {
        "first": numbers == 0,
        "longest": numbers == (np.argmax(longest) if longest.any() else -1),
        "shortest answer": keys == (-1 if shortest is None else sample_keys[shortest]),
        "cut": kept & (rows[:, 4] > encoder.max_length),
        "left out": ~kept & (numbers < usable),
        "unusable": numbers >= usable,
        "in several samples": of_records(samples) > 1,
        **{name: rows[:, 3] >> bit & 1 == 1 for bit, name in enumerate(_FLAGS)},
        "duplicate": kept & np.concatenate([_seen_before(digests), np.zeros(len(rows) - usable, bool)]),
        "held out": of_records(held[first]) > 0,
        "not taken": kept & (of_records(times[first]) == 0)}
    # The cache has the samples as they were cut: those of records with one at the maximum length are counted whole.
    again = np.array([_key(file, number) for file, number, _ in uncut], np.int64)
    as_they_are = ~np.isin(sample_keys, again)
    taken = dict(zip(kept_keys.tolist(), times[first].tolist()))
    whole = [(length, taken.get(key, 1)) for key, (_, _, lengths) in zip(again.tolist(), uncut) for length in lengths]
    whole = np.array([pair for pair in whole if pair[0]], np.int64).reshape(-1, 2)
    return Survey(list(cache.files), rows[:, :3], kinds,
                  np.concatenate([cache.lengths[as_they_are], whole[:, 0]]),
                  np.concatenate([times[as_they_are], whole[:, 1]]), counts, turns, cache.digests)


def _key(file, number):
    """One number for a record."""
    return file << 40 | number


def _sample_keys(cache):
    """int64 (samples), rising"""
    return _key(cache.sample_places[:, 0].astype(np.int64), cache.sample_places[:, 2])


def _seen_before(digests):
    """bool (records): whether an equal conversation comes before each."""
    seen = np.ones(len(digests), bool)
    seen[np.unique(digests, return_index=True)[1]] = False
    return seen


def _flags(conversation, template: ChatTemplate):
    messages = template.structured(conversation.messages, conversation.tools, Notices())
    answers = [message for message in messages if message["role"] == "assistant"]
    empty = any(trained and "tool_calls" not in answer and len(answer["content"].strip()) <= NEAR_EMPTY
                for answer, trained in zip(answers, conversation.trained))
    written = any(map(template.added.search, strings([conversation.messages, conversation.tools])))
    return sum(bool(value) << bit for bit, value in enumerate((
        conversation.tools or any("tool_calls" in answer for answer in answers),
        any(answer.get("reasoning_content") for answer in answers), written, empty)))


def _shape(record, columns):
    shape = find_shape(with_columns(record, columns, Notices()) if columns else record)
    return "/".join(filter(None, shape))


def script_of(messages: list[dict]) -> str:
    """What most letters of a conversation are written in: the language, where a script has one, else the script."""
    letters = collections.Counter("".join(message["content"][:SCRIPT_TEXT] for message in messages))
    scripts = collections.Counter()
    for letter, count in letters.items():
        if script := _script(letter):
            scripts[script] += count
    if scripts["Japanese"] * 10 > scripts["Chinese"]:  # Japanese writes with Chinese characters too
        scripts["Japanese"] += scripts.pop("Chinese", 0)
    return max(scripts, key=scripts.get, default="no letters") if scripts.total() else "no letters"


@functools.cache
def _script(letter):
    if not letter.isalpha():
        return None
    name = unicodedata.name(letter, "").partition(" ")[0].partition("-")[0]
    return SCRIPTS.get(name, name.capitalize()) or None


def _turns(cache, times):
    """(Survey.turns, number of the sample with the shortest trained answer or None)"""
    totals, shortest = np.zeros((TURNS, 2), np.int64), (sys.maxsize, None)
    record_of = np.cumsum(np.any(np.diff(cache.sample_places[:, [0, 2]], axis=0, prepend=-1) != 0, axis=1)) - 1
    firsts = np.flatnonzero(np.diff(record_of, prepend=-1))
    for part in range(0, len(firsts), 1000):  # so many records at once
        begin, end = firsts[part], firsts[part + 1000] if part + 1000 < len(firsts) else len(cache)
        offsets = cache.offsets[begin:end + 1] - cache.offsets[begin]
        trained = np.array(cache.content[1][cache.offsets[begin]:cache.offsets[end]])
        trained[offsets[:-1]] = False  # the first token is never predicted
        edges = np.diff(np.concatenate([[0], trained.astype(np.int8), [0]]))
        starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        sample = begin + np.searchsorted(offsets, starts, "right") - 1
        records, weights = record_of[sample], times[sample]
        turn = np.minimum(np.arange(len(starts)) - np.searchsorted(records, records), TURNS - 1)
        totals[:, 0] += np.bincount(turn, weights, TURNS).astype(np.int64)
        totals[:, 1] += np.bincount(turn, weights * (ends - starts), TURNS).astype(np.int64)
        if len(starts) and (least := np.argmin(ends - starts)) is not None and (ends - starts)[least] < shortest[0]:
            shortest = (ends - starts)[least], sample[least]
    return totals, shortest[1]


def bins(lengths: np.ndarray, times: np.ndarray, cut: int) -> list[tuple[int, int, int]]:
    """[(least, most, samples)] of lengths, between powers of two and halfway; one of them ends at `cut`."""
    if not len(lengths):
        return []
    edges = sorted({*(2 ** power * half // 2 for power in range(2, 40) for half in (2, 3)), cut})
    numbers = np.searchsorted(edges, lengths)
    counts = np.bincount(numbers, times, len(edges) + 1).astype(np.int64)
    used = np.flatnonzero(counts)
    return [(edges[number - 1] + 1 if number else 1, edges[number], int(counts[number]))
            for number in range(used[0], used[-1] + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Single records
# ---------------------------------------------------------------------------------------------------------------------

class Answer(NamedTuple):
    """An answer that is trained in a sample.

    start: number of its first token; what stands before it is what it is trained after
    prompt: the ids that inference gives the model for it, by a call of apply_chat_template that knows nothing of the
        encoder
    """

    start: int
    prompt: list[int]


class ShownSample(NamedTuple):
    """A sample before it is cut. trained: bool (tokens); kept: the tokens that training sees; answers: the trained ones
    """

    ids: list[int]
    trained: list[bool]
    kept: int
    answers: list[Answer]

    def same(self, answer: Answer) -> bool:
        """Whether the tokens before an answer are those of its prompt at inference."""
        return self.ids[:answer.start] == answer.prompt


class Shown(NamedTuple):
    """A record as it is trained. reasons: why it is not; text: the record as JSON"""

    place: Place
    samples: list[ShownSample]
    reasons: list[str]
    text: str


class Viewer:
    """Makes `Shown` of records."""

    def __init__(self, encoder: ConversationEncoder, columns: dict[str, str] | None = None):
        self.encoder, self.uncut, self.columns = encoder, uncut_encoder(encoder), columns
        self.prompt = inference_prompt(encoder.template)

    def __call__(self, place: Place, record: object) -> Shown:
        samples, reasons, text = [], [], as_json(record)
        try:
            conversation = to_conversation(record, Notices(), self.columns)
            excerpts = self.encoder.excerpts(conversation, Notices())
            samples = [self._sample(conversation, *excerpt) for excerpt in excerpts]
            outcomes = {self.encoder.encode(*excerpt).outcome for excerpt in excerpts} or {"nothing to learn"}
            reasons = [] if outcomes & {"kept", "truncated"} else sorted(outcomes)
        except BadRecord as bad:
            reasons = [": ".join(filter(None, reason)) for reason in bad.args[0]]
        return Shown(place, samples, reasons, text)

    def _sample(self, conversation, excerpt, text):
        messages, tools = self.encoder.with_system(conversation.messages), conversation.tools
        messages = self.encoder.template.structured(messages, tools, Notices())
        said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        ids, trained, token_at = [], [], {}
        for start, piece, of_answer in self.uncut.pieces(excerpt, text):
            token_at[start] = len(ids)
            ids += piece
            trained += [of_answer] * len(piece)
        answers = []
        for start, _, mode in excerpt.answers:
            before = messages[:said[text.count(HEADER, 0, start) - 1]]
            answers.append(Answer(token_at[start], self.prompt(before, tools, mode)))
        return ShownSample(ids, trained, min(len(ids), self.encoder.max_length), answers)

    def records(self, found: Survey, report: DataReport, numbers: Iterable[int]) -> dict[int, Shown]:
        """{number: Shown} of some records of a survey; what is said of unusable ones is the report's."""
        bad = {(row["file"], row["record"]): row for row in report.problems.rejected}
        wanted, shown = {}, {}
        for number in numbers:
            file, line, record = found.places[number].tolist()
            path = found.files[file]
            if row := bad.get((path, record)):
                data = row["data"]
                shown[number] = Shown(Place(path, line, record), [], row["reasons"],
                                      data if isinstance(data, str) else as_json(data))
            else:
                wanted[path, record] = number
        files = sorted({path for path, _ in wanted}, key=found.files.index)
        for place, record in read_files(files, Problems()) if wanted else ():
            number = wanted.pop((place.path, place.number), None)
            if number is not None:
                shown[number] = self(place, record)
                if not wanted:
                    break
        return shown


def as_json(record: object) -> str:
    return "(nested too deeply to be shown)" if deeper(record) else json.dumps(record, ensure_ascii=False, default=str)


def uncut_encoder(encoder: ConversationEncoder) -> ConversationEncoder:
    """The same encoder, but samples may have any length."""
    uncut = copy.copy(encoder)
    uncut.max_length, uncut.overlong = sys.maxsize, "truncate"
    return uncut


def inference_prompt(template: ChatTemplate):
    """-> function (messages, tools, mode) that builds the ids of a prompt as an inference program does: by
    apply_chat_template, with control tokens in the messages read as text."""
    tokenizer = template.tokenizer
    if template.kept:  # it reads all special tokens as text
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in sorted(template.kept)])
    tokenizer.chat_control_tokens = sorted(tokenizer.get_added_vocab().keys() - template.kept)
    render = limited(functools.partial(type(tokenizer).apply_chat_template, tokenizer), tokenizer.name_or_path)

    def prompt(messages, tools, mode):
        return render(messages, tools=tools, add_generation_prompt=True, sanitize_control_tokens=True,
                      return_dict=False, **template.style(tools).variables(mode))

    return prompt


def runs(sample: ShownSample) -> list[tuple[int, int, bool]]:
    """[(start, end, trained)] of the pieces of a sample that are trained or not, those beyond the cut apart."""
    edges = [0, *(place for place in range(1, len(sample.ids))
                  if sample.trained[place] != sample.trained[place - 1] or place == sample.kept), len(sample.ids)]
    return [(start, end, sample.trained[start]) for start, end in itertools.pairwise(edges)]
