"""JSON records out of files, each with the place it stands, and every problem of the input collected on the way."""

import collections
import json
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from mechanisms.errors import UserError
from mechanisms.paths import data_files

_SPACE = re.compile(r"[ \t\r\n]*")
DEEPEST = 100  # levels of lists and objects in a record; beyond, libraries give up at places of their own
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
            data = row["data"] if isinstance(row["data"], str) else json.dumps(row["data"], ensure_ascii=False)
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
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def find_files(patterns: list[str], problems: Problems) -> list[str]:
    """Data files for a list of files, folders (every .json and .jsonl below) and globs, in a fixed order."""
    files, missing = data_files(patterns)
    problems.fatal += missing
    return files


def read_records(path: str, problems: Problems) -> Iterator[tuple[Place, object]]:
    """Yield (Place, record) for a JSON array or JSON Lines file, told apart by content, not by name.

    UTF-8 with or without byte order mark, LF or CRLF. A line of JSON Lines that is broken is added to `problems` and
    reading goes on; in an array nothing after the first broken place can be trusted, so reading ends there.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        problems.fatal.append(f"{path}: cannot be read: {error.strerror}")
        return
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        problems.fatal.append(f"{path}: UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW")
        return
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        problems.fatal.append(f"{path}: the file is empty" if size <= 4096 else f"{path}: starts with blank space only")
        return
    count = 0
    for place, record in (_array if start[:1] == b"[" else _lines)(path, problems):
        count += 1
        yield place, record
    if not count and not any(row["file"] == path for row in problems.rejected) \
            and not any(text.startswith(f"{path}:") for text in problems.fatal):
        problems.fatal.append(f"{path}: no records in this file")


def _decode(raw, path, line, problems):
    """bytes -> str, or None with a problem that names the line and the encoding it looks like."""
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        for encoding in ("gb18030", "cp949", "latin-1"):
            try:
                raw.decode(encoding)
                break
            except UnicodeDecodeError:
                continue
        problems.fatal.append(f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}), perhaps {encoding}. "
                              f"Convert it: iconv -f {encoding} -t UTF-8 FILE > NEW")
        return None


def _lines(path, problems):
    with open(path, "rb") as file:
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
                    yield from _concatenated(path, problems)
                    return
                detail = str(error)
                if isinstance(error, json.JSONDecodeError):
                    detail = f"{error.msg} at column {error.colno}"
                problems.add(place, [("not valid JSON", detail)], text)
                continue
            yield place, record


def _spans_lines(path):
    """Whether the file starts with one JSON value that goes over several lines (so it is not JSON Lines)."""
    with open(path, "rb") as file:
        text = file.read().decode("utf-8-sig", errors="replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text, _SPACE.match(text).end())
    except (ValueError, RecursionError):
        return False
    return "\n" in text[:end]


def _array(path, problems):
    return _values(path, problems, opening="[", between=",", closing="]")


def _concatenated(path, problems):
    return _values(path, problems, opening="", between="", closing="")


def _values(path, problems, opening, between, closing):
    """The JSON values of a text, one at a time, with the line each starts on."""
    with open(path, "rb") as file:
        text = _decode(file.read(), path, 1, problems)
    if text is None:
        return
    decode = json.JSONDecoder().raw_decode
    position = _SPACE.match(text).end() + len(opening)
    line, counted, number = 1, 0, 0
    expected = ""  # what has to stand before the next value: nothing before the first
    while True:
        position = _SPACE.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        if closing and text.startswith(closing, position):
            rest = _SPACE.match(text, position + 1).end()
            if rest < len(text):
                line += text.count("\n", position, rest)
                problems.fatal.append(f"{path}:{line}: text after the end of the array: {text[rest:rest + 40]!r}")
            return
        if position == len(text) and not closing:
            return
        if expected and not text.startswith(expected, position):
            what = f"expected '{between}' or '{closing}' after record {number}"
            if position == len(text):
                what = f"the file ends inside the array, after record {number}: it was cut off"
            problems.fatal.append(f"{path}:{line}: not valid JSON: {what}")
            return
        position = _SPACE.match(text, position + len(expected)).end()
        line, counted = line + text.count("\n", counted, position), position
        number += 1
        try:
            record, end = decode(text, position)
        except (ValueError, RecursionError) as error:
            detail = str(error)
            if isinstance(error, json.JSONDecodeError):
                detail = f"{error.msg} at line {error.lineno} column {error.colno}"
                line = error.lineno
            problems.fatal.append(f"{path}:{line}: not valid JSON in record {number}: {detail}")
            return
        yield Place(path, line, number), record
        position, expected = end, between
