"""JSON records out of files, each with the place it stands, and every problem of the input collected on the way."""

import codecs
import collections
import functools
import json
import os
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mechanisms.data.files import Unreadable, csv_rows, delimiter_of, foreign, open_unpacked, table_kind, table_rows
from mechanisms.errors import UserError
from mechanisms.hubs import dataset_files
from mechanisms.sources import data_files

_SPACE = re.compile(r"[ \t\r\n]*")
DEEPEST = 100  # levels of lists and objects in a record; beyond, libraries give up at places of their own
_HEAD = 4096  # bytes that tell what a file is
_CHUNK = 1 << 18  # bytes of a JSON array read at once
_LONGEST_WORD = 100  # characters before the end of what is read, in which a fault may be only that it goes on there
_SHOWN = 20  # problems printed in full; the rest are counted per kind


class Place(NamedTuple):
    """Where a record stands: file, line on which it starts and its number in the file, both from 1."""

    path: str
    line: int
    number: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line} (record {self.number})"


def deeper(value):
    """Whether a JSON value has more than DEEPEST levels."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [child for one in level if isinstance(one, (dict, list))
                 for child in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return False
    return True


class Notices(collections.Counter):
    """What was left out or changed in usable records, and how often.

    `examples`: {notice: one case of it}, of those counted by `note`.
    """

    def __init__(self, counts=(), examples=()):
        super().__init__(counts)
        self.examples = dict(examples)

    def __reduce__(self):
        return Notices, (dict(self), self.examples)

    def note(self, notice, example):
        self[notice] += 1
        self.examples.setdefault(notice, example)

    def take_over(self, other):
        """Count what was counted of other records."""
        self.update(other)
        self.examples = {**other.examples, **self.examples}


class Problems:
    """What is wrong with the input, all of it: `add` while reading, `report` once at the end.

    `rejected` holds, per rejected record, {"file", "line", "record", "reasons", "data"}; `fatal` lists problems that
    no number of skipped rows can get around (a file that is missing, say).
    """

    def __init__(self):
        self.rejected: list[dict] = []
        self.fatal: list[str] = []

    def add(self, place: Place, reasons: list[tuple[str, str]], data: object) -> None:
        """Reject the record at `place`. reasons: list of (kind, detail), the kind the same for all records alike."""
        if deeper(data):
            data = "(nested too deeply to be shown)"
        self.rejected.append({
            "file": place.path, "line": place.line, "record": place.number,
            "reasons": [f"{kind}: {detail}" if detail else kind for kind, detail in reasons],
            "kinds": [kind for kind, _ in reasons], "data": data,
        })

    def extend(self, other: "Problems") -> None:
        """Take over the problems of other records."""
        self.rejected += other.rejected
        self.fatal += other.fatal

    def report(self) -> str:
        """One line per problem for the first 20 rejected records, then a count per kind."""
        lines = list(self.fatal)
        for row in self.rejected[:_SHOWN]:
            data = row["data"]
            if not isinstance(data, str):
                data = json.dumps(data, ensure_ascii=False, default=str)  # a table may hold dates and bytes
            excerpt = data if len(data) <= 100 else data[:97] + "..."
            for reason in row["reasons"]:
                lines.append(f"{row['file']}:{row['line']} (record {row['record']}): {reason}")
            lines.append(f"    {excerpt.strip()}")
        if len(self.rejected) > _SHOWN:
            lines.append(f"... and {len(self.rejected) - _SHOWN} more. All of them by kind:")
            kinds = collections.Counter(kind for row in self.rejected for kind in row["kinds"])
            lines += [f"    {count:>7} x {kind}" for kind, count in kinds.most_common()]
        return "\n".join(lines)

    def stop_or_skip(self, allowed: int) -> None:
        """Raise UserError unless the input can be used when up to `allowed` rejected records are left out."""
        if self.fatal or len(self.rejected) > allowed:
            advice = ""
            if self.rejected:
                rows = "1 record" if len(self.rejected) == 1 else f"{len(self.rejected)} records"
                advice = (f"\n{rows} rejected. Fix the data, or leave such records out with "
                          f"--skip_bad_rows {len(self.rejected)} (they are then listed in rejected.jsonl).")
            raise UserError(f"the data cannot be used as it is:\n{self.report()}{advice}")

    def write(self, path: str | os.PathLike) -> None:
        """The rejected records with their reasons, one JSON object a line."""
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # half characters as JSON has them
            for row in self.rejected:
                row = {key: value for key, value in row.items() if key != "kinds"}
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def find_files(words: list[str], problems: Problems, cache_dir: str | None = None) -> dict[str, float]:
    """{data file: share of it to take} for words of --data_path, see `sources.data_files`, in a fixed order.

    cache_dir: where downloaded datasets lie (default: Hugging Face's or ModelScope's).
    """
    files, missing = data_files(words, functools.partial(dataset_files, cache_dir=cache_dir))
    problems.fatal += missing
    return files


def read_records(path: str, problems: Problems) -> Iterator[tuple[Place, object]]:
    """Yield (Place, record) of a data file, one after the other; what it is is told by content, not by name.

    JSON arrays and JSON Lines, CSV and TSV (UTF-8 with or without byte order mark, LF or CRLF), each also packed with
    gzip, bzip2 or zstd, parquet and arrow. A line of JSON Lines or a row of CSV that is broken is added to `problems`
    and reading goes on; nothing after a broken place in anything else can be trusted, so reading ends there.
    """
    count = 0
    try:
        for place, record in _read(path, problems):
            count += 1
            yield place, record
    except Unreadable as error:
        problems.fatal.append(f"{path}: {error}")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None)
        problems.fatal.append(f"{path}: cannot be read: {reason}" if reason else
                              f"{path}: a damaged archive, or one cut off: {error}. Download or pack it again")
    if not count and not any(row["file"] == path for row in problems.rejected) \
            and not any(text.startswith(f"{path}:") for text in problems.fatal):
        problems.fatal.append(f"{path}: no records in this file")


def _read(path, problems):
    kind = table_kind(path)
    if kind:
        for number, row in enumerate(table_rows(path, kind), 1):
            yield Place(path, number, number), row
        return
    with open_unpacked(path) as file:
        head = file.read(_HEAD)
        more = len(head) == _HEAD
    if reason := foreign(head):
        raise Unreadable(reason)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise Unreadable("starts with blank space only" if more else "the file is empty")
    text = start.decode(errors="replace")
    header = text.splitlines()[0]
    if text[0] == "[":
        yield from _values(path, problems, opening="[", between=",", closing="]")
    elif re.search(r"^\s*\{", text, re.MULTILINE) or _is_json(header):
        yield from _lines(path, problems)
    elif delimiter := delimiter_of(header):
        yield from _csv(path, delimiter, problems)
    else:
        with open_unpacked(path) as file:
            if all(_decode(raw, path, line, problems) is not None for line, raw in enumerate(file, 1)):
                raise Unreadable(f"neither JSON nor CSV with a line of column names: it starts with {header[:60]!r}")


def _is_json(text):
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _decode(raw, path, line, problems):
    """bytes -> str, or None with a problem that names the line and the encoding it looks like."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        problems.fatal.append(_not_utf8(path, line, error))
        return None


def _not_utf8(path, line, error):
    """The problem of a UnicodeDecodeError in bytes that start on `line`."""
    line += error.object.count(b"\n", 0, error.start)
    for encoding in ("gb18030", "cp949", "latin-1"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(error.object)  # its end may be half a character
            break
        except UnicodeDecodeError:
            continue
    return (f"{path}:{line}: not UTF-8 (byte 0x{error.object[error.start]:02x}), perhaps {encoding}. "
            f"Convert it: iconv -f {encoding} -t UTF-8 FILE > NEW")


def _csv(path, delimiter, problems):
    """A line of column names, then one record a row, all values strings."""

    def lines():
        with open_unpacked(path) as file:
            for line, raw in enumerate(file, 1):
                text = _decode(raw, path, line, problems)
                if text is None:
                    return
                yield text

    rows = csv_rows(lines(), delimiter)
    _, names = next(rows, (0, []))  # none: not UTF-8, which is said
    if len(set(names)) < len(names):
        raise Unreadable(f"two columns have the same name: {', '.join(names)}")
    for number, (line, cells) in enumerate(rows, 1):
        if len(cells) == len(names):
            yield Place(path, line, number), dict(zip(names, cells))
        else:
            problems.add(Place(path, line, number), [("a row has one cell for each column", f"{len(cells)} cells, "
                         f"{len(names)} columns ({', '.join(names)})")], cells)


def _lines(path, problems):
    with open_unpacked(path) as file:
        number = 0
        for line, raw in enumerate(file, 1):
            text = _decode(raw, path, line, problems)
            if text is None:
                return
            if not text.strip():
                continue
            number += 1
            place = Place(path, line, number)
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                if number == 1 and _spans_lines(path):
                    yield from _values(path, problems, opening="", between="", closing="")
                    return
                if number == 1 and text.rstrip().endswith(",") and _is_json(text.rstrip()[:-1]):
                    raise Unreadable("JSON Lines with a comma at the end of each line. Remove them: "
                                     "sed 's/,[[:space:]]*$//' FILE > NEW") from error
                detail = str(error)
                if isinstance(error, json.JSONDecodeError):
                    detail = f"{error.msg} at column {error.colno}"
                problems.add(place, [("not valid JSON", detail)], text)
                continue
            yield place, record


def _spans_lines(path):
    """Whether the file starts with one JSON value that goes over several lines (so it is not JSON Lines)."""
    values = _values(path, Problems(), opening="", between="", closing="", whole_values=lambda text: "\n" in text)
    return next(values, None) is not None


class _Text:
    """The text of a file as a window that moves on: `text` from `position`, which `line` and `column` (from 1) are of.
    """

    def __init__(self, file, path):
        self.file, self.path, self.decoder = file, path, codecs.getincrementaldecoder("utf-8")()
        self.text, self.position, self.ended, self.read_lines = "", 0, False, 1
        self.line = self.column = 1
        self.more()
        self.text = self.text.removeprefix("\ufeff")

    def more(self):
        """Read on, as much again as is waiting or more. Raises Unreadable, UnicodeDecodeError."""
        self.text, self.position = self.text[self.position:], 0
        raw = self.file.read(max(_CHUNK, len(self.text)))
        self.ended = not raw
        try:
            self.text += self.decoder.decode(raw, final=self.ended)
        except UnicodeDecodeError as error:
            error.line = self.read_lines
            raise
        self.read_lines += raw.count(b"\n")

    def go_to(self, position):
        newlines = self.text.count("\n", self.position, position)
        self.line += newlines
        self.column = (position - self.text.rindex("\n", self.position, position) if newlines
                       else self.column + position - self.position)
        self.position = position

    def starts_with(self, what):
        """Whether `what` (one character or none) is next, after blank space, to which this moves."""
        while True:
            self.go_to(_SPACE.match(self.text, self.position).end())
            if self.position < len(self.text) or self.ended:
                return self.text.startswith(what, self.position)
            self.more()

    def at_end(self):
        self.starts_with("")
        return self.position == len(self.text)

    def value(self):
        """(JSON value that is next, its text). Raises JSONDecodeError, RecursionError."""
        decode = json.JSONDecoder().raw_decode
        while True:
            try:
                value, end = decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # a number may go on
                    return value, end
            except json.JSONDecodeError as error:
                inside = error.msg.startswith("Unterminated string")
                if self.ended or not inside and error.pos + _LONGEST_WORD < len(self.text):
                    self.go_to(error.pos)
                    raise
            self.more()


def _values(path, problems, opening, between, closing, whole_values=lambda text: True):
    """The JSON values of a text, one at a time, with the line each starts on.

    whole_values(text) says of the text of a value whether it is one; the others end the reading.
    """
    with open_unpacked(path) as file:
        try:
            yield from _values_of(_Text(file, path), problems, opening, between, closing, whole_values)
        except UnicodeDecodeError as error:
            problems.fatal.append(_not_utf8(path, error.line, error))


def _values_of(text, problems, opening, between, closing, whole_values):
    path, number, expected = text.path, 0, opening
    text.starts_with("")
    while True:
        if number or not opening:
            if closing and text.starts_with(closing):
                break
            if not closing and text.at_end():
                return
        if not text.starts_with(expected):
            what = f"expected '{between}' or '{closing}' after record {number}"
            if text.at_end():
                what = f"the file ends inside the array, after record {number}: it was cut off"
            problems.fatal.append(f"{path}:{text.line}: not valid JSON: {what}")
            return
        text.go_to(text.position + len(expected))
        if not number and closing and text.starts_with(closing):
            break
        text.starts_with("")
        number += 1
        line = text.line
        try:
            record, end = text.value()
        except json.JSONDecodeError as error:
            problems.fatal.append(f"{path}:{text.line}: not valid JSON in record {number}: {error.msg} at line "
                                  f"{text.line} column {text.column}")
            return
        except RecursionError as error:
            problems.fatal.append(f"{path}:{line}: not valid JSON in record {number}: {error}")
            return
        if not whole_values(text.text[text.position:end]):
            return
        yield Place(path, line, number), record
        text.go_to(end)
        expected = between
    text.go_to(text.position + len(closing))
    if not text.at_end():
        rest = text.text[text.position:text.position + 40]
        problems.fatal.append(f"{path}:{text.line}: text after the end of the array: {rest!r}")
