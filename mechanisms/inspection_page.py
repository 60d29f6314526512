"""The samples of a data set as one page of HTML that needs nothing else.

inspection_page.html has the design, and a script that makes everything out of JSON. Text from data is in that JSON
only, and becomes text nodes: it cannot be markup. The page's policy forbids any other script, and the network.
"""

import base64
import hashlib
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mechanisms.data.report import DataReport
from mechanisms.inspection import Shown, Survey, Viewer, bins, short_names
from mechanisms.paths import usual_mode

RECORDS = 200  # on a page
OF_EACH_KIND = 12  # before the others are drawn by chance
LARGEST = 1_900_000  # bytes of a page
TEXT = 2_000  # characters of a record that has no samples
TOKENS, CUT_TOKENS = 4_000, 100  # of a sample, and behind its cut
TEMPLATE = Path(__file__).with_suffix(".html")


def write_page(path: str, viewer: Viewer, surveys: dict[str, Survey], reports: dict[str, DataReport], model: str,
               mixed: list[int]) -> None:
    """Write a page about the data sets, with records of the first.

    model: its name or folder; mixed: the numbers of the first data set's records, mixed.

    Raises OSError.
    """
    found = surveys["train"]
    numbers = choose(found, mixed)
    shown = viewer.records(found, reports["train"], numbers)
    records = [record_json(found, number, shown[number]) for number in numbers]
    page = {
        "model": model, "files": list(short_names(found.files).values()), "maxLength": viewer.encoder.max_length,
        "sets": [set_json(name, surveys[name], reports[name], viewer.encoder.max_length) for name in surveys],
        "kinds": [kind for kind in found.kinds if any(kind in record["kinds"] for record in records)]}
    text = fitting(page, records, Vocabulary(viewer.encoder.tokenizer))
    unfinished = f"{path}.unfinished"
    with open(unfinished, "w", encoding="utf-8", errors="backslashreplace") as file:  # halves of characters as in JSON
        file.write(text)
    os.chmod(unfinished, usual_mode())
    os.replace(unfinished, path)


def choose(found: Survey, mixed: list[int]) -> list[int]:
    """Numbers of records, some of each kind and then any, in the order of the files."""
    chosen = {}
    for records in sorted(found.kinds.values(), key=np.count_nonzero):  # those that are rare first
        chosen |= dict.fromkeys(np.flatnonzero(records)[:OF_EACH_KIND].tolist())
    chosen |= dict.fromkeys(mixed[:RECORDS])
    return sorted(list(chosen)[:RECORDS], key=lambda number: found.places[number].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# What the script of the page takes
# ---------------------------------------------------------------------------------------------------------------------

def set_json(name: str, found: Survey, report: DataReport, max_length: int) -> dict:
    return {
        "name": name, "records": len(found.places), "kept": report.kept, "samples": report.samples,
        "tokens": report.tokens, "trained": report.trained, "longest": report.longest,
        "lengths": bins(found.lengths, found.times, max_length),
        "counts": {title: sorted(counter.items(), key=lambda row: (-row[1], row[0]))
                   for title, counter in found.counts.items()},
        "turns": [] if found.turns is None else [row for row in found.turns.tolist() if row[0]],
        "kinds": {kind: int(np.count_nonzero(records)) for kind, records in found.kinds.items()},
        "report": "\n".join(report.lines(""))}


def record_json(found: Survey, number: int, shown: Shown) -> dict:
    text = "" if shown.samples else shown.text
    if len(text) > TEXT:
        text = f"{text[:TEXT]} ... {len(text) - TEXT:,} characters"
    return {"place": found.place(number), "reasons": shown.reasons, "text": text, "samples": shown.samples,
            "kinds": [kind for kind, records in found.kinds.items() if records[number]]}


def sample_json(sample, vocabulary, limit):
    """A sample: its tokens, of a long one the first and last `limit` / 2, and some of those that are cut off."""
    half, kept, end = limit // 2, sample.kept, len(sample.ids)
    parts = [(0, min(half, kept)), (max(half, kept - half), kept), (kept, min(kept + CUT_TOKENS, end))]
    switches = [place for place in range(1, end) if sample.trained[place] != sample.trained[place - 1]]
    return {
        "parts": [[start, vocabulary.numbers(sample.ids[start:stop])] for start, stop in parts if start < stop],
        "length": end, "kept": kept, "trained": sum(sample.trained[1:kept]),
        "switches": [*([0] if sample.trained and sample.trained[0] else []), *switches],
        "answers": [answer_json(sample, answer, vocabulary) for answer in sample.answers if answer.start < kept]}


def answer_json(sample, answer, vocabulary):
    if sample.same(answer):
        return {"start": answer.start}
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(sample.ids, answer.prompt)))
    return {"start": answer.start, "differs": same, "length": len(answer.prompt),
            "prompt": vocabulary.numbers(answer.prompt[same:same + 50])}


class Vocabulary:
    """The tokens of a page, each with a small number of its own."""

    def __init__(self, tokenizer):
        self.tokenizer, self.added = tokenizer, {number: text for text, number in tokenizer.get_added_vocab().items()}
        self.byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
        self.tokens = {}

    def numbers(self, ids):
        return [self.tokens.setdefault(token, len(self.tokens)) for token in ids]

    def to_json(self):
        """[[id, text, or a list of bytes that are no whole characters], ...], with a third entry for added tokens"""
        return [[token, self.added[token], 1] if token in self.added else [token, self.spelled(token)]
                for token in self.tokens]

    def spelled(self, token):
        written = bytes(map(self.byte_of.__getitem__, self.tokenizer.convert_ids_to_tokens(token)))
        try:
            return written.decode()
        except UnicodeDecodeError:
            return list(written)


def fitting(page: dict, records: list[dict], vocabulary: Vocabulary) -> str:
    """The page with as much of long samples as there is room for."""
    limit = TOKENS
    while True:
        vocabulary.tokens.clear()
        written = [{**record, "samples": [sample_json(sample, vocabulary, limit) for sample in record["samples"]]}
                   for record in records]
        text = fill_in({**page, "records": written, "vocabulary": vocabulary.to_json()})
        if len(text.encode(errors="backslashreplace")) <= LARGEST or limit < 4:
            return text
        limit //= 2


def fill_in(page: dict) -> str:
    """The template with its data and policy."""
    template = TEMPLATE.read_text(encoding="utf-8")
    digests = {tag: base64.b64encode(hashlib.sha256(re.search(f"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[1].encode())
                                     .digest()).decode() for tag in ("script", "style")}
    policy = "; ".join(["default-src 'none'", *(f"{tag}-src 'sha256-{digest}'" for tag, digest in digests.items())])
    data = json.dumps(page, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    before, between, after = re.split("POLICY|DATA", template)
    return f"{before}{policy}{between}{data}{after}"
